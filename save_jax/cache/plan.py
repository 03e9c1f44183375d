"""What a cache holds of a split, and what its arrays are made of."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from save_jax import sharding
from save_jax.models.save import FEATURES, SAVEConfig, tower_parameters
from save_jax.optimizer import OptimizerConfig, group_of
from save_jax.parameters import Parameters

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
