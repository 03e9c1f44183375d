"""On-disk cache of frozen encoders' outputs: written once, then read at every step.

`python -m save_jax.cache` writes a cache (`save_jax/cache/__main__.py`), `config.cache.dir` trains
and evaluates from one. DIR/SPLIT/ holds one .npy file per array, with a row per clip (or caption),
and meta.json, which says how many rows are complete and what the array was made of: weights, data
and sizes. A run of other weights, data or sizes is refused.

Nothing here needs TensorFlow: the arrays are plain NumPy files, mapped into memory.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from save_jax import files, sharding
from save_jax.batch import Batch
from save_jax.errors import UserError
from save_jax.models.save import FEATURES, SAVEConfig, tower_parameters
from save_jax.optimizer import OptimizerConfig, group_of
from save_jax.parameters import Parameters

FORMAT = 1  # raised when files of the same names come to mean something else
_READERS = 8  # threads
_LARGE = 2**16  # bytes of a row that is worth a thread

# The arrays of a batch that a cache can hold, and what a user calls each, with what comes with it.
ARRAYS = {
    "frame_embeddings": "frames",
    "frame_mask": "frames",
    "caption_embeddings": "captions",
    "ast_states": "ast",
    "speech_states": "speech",
    "teacher_video": "teacher",
    "teacher_audio": "teacher",
}
ONLY_TRAINING = ("captions", "teacher")  # evaluation embeds each caption once, as it is
PARTS = tuple(dict.fromkeys(ARRAYS.values()))


class Split(NamedTuple):
    """What a cache must know of a split.

    Attributes:
        name: "train", say.
        clips: how many there are.
        digest: of the clips' names, of how they were prepared, and of a sample of the result.
        caption_ids: int32 [captions, L].
        transcript_ids: int32 [clips, L].
        max_frames: F.
        teacher_size: length of the teacher's vectors; 0 = they are not wanted.
    """

    name: str
    clips: int
    digest: str
    caption_ids: np.ndarray
    transcript_ids: np.ndarray
    max_frames: int
    teacher_size: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """One array of one split, as it should be.

    Attributes:
        shape: of the whole array.
        weights: digest of the parameters that make it; "" = none do.
        data: digest of what it is made from.
        sizes: what else decides its values, by name.
    """

    shape: tuple[int, ...]
    weights: str
    data: str
    sizes: Mapping[str, Any]


#### What there is to cache, and what it is made of.


def frozen_parts(model: SAVEConfig, rates: OptimizerConfig, params: Parameters) -> tuple[str, ...]:
    """Returns the parts that can be cached: those of encoders whose parameters are all frozen.

    Args:
        model: for the branches that exist.
        rates: learning rate of each group of parameters.
        params: all parameters, or abstract ones.
    """
    excluded = {
        ARRAYS[name]
        for name, feature in FEATURES.items()
        if not model.has(name)
        or any(rates.rate(group_of(p)) for p in tower_parameters(feature.tower, params))
    }
    return tuple(part for part in PARTS if part not in excluded)


def weights_digest(tower: str, params: Parameters, mesh: jax.sharding.Mesh) -> str:
    """Returns a SHA-256 of names, shapes and values, however they are sharded."""
    digest = hashlib.sha256()
    for name in tower_parameters(tower, params):
        value = np.asarray(jax.device_put(params[name], sharding.replicated(mesh)))
        digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()


def plans(
    split: Split,
    model: SAVEConfig,
    params: Parameters,
    parts: Sequence[str],
    mesh: jax.sharding.Mesh,
) -> dict[str, Plan]:
    """Returns what the arrays of some parts must be for this model, weights and split."""
    clip = {"dtype": model.dtype} | {f"clip.{k}": v for k, v in vars(model.clip).items()}
    ast = {"dtype": model.dtype} | {f"ast.{k}": v for k, v in vars(model.ast).items()}
    dim, words = model.clip.embed_dim, split.transcript_ids.shape[1]
    vision, text = clip | {"max_frames": split.max_frames}, clip | {"max_words": words}
    vectors = (split.clips, split.teacher_size)
    described = {
        "frame_embeddings": ((split.clips, split.max_frames, dim), vision, None),
        "frame_mask": ((split.clips, split.max_frames), {}, None),
        "caption_embeddings": ((len(split.caption_ids), dim), text, split.caption_ids),
        "ast_states": ((split.clips, model.ast.patches + 1, model.ast.width), ast, None),
        "speech_states": ((split.clips, words, dim), text, split.transcript_ids),
        "teacher_video": (vectors, {}, None),
        "teacher_audio": (vectors, {}, None),
    }
    digest_of = functools.cache(lambda tower: weights_digest(tower, params, mesh))
    return {
        name: Plan(
            shape,
            digest_of(FEATURES[name].tower) if name in FEATURES else "",
            split.digest if ids is None else digest(split.digest, ids.tobytes()),
            sizes,
        )
        for name, (shape, sizes, ids) in described.items()
        if ARRAYS[name] in parts and (ARRAYS[name] != "teacher" or split.teacher_size)
    }


def digest(*facts: str | bytes) -> str:
    """Returns a SHA-256 of facts in their order."""
    found = hashlib.sha256()
    for fact in facts:
        fact = fact.encode() if isinstance(fact, str) else fact
        found.update(b"%d\n" % len(fact) + fact)
    return found.hexdigest()


def differences(name: str, found: Mapping[str, Any], plan: Plan) -> list[str]:
    """Returns a line for each way in which an array was made of something else than planned."""
    lines = []
    if found["weights"] != plan.weights:
        there, here = found["weights"][:12], plan.weights[:12]
        lines.append(f"weights of {FEATURES[name].tower}*: {there} there, {here} here")
    if found["data"] != plan.data:
        lines.append(
            f"data (clips, how they were prepared, or texts): {found['data'][:12]} there, "
            f"{plan.data[:12]} here"
        )
    sizes = found["sizes"]
    for key in sorted(set(sizes) | set(plan.sizes)):
        there, here = sizes.get(key), plan.sizes.get(key)
        if there != here:
            lines.append(f"sizes: {key} = {there!r} there, {here!r} here")
    if not lines and tuple(found["shape"]) != plan.shape:
        lines.append(f"sizes: shape {tuple(found['shape'])} there, {plan.shape} here")
    return [f"  {name}: {line}" for line in lines]


def read_meta(directory: pathlib.Path) -> dict[str, Any] | None:
    """Reads meta.json of a split's cache; None where there is none.

    Raises:
        UserError: it is damaged, or of another version of this format.
    """
    path = directory / "meta.json"
    try:
        meta = json.loads(path.read_text())
        if meta["format"] != FORMAT:
            raise UserError(
                f"{path}: expected format {FORMAT}, found {meta['format']}: it was written by "
                "another version. Remove the directory, and write the cache again."
            )
        return meta
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). Remove {directory}, and write the cache again."
        ) from error


def save_meta(directory: pathlib.Path, meta: Mapping[str, Any]) -> None:
    files.write(directory / "meta.json", json.dumps(meta, indent=1))


def map_file(
    directory: pathlib.Path, name: str, entry: Mapping[str, Any], mode: Literal["r", "r+"]
) -> np.memmap:
    """Maps an array's file into memory.

    Raises:
        UserError: it is absent, or not what meta.json says.
    """
    path, dtype = directory / f"{name}.npy", jnp.dtype(entry["dtype"])
    try:
        array: np.memmap = np.load(path, mmap_mode=mode)
        if array.shape != tuple(entry["shape"]) or array.dtype != on_disk(dtype):
            raise ValueError(f"it holds {array.dtype} {array.shape}")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: expected {dtype} {tuple(entry['shape'])}, as meta.json says, found "
            f"something else ({error}). Remove {directory}, and write the cache again."
        ) from error
    return cast(np.memmap, array.view(dtype))


def on_disk(dtype: np.dtype) -> np.dtype:
    """Returns the dtype in the file: bfloat16, which NumPy's files lack, is stored as uint16."""
    return np.dtype(np.uint16) if dtype == jnp.bfloat16 else dtype


#### Reading.


class Cache:
    """The arrays of one split that a run uses.

    Attributes:
        parts: what need not be computed, of PARTS.
    """

    def __init__(self, directory: pathlib.Path, entries: Mapping[str, Mapping[str, Any]]):
        self._arrays = {
            name: map_file(directory, name, entry, "r") for name, entry in entries.items()
        }
        self._threads = concurrent.futures.ThreadPoolExecutor(_READERS, "cache")
        self.parts = frozenset(ARRAYS[name] for name in entries)

    def read(self, rows: np.ndarray, pairs: np.ndarray | None) -> dict[str, np.ndarray]:
        """Reads fields of a batch.

        Args:
            rows: the clips, as rows of the split.
            pairs: their captions, as rows of the table of captions; None in evaluation.
        """
        captions = rows if pairs is None else pairs
        return {
            name: self._copy(array, captions if ARRAYS[name] == "captions" else rows)
            for name, array in self._arrays.items()
            if pairs is not None or ARRAYS[name] not in ONLY_TRAINING
        }

    def lay_over(
        self, batches: Iterator[Batch], facts: Mapping[str, tuple[str, np.ndarray]]
    ) -> Iterator[Batch]:
        """Yields the batches with what the cache holds of their clips.

        Args:
            batches: this process's, without what the cache holds.
            facts: by the field of a batch that takes its clips' rows of it: the cached array that
                it comes with, and an array [clips].
        """
        for batch in batches:
            rows = np.maximum(batch.index, 0)  # -1 only fills up
            fields: dict[str, np.ndarray | None] = dict(self.read(rows, batch.caption_index))
            if "caption_embeddings" in fields:
                fields["caption_ids"] = None
            fields |= {name: fact[rows] for name, (array, fact) in facts.items() if array in fields}
            yield batch._replace(**fields)

    def _copy(self, array: np.ndarray, rows: np.ndarray) -> np.ndarray:
        if array[:1].nbytes < _LARGE:
            return array[rows]
        out = np.empty((len(rows), *array.shape[1:]), array.dtype)

        def copy(place: int) -> None:
            out[place] = array[rows[place]]  # leaves the interpreter to others meanwhile

        list(self._threads.map(copy, range(len(rows))))
        return out


def open_split(
    directory: str | os.PathLike,
    split: Split,
    model: SAVEConfig,
    params: Parameters,
    parts: Sequence[str],
    mesh: jax.sharding.Mesh,
) -> Cache:
    """Opens the cache of a split, after a check that it is of what it should be.

    Args:
        directory: the cache, DIR.
        split: which; `has_split` says whether it is there.
        model, params: the run's.
        parts: those that may come from a cache (`frozen_parts`); of them, the ones that are there
            will.
        mesh: devices.

    Raises:
        UserError: nothing there can be used, or an array that can be was made of something else,
            is not complete, or is damaged.
    """
    where = pathlib.Path(directory) / split.name
    found = (read_meta(where) or {"arrays": {}})["arrays"]
    there = {ARRAYS[name] for name in found}
    expected = plans(split, model, params, [part for part in parts if part in there], mesh)
    usable = {name: found[name] for name in expected if name in found}
    if not any(name in FEATURES for name in usable):
        raise UserError(
            f"{where} holds {', '.join(sorted(there)) or 'nothing'}; of this config's parts, the "
            f"frozen ones are {', '.join(parts)}: there is nothing to be used "
            "(config.optimizer.clip=0 and config.optimizer.ast=0 freeze CLIP and AST)"
        )
    lines = [x for name in usable for x in differences(name, usable[name], expected[name])]
    if lines:
        raise UserError(
            f"{where} does not belong to this run (there: the cache; here: this run):\n"
            + "\n".join(lines)
            + "\nMake a cache for this run in another directory (python -m save_jax.cache "
            "--out=DIR with this run's config), or leave config.cache.dir empty."
        )
    for name, entry in usable.items():
        if entry["done"] < entry["shape"][0]:
            raise UserError(
                f"{where}: {name} is not complete, it has {entry['done']} of {entry['shape'][0]} "
                "rows. Run the python -m save_jax.cache command that wrote it again: it resumes."
            )
    return Cache(where, usable)


def has_split(directory: str | os.PathLike, split: str) -> bool:
    """Says whether there is a cache of a split, complete or not."""
    return (pathlib.Path(directory) / split / "meta.json").exists()
