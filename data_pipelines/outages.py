"""Tells outages of the machine, its network and its stores from the faults of a file.

The fault of a file costs its clip and nothing else: the clip is left out and named. An outage must
cost no clip, because a clip that is left out stays out once preparation is complete. So an outage
ends the run, and the same command resumes it.

The fault of a file is an error about its path (it is absent, it is a folder, it may not be read) or
anything wrong with its bytes. Every other reason why the bytes cannot be read is an outage: full
disks and directories, lost mounts, too many open files, too little memory, a network or a bucket
that does not respond. Bytes are therefore read here, not by the libraries that decode them: FFmpeg
reports "Input/output error", "Operation not permitted" and "Cannot allocate memory" for damaged
files, too.
"""

import contextlib
import errno
import mmap
import os
import stat
import tempfile
from collections.abc import Generator, Iterator

from etils import epath

from save_jax import errors
from save_jax.errors import ABSENT, NO_SPACE, OutageError, UserError
from save_jax.files import is_remote

_PLENTY = 2**31 - 1  # bytes: the most that FFmpeg allocates at once

_REMEDIES = {
    **dict.fromkeys(
        (*NO_SPACE, errno.EFBIG), "Make room there, or set TMPDIR to a folder on a larger disk"
    ),
    **dict.fromkeys(
        (errno.EMFILE, errno.ENFILE), "Allow more open files (ulimit -n), or use fewer --workers"
    ),
    errno.ENOMEM: "Use fewer --workers or more memory (remove a file that always fails)",
}
_REMEDY = (
    "Check that the disk, the network or the store responds again (remove a file that always fails)"
)


def is_outage(error: BaseException) -> bool:
    """Returns whether an exception is the fault of the machine, network or store, not of a file."""
    if type(error).__module__.split(".")[0] == "av":
        # PyAV does not read files here (see above), and damaged ones make it ask for absurd amounts
        # of memory, which it refuses with the same error number as the system.
        return getattr(error, "errno", None) == errno.ENOMEM and memory_is_short()
    return errors.is_outage(error)


def outage(where: str | os.PathLike, error: BaseException) -> OutageError:
    """Returns the error that ends the run after an outage; `where` is what could not be used."""
    if isinstance(error, OutageError):
        return error
    number = errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    if not isinstance(error, OSError) and type(error).__name__ not in reason:
        reason = f"{type(error).__name__}: {reason}"
    return in_words(where, reason, _REMEDIES.get(number, _REMEDY))


def in_words(
    where: str | os.PathLike, reason: str, remedy: str = _REMEDIES[errno.ENOMEM]
) -> OutageError:
    """Returns the error that ends the run for a reason that is not an exception."""
    return OutageError(
        f"{os.fspath(where)}: {reason}. This is the fault of this machine, its network or a store, "
        f"not of the data: no clip is left out, and finished work is kept. {remedy}, then run the "
        "same command again to resume."
    )


def pass_on(error: Exception, where: str | os.PathLike) -> None:
    """Raises the error that must end the run; returns if the fault is that of a file."""
    if isinstance(error, UserError | OutageError):
        raise error
    if is_outage(error):
        raise outage(where, error) from error


@contextlib.contextmanager
def reaching(path: str | os.PathLike) -> Generator[None]:
    """Classifies the errors of accessing a file or a folder, local or remote.

    Only reading, listing and status calls belong inside, not the decoding of the bytes.

    Raises:
        UserError: a package that this kind of store needs is not installed.
        OutageError: the machine, its network or the store fails.
        OSError: the path itself is at fault, as in FileNotFoundError.
    """
    try:
        yield
    except (ImportError, NotImplementedError) as error:
        raise UserError(
            f"{path}: expected a path that can be opened, found that its kind of store needs a "
            f"package that is not installed ({error}). gs:// and s3:// need the extra [remote]: "
            "pip install -e '.[remote]'"
        ) from error
    except Exception as error:
        pass_on(error, path)
        # Any error of a store but "absent" is about the store: rights are not granted per object.
        if (is_remote(path) and not isinstance(error, ABSENT)) or _closed(path, error):
            raise outage(path, error) from error
        raise


@contextlib.contextmanager
def temporary() -> Generator[None]:
    """Treats every error of the system inside as an outage of the temporary directory.

    FileNotFoundError is one, too: it may mean that no temporary directory is writable.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or type(error).__module__.startswith("av."):
            raise
        where = f"the temporary directory {tempfile.tempdir or os.environ.get('TMPDIR', '')}"
        raise outage(where.strip(), error) from error


def memory_is_short() -> bool:
    """Returns whether this process cannot allocate what a media file may ask for at once."""
    try:
        mmap.mmap(-1, _PLENTY, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()  # not used
    except (OSError, MemoryError):
        return True
    return False


def exists(path: str | os.PathLike) -> bool:
    """Returns whether a file or folder exists, local or remote; OutageError if that is unknown."""
    return _status(path) is not None


def is_folder(path: str | os.PathLike) -> bool:
    """Returns whether a folder exists, local or remote; OutageError if that is unknown."""
    status = _status(path)
    if status is None:
        return False
    return status.is_directory if is_remote(path) else stat.S_ISDIR(status.st_mode)


def walk(folder: str | os.PathLike) -> Iterator[tuple[epath.Path, list[str], list[str]]]:
    """Walks a folder like Path.walk, but raises OutageError when an outage prevents listing.

    A folder that cannot be listed through its own fault is left out, as Path.walk does.
    """

    def heed(error: OSError) -> None:
        with contextlib.suppress(OSError), reaching(folder):
            raise error

    with reaching(folder):
        yield from epath.Path(folder).walk(on_error=heed)


def _status(path: str | os.PathLike):
    """Returns the status of a file or folder; None when it does not exist."""
    try:
        with reaching(path):
            # Not Path.exists and is_dir: in some versions, they return False on any error.
            return epath.Path(path).stat() if is_remote(path) else os.stat(path)
    except OSError:
        return None


def _closed(path: str | os.PathLike, error: Exception) -> bool:
    """Returns whether permission is refused because a whole folder is closed, not a file alone.

    This happens when the ticket for a network file system has expired.
    """
    folder = os.path.dirname(os.path.abspath(path))
    return isinstance(error, PermissionError) and not os.access(folder, os.R_OK | os.X_OK)
