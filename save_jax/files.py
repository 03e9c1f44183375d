"""Files, on a disk or in a bucket (gs://, s3://), which etils.epath opens.

The one place that writes files atomically and renames; `save_jax.locks` locks.
"""

import contextlib
import functools
import logging
import os
import pathlib
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Sequence

# Else epath would open buckets through TensorFlow, where that happens to be installed.
os.environ.setdefault("EPATH_USE_TF", "0")

import fsspec
from etils import epath

from save_jax.errors import NO_SPACE, OutageError, UserError, is_outage

Path = pathlib.Path | epath.Path

# What `appearing` writes to. A process that is killed leaves it; seconds later than any that lives.
_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{32}\.tmp", re.DOTALL)
_LEFT_AFTER = 24 * 3600

logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what it logs, it also raises

# Called with the path of what is about to be written: `save_jax.locks` has one.
guards: list[Callable[[Path], None]] = []


def check(where: Path) -> None:
    """Asks the guards before a path is written to; for what is not written by this module."""
    for guard in guards:
        guard(where)


def path(where: str | os.PathLike) -> Path:
    """Returns a path that can be read, written and listed, absolute where it is on a disk.

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
    """Says whether a store answers, but not to us: asking again would change nothing."""
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
    """Says whether a path is in a bucket, whose objects are written as a whole or not at all."""
    return "://" in os.fspath(where)


def sizes(directory: Path) -> dict[str, int]:
    """Returns the bytes of all files below a directory, by their path from there.

    Raises:
        UserError: the store refuses.
        OutageError: the store fails.
        OSError: the disk fails; of a directory that is not there, nothing is returned.
    """
    if not is_remote(directory):
        found = {}
        for path in pathlib.Path(directory).rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # another process's, and gone meanwhile
                if path.is_file():
                    found[path.relative_to(directory).as_posix()] = path.stat().st_size
        return found
    try:
        store, name = fsspec.core.url_to_fs(os.fspath(directory))
        store.invalidate_cache()  # other processes write there too
        name = name.rstrip("/") + "/"
        listed = store.find(name, detail=True)
    except FileNotFoundError:
        return {}
    except Exception as error:  # each kind of store has its own
        raise unreachable(directory, error) from error
    return {path.removeprefix(name): info["size"] for path, info in listed.items()}


def read_ranges(wanted: Sequence[tuple[Path, int, int]]) -> list[bytes | Exception]:
    """Reads parts of files in a bucket, many at a time.

    Args:
        wanted: (file, first byte, number of bytes), of one bucket or several of the same store.

    Returns:
        In the same order, the bytes, which are fewer where a file ends before; or a
        FileNotFoundError.

    Raises:
        UserError: the store refuses.
        OutageError: the store fails.
    """
    names = [os.fspath(path) for path, _, _ in wanted]
    starts, ends = [start for _, start, _ in wanted], [start + n for _, start, n in wanted]
    try:
        store, _ = fsspec.core.url_to_fs(names[0])
        found = store.cat_ranges(names, starts, ends, on_error="return")
    except Exception as error:  # each kind of store has its own
        raise unreachable(names[0], error) from error
    for name, content in zip(names, found, strict=True):
        if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
            raise unreachable(name, content) from content
    return found


def write(where: Path, text: str | bytes | memoryview, *, fsync: bool = True) -> None:
    """Writes a file that has its name only once it is complete; `fsync` as in `appearing`.

    Several processes may write one name at once: each file is whole, and the last one stays.

    Raises:
        OSError: the system or the store refuses; a file of that name is as it was.
    """
    content = text.encode() if isinstance(text, str) else text
    if is_remote(where):
        check(where)
        where.write_bytes(bytes(content))
        return
    with appearing(where, fsync=fsync) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def appearing(where: Path, *, fsync: bool = True) -> Generator[pathlib.Path, None, None]:
    """Gives a path to write to, of what appears as `where` at the end, or not at all.

    On a disk it lies beside `where`, whose place it takes. For a bucket it lies in the temporary
    directory, and is copied there. It is another path each time, as several processes may write
    `where` at once. One that is killed leaves it behind: it is removed a day later, when a process
    writes to that folder for the first time. Where a directory takes the place of another, a kill
    between the two renames leaves neither, and the next call brings the old one back.

    Args:
        where: a file; on a disk, a directory too.
        fsync: wait until it is on the disk, so that not even a power cut leaves a name that stands
            for nothing. False is for what can be made again and is many small files.

    Raises:
        OSError: the system or the store refuses; what had that name before is as it was.
    """
    where = epath.Path(where)
    remote = is_remote(where)
    folder = pathlib.Path(tempfile.gettempdir()) if remote else pathlib.Path(where).parent
    temporary = folder / f".{where.name}.{uuid.uuid4().hex}.tmp"
    aside = folder / f".{where.name}.replaced"
    check(where)
    if not remote:
        _remove_old_leftovers(folder)
        _finish_replacing(where, aside)
    renamed = False
    try:
        yield temporary
        if remote:
            check(where)
            epath.Path(temporary).copy(where, overwrite=True)
            return
        if fsync:
            for path in (*temporary.rglob("*"), temporary):
                _sync(path)
        check(where)
        if temporary.is_dir() and where.is_dir():  # which only an empty one may be renamed to
            os.rename(where, aside)
        try:
            os.replace(temporary, where)
        finally:
            if fsync:
                _sync_folder_of(where)
            _finish_replacing(where, aside)
        renamed = True
    finally:
        if not renamed:  # else what has that name now is another process's
            _remove(temporary)


def _finish_replacing(where: Path, aside: pathlib.Path) -> None:
    """Removes the directory that another took the place of, or brings it back if none did."""
    if not os.path.lexists(aside):
        return
    if os.path.lexists(where):
        _remove(aside)
    else:
        os.rename(aside, where)


@functools.cache  # once in each folder, as listing one of many files takes a while
def _remove_old_leftovers(folder: pathlib.Path) -> None:
    remove_leftovers(folder, older_than=_LEFT_AFTER)


def remove_leftovers(folder: pathlib.Path, older_than: int) -> None:
    """Removes what processes that were killed were writing to a folder.

    Args:
        folder: the folder; one that is not there has none.
        older_than: seconds since it was last written to; 0 is for whoever holds the folder's lock.
    """
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _TEMPORARY.fullmatch(entry.name):
                written = entry.stat(follow_symlinks=False).st_mtime
                if time.time() - written >= older_than:
                    _remove(pathlib.Path(entry.path))


def _remove(path: pathlib.Path) -> None:
    """Removes a file or a directory, if that can be done; of a link, not what it points to."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def rename(directory: Path, name: Path) -> None:
    """Gives a directory on a disk, whose files are complete, the name that says so.

    Raises:
        OSError: the system refuses, as it does where there is a directory of that name.
    """
    check(name)
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


def reserve(path: pathlib.Path) -> None:
    """Reserves on the disk what a file may fill, before it is mapped into memory.

    Else a full disk would show at a write to mapped memory, which ends the process (SIGBUS).

    Raises:
        OSError: there is no room.
    """
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno in NO_SPACE:
                raise OSError(error.errno, error.strerror, str(path)) from error
            # Else it is a file system that cannot reserve.
