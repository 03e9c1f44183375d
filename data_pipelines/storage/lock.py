"""One preparation of a directory at a time."""

import contextlib
import datetime
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from typing import TextIO

from etils import epath

from data_pipelines import prepared
from data_pipelines.storage import tfds_format
from save_jax.errors import UserError

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def hold(directory: epath.Path, *, wait: bool) -> Iterator[None]:
    """Keeps every other process from preparing a directory meanwhile.

    The lock is the system's, on a file beside the directory, which says who holds it. So it ends
    with the process that holds it, however that ends. An object store knows no locks: there, it
    keeps off the processes of this machine only.

    Args:
        directory: the directory.
        wait: wait for another process that holds the lock, instead of raising.

    Raises:
        UserError: another process holds it.
    """
    path = prepared.lock_path(directory)
    with tfds_format.writing(str(directory.parent)):
        directory.parent.mkdir(parents=True, exist_ok=True)
        file = _open(path, str(directory), wait)
    try:
        now = datetime.datetime.now().isoformat(" ", "seconds")
        with contextlib.suppress(OSError):  # a full disk; the lock holds nonetheless
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}")
            file.flush()
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
        with contextlib.suppress(OSError):
            file.close()


def _open(path: str, directory: str, wait: bool) -> TextIO:
    """The locked file at a path."""
    while True:
        file = open(path, "a+")  # noqa: SIM115 (the caller closes it, which ends the lock)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            if not wait:
                file.close()
                raise UserError(
                    f"{directory} is being prepared by {holder} ({path}). Wait until that is done, "
                    "or stop it, and run the same command again."
                ) from None
            print(f"waiting for {holder}, which is preparing {directory}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            _log.warning("%s: this file system has no locks; run one preparation at a time", path)
        # Who held it before may have removed the file in between: then this lock is on nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                return file
        file.close()
