"""Weights in a bucket (gs://, s3://): copied to this machine, which reads them as its own."""

import functools
import json
import pathlib
import tempfile
from collections.abc import Iterator

from etils import epath

from save_jax import files
from save_jax.errors import UserError
from save_jax.weights.files import hub

_COPIES: list[tempfile.TemporaryDirectory] = []  # removed when the process ends


@functools.cache  # several questions are asked of a source, and its tensors are read late
def fetch(where: str) -> pathlib.Path:
    """Copies a file, or a directory of Hugging Face files, from a bucket.

    Args:
        where: gs://… or s3://…, a file or a directory.

    Returns:
        The copy: a file, or a directory with the files of `hub.WEIGHTS` that are needed. It lasts
        as long as the process.

    Raises:
        UserError: nothing is there, or this user may not read it.
        OutageError: the network or the store fails.
        OSError: the disk is full.
    """
    source = files.path(where)
    copies = tempfile.TemporaryDirectory(prefix="save_jax-weights-")
    _COPIES.append(copies)
    folder = pathlib.Path(copies.name)
    try:
        if source.is_dir():
            for file in _needed(source):
                _copy(file, folder / file.name)
            return folder
        if not source.exists():
            raise UserError(
                f"{where} does not exist: expected a file with weights, a directory of Hugging "
                "Face files, or a run of this project or one of its checkpoints"
            )
        _copy(source, folder / source.name)
        return folder / source.name
    except (UserError, MemoryError):
        raise
    except Exception as error:  # each kind of store has its own
        if isinstance(error, OSError) and error.filename == str(folder):
            raise
        raise files.unreachable(where, error) from error


def _needed(source: files.Path) -> Iterator[files.Path]:
    """Yields the files that a directory's weights consist of: the first kind of them there is."""
    first = next((source / name for name in hub.WEIGHTS if (source / name).exists()), None)
    if first is None:
        return
    yield first
    if first.name.endswith(hub.INDEX):
        try:
            named = json.loads(first.read_text())["weight_map"].values()
            shards = sorted({pathlib.PurePath(shard).name for shard in named})
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # who reads it says what is wrong with it
        yield from (source / shard for shard in shards if (source / shard).exists())


def _copy(source: files.Path, target: pathlib.Path) -> None:
    epath.Path(source).copy(target)  # block by block, whatever its size
