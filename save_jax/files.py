"""Files of a run, on a disk or in a bucket (gs://, s3://, az://: whatever etils.epath opens)."""

import os
import pathlib

# Else epath would open buckets through TensorFlow, where that happens to be installed.
os.environ.setdefault("EPATH_USE_TF", "0")

from etils import epath

Path = pathlib.Path | epath.Path


def path(where: str | os.PathLike) -> Path:
    """A path that can be read, written and listed, absolute where it is on a disk."""
    if is_remote(where):
        return epath.Path(where)
    return pathlib.Path(where).absolute()


def is_remote(where: str | os.PathLike) -> bool:
    """Whether a path names an object in a bucket, which is written as a whole or not at all."""
    return "://" in os.fspath(where)


def write(where: Path, text: str | bytes) -> None:
    """Writes a file that appears under its name only once it is complete."""
    content = text.encode() if isinstance(text, str) else text
    if is_remote(where):
        where.write_bytes(content)
        return
    temporary = where.with_name(f".{where.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, where)
