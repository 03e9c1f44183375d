"""Tells the faults of the machine, its network and its stores from the faults of a file.

A file's own fault costs its clip and nothing else: it is left out and named. An outage must cost no
clip, for a clip that is left out stays out once preparation is complete. So it ends the run, and
the same command goes on from there.

A file's own fault is what the system says of its path (it is absent, it is a folder, it may not be
read) and whatever is wrong with the bytes that it does hold. All else that keeps these bytes from
us is an outage: full disks and directories, lost mounts, too many open files, too little memory, a
network or a bucket that does not answer. Bytes are therefore read here, not by the libraries that
take them apart: FFmpeg says "Input/output error", "Operation not permitted" and "Cannot allocate
memory" of damaged files, too.
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

_PLENTY = 2**31 - 1  # bytes: the most that FFmpeg takes in one piece

_REMEDIES = {
    **dict.fromkeys(
        (*NO_SPACE, errno.EFBIG), "Make room there, or let TMPDIR name a folder on a larger disk"
    ),
    **dict.fromkeys(
        (errno.EMFILE, errno.ENFILE), "Allow more open files (ulimit -n), or use fewer --workers"
    ),
    errno.ENOMEM: "Use fewer --workers or more memory (take away a file that never has enough)",
}
_REMEDY = (
    "See that the disk, the network or the store answers again (take away a file that never does)"
)


def is_outage(error: BaseException) -> bool:
    """Whether an exception is the fault of the machine, its network or a store, not of a file."""
    if type(error).__module__.split(".")[0] == "av":
        # Of reading it knows nothing (see above), and damaged files ask it for absurd amounts of
        # memory, which it refuses by the same word as the system.
        return getattr(error, "errno", None) == errno.ENOMEM and memory_is_short()
    return errors.is_outage(error)


def outage(where: str | os.PathLike, error: BaseException) -> OutageError:
    """The error that ends the run because of an outage; `where` is what could not be used."""
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
    """The error that ends the run for a reason that no exception tells."""
    return OutageError(
        f"{os.fspath(where)}: {reason}. That is the fault of this machine, its network or a store, "
        f"not of the data: no clip is left out for it, and what was done is kept. {remedy}, and "
        "run the same command again, which goes on from there."
    )


def pass_on(error: Exception, where: str | os.PathLike) -> None:
    """Raises what must end the run; returns where an exception is the fault of a file."""
    if isinstance(error, UserError | OutageError):
        raise error
    if is_outage(error):
        raise outage(where, error) from error


@contextlib.contextmanager
def reaching(path: str | os.PathLike) -> Generator[None]:
    """Sorts what may go wrong in reaching a file or a folder, here or in a store.

    Only reading, listing and asking belong in here, not what is then made of the bytes.

    Raises:
        UserError: this installation has not what that kind of store needs.
        OutageError: the machine, its network or the store fails.
        OSError: what the system says of the path, such as FileNotFoundError.
    """
    try:
        yield
    except (ImportError, NotImplementedError) as error:
        raise UserError(
            f"{path}: expected a path that can be opened, found that its kind of store needs a "
            f"package that is not installed ({error}). Install gcsfs for gs://, s3fs for s3://."
        ) from error
    except Exception as error:
        pass_on(error, path)
        # Of a store, any other words than "absent" are about it: its rights are not an object's.
        if (is_remote(path) and not isinstance(error, ABSENT)) or _closed(path, error):
            raise outage(path, error) from error
        raise


@contextlib.contextmanager
def temporary() -> Generator[None]:
    """Takes whatever the system refuses in here for an outage of the temporary directory.

    Its absence is one, too: FileNotFoundError may mean that no such directory can be written to.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or type(error).__module__.startswith("av."):
            raise
        where = f"the temporary directory {tempfile.tempdir or os.environ.get('TMPDIR', '')}"
        raise outage(where.strip(), error) from error


def memory_is_short() -> bool:
    """Whether this process cannot have as much memory as a sound file may ask for at once."""
    try:
        mmap.mmap(-1, _PLENTY, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()  # not used
    except (OSError, MemoryError):
        return True
    return False


def exists(path: str | os.PathLike) -> bool:
    """Whether there is a file or a folder, here or remote; OutageError where that is not known."""
    return _status(path) is not None


def is_folder(path: str | os.PathLike) -> bool:
    """Whether there is a folder, here or remote; OutageError where that is not known."""
    status = _status(path)
    if status is None:
        return False
    return status.is_directory if is_remote(path) else stat.S_ISDIR(status.st_mode)


def walk(folder: str | os.PathLike) -> Iterator[tuple[epath.Path, list[str], list[str]]]:
    """Lists a folder and those below it, as Path.walk does, which leaves out what cannot be listed.

    Here it is left out only where that is so of a folder itself: where an outage is in the way,
    OutageError is raised.
    """

    def heed(error: OSError) -> None:
        with contextlib.suppress(OSError), reaching(folder):
            raise error

    with reaching(folder):
        yield from epath.Path(folder).walk(on_error=heed)


def _status(path: str | os.PathLike):
    """What is known of a file or a folder; None when it is not there."""
    try:
        with reaching(path):
            # Not Path.exists and is_dir: in some versions, they say no whatever the matter is.
            return epath.Path(path).stat() if is_remote(path) else os.stat(path)
    except OSError:
        return None


def _closed(path: str | os.PathLike, error: Exception) -> bool:
    """Whether permission is refused because all of a folder is closed, not that file alone.

    So it is when the ticket for a network file system has run out.
    """
    folder = os.path.dirname(os.path.abspath(path))
    return isinstance(error, PermissionError) and not os.access(folder, os.R_OK | os.X_OK)
