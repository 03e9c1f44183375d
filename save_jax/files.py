"""Files of a run, on a disk or in a bucket (gs://, s3://), which etils.epath opens."""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator

# Else epath would open buckets through TensorFlow, where that happens to be installed.
os.environ.setdefault("EPATH_USE_TF", "0")

from etils import epath

from save_jax.errors import UserError

Path = pathlib.Path | epath.Path

LOCK = ".lock"  # in a directory that one process at a time may write to
# An object store has no locks. Whoever holds a directory there rewrites LOCK every _RENEWED
# seconds; one that stays the same for _LEASE seconds was left by a process that has died.
_RENEWED, _LEASE, _SETTLED = 10.0, 45.0, 2.0

logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what it logs, it also raises


def path(where: str | os.PathLike) -> Path:
    """A path that can be read, written and listed, absolute where it is on a disk.

    Raises:
        UserError: the store cannot be reached from here.
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
    """Writes a file that appears under its name only once it is complete, whatever happens.

    Raises:
        OSError: the system or the store refuses; a file of that name is as it was.
    """
    content = text.encode() if isinstance(text, str) else text
    if is_remote(where):
        where.write_bytes(content)
        return
    temporary = where.with_name(f".{where.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # after a power cut, a name must not stand for nothing
        os.replace(temporary, where)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Keeps every other process from holding a directory meanwhile, and makes it if need be.

    On a disk, the lock is the operating system's, on the file `.lock` in the directory: it ends
    with the process that holds it, however that ends. In a bucket it is a lease that is renewed;
    one that its holder left behind is taken over after 45 seconds. If nothing was written to a new
    directory, it is removed again.

    Raises:
        UserError: another process holds it, and the message says which; or it cannot be written to.
    """
    holder = (
        f"process {os.getpid()} on {socket.gethostname()}, since "
        f"{datetime.datetime.now().isoformat(' ', 'seconds')}"
    )
    with (_lease if is_remote(directory) else _lock)(directory, holder):
        yield


def _held(directory: Path, holder: str) -> UserError:
    return UserError(
        f"{directory} is in use by {holder or 'another process'} ({directory / LOCK}). Wait until "
        "it has ended, or stop it, and run the same command again; or use another directory."
    )


@contextlib.contextmanager
def _lock(directory: pathlib.Path, holder: str) -> Iterator[None]:
    path = directory / LOCK
    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115, closed below
        except FileNotFoundError:  # who held it before has just removed the empty directory
            continue
        except OSError as error:
            raise UserError(
                f"{directory}: expected a directory to write to, found: {error}. Choose another."
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                raise _held(directory, file.read()) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                file.close()
                raise
            print(
                f"warning: {directory}: this file system has no locks; nothing keeps a second run "
                "from writing there",
                file=sys.stderr,
            )
        # Who held it before may have removed the file in between: then this lock is on nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                break
        file.close()
    with file:
        file.truncate(0)
        file.write(holder)
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty
                directory.rmdir()


@contextlib.contextmanager
def _lease(directory: epath.Path, holder: str) -> Iterator[None]:
    path, mine = directory / LOCK, uuid.uuid4().hex

    def read() -> dict[str, str | int]:
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            return {}
        except ValueError:
            return {"holder": "a process that left no name"}

    def renew(beat: int) -> None:
        write(path, json.dumps({"id": mine, "holder": holder, "beat": beat}))

    found = read()
    if found:
        print(
            f"{directory} is in use by {found.get('holder')}: waiting up to {_LEASE:.0f} s for it "
            "to end",
            flush=True,
        )
        began = changed = time.monotonic()  # a holder that is ending may still renew it for a while
        while found and time.monotonic() - changed < _LEASE:
            time.sleep(_RENEWED / 4)
            if (now := read()) != found:
                found, changed = now, time.monotonic()
            if found and changed > began and time.monotonic() - began > _LEASE:
                raise _held(directory, str(found.get("holder")))
    renew(0)
    time.sleep(_SETTLED)  # of two that begin at once, the last to write has it
    if (now := read()).get("id") != mine:
        raise _held(directory, str(now.get("holder")))
    ended = threading.Event()

    def keep() -> None:
        for beat in range(1, sys.maxsize):
            if ended.wait(_RENEWED):
                return
            try:
                other = read()
                if other and other.get("id") != mine:
                    break
                renew(beat)
            except Exception as error:  # the network comes back, or the run's own writes fail too
                print(f"warning: {path} cannot be renewed: {error}", file=sys.stderr)
        # Anything that this process still wrote could destroy the other's work.
        print(
            f"error: {directory} was taken over by {other.get('holder')}, because this process "
            "could not renew its lease there. Stopped.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    keeper = threading.Thread(target=keep, name="lease", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join()
        with contextlib.suppress(Exception):  # then it is taken over after a while
            if read().get("id") == mine:
                path.unlink()
