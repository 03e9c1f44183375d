"""Files of a run, on a disk or in a bucket (gs://, s3://), which etils.epath opens."""

import logging
import os
import pathlib

# Else epath would open buckets through TensorFlow, where that happens to be installed.
os.environ.setdefault("EPATH_USE_TF", "0")

from etils import epath

from save_jax.errors import UserError

Path = pathlib.Path | epath.Path

logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what it logs, it also raises


def path(where: str | os.PathLike) -> Path:
    """A path that can be read, written and listed, absolute where it is on a disk.

    Raises:
        UserError: the store cannot be reached from here.
    """
    if not is_remote(where):
        return pathlib.Path(where).absolute()
    try:
        found = epath.Path(where)
    except KeyError as error:
        raise UserError(f"{where}: expected a path on a disk, gs:// or s3://") from error
    try:
        found.exists()  # or not: it only has to be able to say
    except ImportError as error:
        raise UserError(
            f"{where}: expected a path that can be opened, found that its kind of store needs a "
            f"package that is not installed ({error}). Install gcsfs for gs://, s3fs for s3://: "
            "pip install 'save_jax[remote]'"
        ) from error
    except Exception as error:  # each kind of store has its own for no network, no rights, no name
        raise UserError(
            f"{where} cannot be reached ({type(error).__name__}: {error}). Are its name, the "
            "network and the credentials of this machine right?"
        ) from error
    return found


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
