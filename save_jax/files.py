"""Files, on a disk or in a bucket (gs://, s3://), which etils.epath opens.

The one place that writes files atomically and renames; `save_jax.locks` locks.
"""

import contextlib
import logging
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Generator

# Else epath would open buckets through TensorFlow, where that happens to be installed.
os.environ.setdefault("EPATH_USE_TF", "0")

from etils import epath

from save_jax.errors import OutageError, UserError, is_outage

Path = pathlib.Path | epath.Path

logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what it logs, it also raises


def path(where: str | os.PathLike) -> Path:
    """A path that can be read, written and listed, absolute where it is on a disk.

    Raises:
        UserError: the store cannot be reached from here: its name, its package, or who asks.
        OutageError: the network or the store fails.
    """
    if not is_remote(where):
        return pathlib.Path(where).expanduser().absolute()
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
            "pip install -e '.[remote]' in the project's folder"
        ) from error
    except Exception as error:  # each kind of store has its own for no network, no rights, no name
        raise unreachable(where, error) from error
    return found


def unreachable(where: str | os.PathLike, error: Exception) -> UserError | OutageError:
    """Returns what to raise for a store that failed: an outage, or what the user can mend."""
    said = f"{where} cannot be reached ({type(error).__name__}: {error})."
    if is_outage(error) and not _is_refusal(error):
        return OutageError(
            f"{said} That is the fault of the network or the store: when it answers again, "
            "run the same command again to resume."
        )
    return UserError(f"{said} Are its name, the network and the credentials of this machine right?")


def _is_refusal(error: Exception) -> bool:
    """Whether a store answers, but not to us: asking again would change nothing."""
    # The status of HTTP, as gcsfs, aiohttp, requests and botocore have it.
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = (getattr(error, name, None) for name in ("code", "status"))
        status = next((s for s in found if s), getattr(response, "status_code", None))
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 429)  # too slow, too often
    # Without credentials there is no request. google.auth says when it may get them later.
    signs = ("Credential", "RefreshError", "Token", "Profile", "Region")
    name = type(error).__name__
    return any(sign in name for sign in signs) and not getattr(error, "retryable", False)


def is_remote(where: str | os.PathLike) -> bool:
    """Whether a path names an object in a bucket, which is written as a whole or not at all."""
    return "://" in os.fspath(where)


def write(where: Path, text: str | bytes, *, fsync: bool = True) -> None:
    """Writes a file that has its name only once it is complete; `fsync` as in `appearing`.

    Raises:
        OSError: the system or the store refuses; a file of that name is as it was.
    """
    content = text.encode() if isinstance(text, str) else text
    if is_remote(where):
        where.write_bytes(content)
        return
    with appearing(where, fsync=fsync) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def appearing(
    where: Path, *, unique: bool = False, fsync: bool = True
) -> Generator[pathlib.Path, None, None]:
    """Gives a path to write to, of what appears as `where` at the end, or not at all.

    On a disk it lies beside `where`, whose place it takes. For a bucket it lies in the temporary
    directory, and is copied there.

    Args:
        where: a file; on a disk, a directory too.
        unique: write to another path each time, because several processes may write `where` at
            once; a process that is killed leaves it behind. Otherwise the next one writes over it.
        fsync: wait until it is on the disk, so that not even a power cut leaves a name that stands
            for nothing. False is for what can be made again and is many small files.

    Raises:
        OSError: the system or the store refuses; what had that name before is as it was.
    """
    where = epath.Path(where)
    remote = is_remote(where)
    own = f".{uuid.uuid4().hex}" if unique or remote else ""
    folder = pathlib.Path(tempfile.gettempdir()) if remote else pathlib.Path(where).parent
    temporary = folder / f".{where.name}{own}.tmp"
    renamed = False
    try:
        yield temporary
        if remote:
            epath.Path(temporary).copy(where, overwrite=True)
            return
        if fsync:
            for path in (*temporary.rglob("*"), temporary):
                _sync(path)
        if temporary.is_dir() and where.is_dir():  # which only an empty one may be renamed to
            shutil.rmtree(where)
        os.replace(temporary, where)
        renamed = True
        if fsync:
            _sync_folder_of(where)
    finally:
        if not renamed:  # else what has that name now is another process's
            with contextlib.suppress(OSError):
                if temporary.is_dir():
                    shutil.rmtree(temporary, ignore_errors=True)
                else:
                    temporary.unlink(missing_ok=True)


def rename(directory: Path, name: Path) -> None:
    """Gives a directory on a disk, whose files are complete, the name that says so.

    Raises:
        OSError: the system refuses, as it does where there is a directory of that name.
    """
    os.rename(directory, name)
    _sync_folder_of(name)


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder_of(path: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system does that
        _sync(pathlib.Path(path).parent)
