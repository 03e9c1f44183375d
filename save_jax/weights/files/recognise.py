"""Recognises weights at a path or hub id: the tensors, and whose names they have.

A file is recognised by its contents: its first bytes say how it is written, the names of its
tensors which model it holds. Names of files matter only inside directories.
"""

import functools
import json
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from save_jax import checkpoint, files, hub_ids, recorded
from save_jax.errors import UserError
from save_jax.weights.files import bucket, hub, pytorch, safetensors, torchscript
from save_jax.weights.files.tensor import Tensor, Tensors
from save_jax.weights.names import ast, clip, save
from save_jax.weights.table import Row, State, Table, listing

FACTS = "weights.json"  # beside the checkpoints of an import: how the source spelled its tensors
CONFIG = "save_jax.config"  # in the metadata of safetensors exported from a run: what made it


class Format(NamedTuple):
    """A way to name a model's tensors.

    Attributes:
        name: for messages.
        table: to our names of the whole model.
    """

    name: str
    table: Table


def _under(table: Table, prefix: str) -> Table:
    return Table(tuple(row.under("", prefix) for row in table.rows), table.unused, table.renamed)


# Our own names, each tensor as it is.
OURS = Format("save_jax", Table(tuple(Row(row.ours, row.ours) for row in save.TABLE.rows)))
SAVE = Format("SAVE, AVIGATE or CLIP4Clip", save.TABLE)
FORMATS = (
    SAVE,
    Format("OpenAI's CLIP", _under(clip.TABLE, "clip.")),
    Format("Hugging Face's CLIP", _under(clip.HUGGING_FACE, "clip.")),
    Format("AST", _under(ast.TABLE, "ast.")),
    Format("Hugging Face's AST", _under(ast.HUGGING_FACE, "ast.")),
    OURS,
)


class Source(NamedTuple):
    """Tensors and whose names they have.

    Attributes:
        where: path or hub id, as the user gave it.
        format: what the names are.
        tensors: by their names in the file.
        names: of an import's checkpoint: PyTorch's name, as the file it came from spelled it, ->
            dtype there; else empty.
    """

    where: str
    format: Format
    tensors: Tensors
    names: Mapping[str, str]

    def restricted(self, prefix: str) -> "Source":
        """Returns the tensors of one part of the model, by the prefix of our names.

        Raises:
            UserError: there are none.
        """
        table = self.format.table
        rows = table.holders(map(table.canonical, self.tensors))
        kept = {
            name: tensor
            for name, tensor in self.tensors.items()
            if (row := rows.get(table.canonical(name))) and row.ours.startswith(prefix)
        }
        if not kept:
            raise UserError(
                f"{self.where} has {self.format.name}'s names, and nothing of {prefix[:-1]}.*"
            )
        return self._replace(tensors=kept)


def open_source(where: str, *, trust_archive: bool = False) -> Source:
    """Recognises a path or hub id.

    Args:
        where: a file or a directory, on a disk or in a bucket, or OWNER/NAME or
            OWNER/NAME@REVISION on the Hugging Face Hub.
        trust_archive: read a TorchScript archive that is none of OpenAI's.

    Raises:
        UserError: it is absent, damaged, or nothing that the project can read.
        OutageError: the network or a bucket fails.
    """
    if files.is_remote(where):
        if checkpoint.is_ours(where):
            tensors, names = _read_checkpoint(checkpoint.find(where))
            return Source(where, recognise(tensors, where), tensors, names)
        path = bucket.fetch(where)
    else:
        path = pathlib.Path(where).expanduser()
    if not path.exists():
        if hub.is_id(where):
            path = hub.download(where)
        else:
            raise UserError(
                f"{where} does not exist: expected a file or directory with weights, or a model "
                f"of the Hugging Face Hub as {hub_ids.FORM}"
            )
    try:
        tensors, names = _read(path, trust_archive)
    except UserError as error:
        if files.is_remote(where):  # the copy's name says nothing
            raise UserError(str(error).replace(str(path), where)) from error
        raise
    return Source(where, recognise(tensors, where), tensors, names)


def _read(path: pathlib.Path, trust_archive: bool) -> tuple[Tensors, Mapping[str, str]]:
    """Reads a file or a directory on a disk; returns tensors and `Source.names`."""
    names: Mapping[str, str] = {}
    if path.is_file():
        tensors = read_file(path, trust_archive)
    elif shards := next((path / name for name in hub.WEIGHTS if (path / name).exists()), None):
        tensors = _read_shards(shards, trust_archive)
    elif _is_checkpoint(path):
        tensors, names = _read_checkpoint(checkpoint.find(path))
    else:
        found = sorted(child.name for child in path.iterdir())
        raise UserError(
            f"{path} is a directory without weights: expected a workdir with "
            f"{checkpoint.DIRECTORY}/STEP/, or one of {', '.join(hub.WEIGHTS)}; found "
            + (listing(found) or "nothing")
        )
    return tensors, names


def recorded_config(where: str) -> tuple[str, dict[str, Any] | None] | None:
    """Returns the config that a source says it was trained with.

    Args:
        where: a run or a checkpoint of ours, on a disk or in a bucket, or any other source.

    Returns:
        Where it is written, and the config; None for the latter when a run lacks config.json. None
        for sources that say nothing: all but runs, and safetensors exported from them.

    Raises:
        UserError: it cannot be read.
    """
    if checkpoint.is_ours(where):
        path = checkpoint.workdir_of(where) / recorded.RECORDED
        return str(path), recorded.read(path) if path.exists() else None
    file = bucket.fetch(where) if files.is_remote(where) else pathlib.Path(where).expanduser()
    if not file.exists() and hub.is_id(where):
        file = hub.download(where)
    if file.is_dir():
        file /= hub.WEIGHTS[0]
    facts = safetensors.metadata(file) if file.is_file() else {}
    if CONFIG not in facts:
        return None
    try:
        return str(file), dict(json.loads(facts[CONFIG]))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: its metadata {CONFIG} is damaged ({error})") from error


def recognise(tensors: State, where: str) -> Format:
    """Returns the format of which most names are found.

    Raises:
        UserError: they are foreign.
    """

    def matches(candidate: Format) -> int:
        return len(candidate.table.holders(map(candidate.table.canonical, tensors)))

    best = max(FORMATS, key=matches)
    if 2 * matches(best) < min(len(tensors), len(best.table.rows)) or not matches(best):
        raise UserError(
            f"{where} holds none of the models known here (CLIP, AST, SAVE, AVIGATE, CLIP4Clip): "
            f"of its {len(tensors)} tensors at most {matches(best)} have names of "
            f"{best.name}; it has {listing(sorted(tensors)) or 'none'}"
        )
    return best


def read_file(path: pathlib.Path, trust_archive: bool) -> Tensors:
    """Reads the tensors of one file; its first bytes say how it is written.

    Raises:
        UserError: it is damaged, or written in another way than those known here.
    """
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"PK\x03\x04"):
        if not zipfile.is_zipfile(path):
            raise UserError(
                f"{path} is cut short: a zip archive without its end; download or copy it again"
            )
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.namelist()
        except zipfile.BadZipFile as error:
            raise UserError(f"{path} is damaged: {error}") from error
        if any("/code/" in name for name in members):
            torchscript.check(path, trust=trust_archive)
            return torchscript.read(path)
        return pytorch.read(path)
    if head.startswith(b"\x80"):  # a pickle: PyTorch before 1.6
        return pytorch.read(path)
    if safetensors.looks_like(head):
        return safetensors.read(path)
    kind = "is empty" if not head else f"begins with {head[:16]!r}"
    if head.startswith(b"version https://git-lfs"):
        kind = "is a pointer of Git LFS to the real file (`git lfs pull` fetches it)"
    elif head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        kind = "is a web page"
    raise UserError(
        f"{path} {kind}: expected a PyTorch checkpoint, a TorchScript archive or safetensors"
    )


def _read_shards(path: pathlib.Path, trust_archive: bool) -> Tensors:
    if not path.name.endswith(hub.INDEX):
        return read_file(path, trust_archive)
    try:
        where: dict[str, str] = json.loads(path.read_text())["weight_map"]
        shards = sorted({pathlib.PurePath(shard).name for shard in where.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not an index of shards: {error}") from error
    absent = [shard for shard in shards if not (path.parent / shard).is_file()]
    if absent:
        raise UserError(
            f"{path.parent} lacks {len(absent)} of the {len(shards)} files that {path.name} names: "
            f"{listing(absent)}"
        )
    tensors = {}
    for shard in shards:
        tensors |= read_file(path.parent / shard, trust_archive)
    return tensors


def _is_checkpoint(path: pathlib.Path) -> bool:
    try:
        checkpoint.find(path)
    except UserError:
        return False
    return True


def _read_checkpoint(path: files.Path) -> tuple[Tensors, dict[str, str]]:
    shapes = checkpoint.parameter_shapes(path)

    @functools.cache  # one visit for all, at the first that is asked for
    def arrays() -> Mapping[str, np.ndarray]:
        return checkpoint.read_parameters(path, shapes)

    def reader(name: str) -> Callable[[], np.ndarray]:
        return lambda: arrays()[name]

    tensors = {
        name: Tensor(tuple(value.shape), np.dtype(value.dtype), reader(name))
        for name, value in shapes.items()
    }
    facts = path.parent.parent / FACTS
    try:
        return tensors, json.loads(facts.read_text())["torch"] if facts.exists() else {}
    except (ValueError, KeyError) as error:
        raise UserError(f"{facts} is damaged ({error!r}): remove it") from error
