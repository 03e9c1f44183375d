"""Files, on a disk or in a bucket (gs://, s3://), which etils.epath opens.

The one place that writes files atomically, renames and locks.
"""

import contextlib
import datetime
import errno
import fcntl
import functools
import itertools
import json
import logging
import os
import pathlib
import shutil
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator

# Else epath would open buckets through TensorFlow, where that happens to be installed.
os.environ.setdefault("EPATH_USE_TF", "0")

from etils import epath

from save_jax.errors import NO_SPACE, OutageError, UserError, is_outage

Path = pathlib.Path | epath.Path

LOCK = ".lock"  # in a directory that one process at a time may write to
# An object store has no locks. Whoever holds a directory there rewrites LOCK every _RENEWED
# seconds; one that stays the same for _LEASE seconds was left by a process that has died.
_RENEWED, _LEASE, _SETTLED = 10.0, 45.0, 2.0
_ATTEMPTS = 100  # to make a directory and its lock, while others remove theirs

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
            "pip install 'save_jax[remote]'"
        ) from error
    except Exception as error:  # each kind of store has its own for no network, no rights, no name
        raise _unreachable(where, error) from error
    return found


def _unreachable(where: str | os.PathLike, error: Exception) -> UserError | OutageError:
    said = f"{where} cannot be reached ({type(error).__name__}: {error})."
    if is_outage(error) and not _is_refusal(error):
        return OutageError(
            f"{said} That is the fault of the network or the store: when it answers again, the "
            "same command goes on."
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
def appearing(where: Path, *, unique: bool = False, fsync: bool = True) -> Iterator[pathlib.Path]:
    """Gives a path to write to, of what appears as `where` at the end, or not at all.

    On a disk it lies beside `where`, whose place it takes. For a bucket it lies in the temporary
    directory, and is copied there.

    Args:
        where: a file; on a disk, a directory too.
        unique: write to another path each time, because several processes may write `where` at
            once; a process that is killed leaves it behind. Otherwise the next one writes over it.
        fsync: wait until the disk has it, so that it survives a power cut. False is for many small
            files that can be made again.

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


def lock(path: Path, *, wait: bool = False) -> int | None:
    """Locks a file on a disk, which is made if need be, against every other process.

    The operating system releases it when the descriptor is closed, here and in every child process
    that inherited it, or they end. A file system without locks gives a warning and no protection.

    Args:
        path: the file; whoever holds its lock may remove it.
        wait: wait for another process that has the lock.

    Returns:
        A descriptor, which child processes do not inherit by themselves; None when another process
        has the lock, without `wait`.

    Raises:
        OSError: the file cannot be opened.
    """
    while True:
        with contextlib.ExitStack() as closing:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            closing.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
                _warn_of_no_locks(os.fspath(path))
            # Who held it before may have removed the file in between: then this lock is on nothing.
            if _is_there(path, descriptor):
                closing.pop_all()
                return descriptor


def is_locked(path: Path) -> bool | None:
    """Returns whether a process on this machine has a file's lock; None where that is unknown."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return {BlockingIOError: True, FileNotFoundError: False}.get(type(error))
    return False


@functools.cache
def _warn_of_no_locks(path: str) -> None:
    said = "this file system has no locks; nothing keeps a second process from writing there"
    print(f"warning: {path}: {said}", file=sys.stderr)


def _is_there(path: Path, descriptor: int) -> bool:
    """Whether a path still names the file that was opened."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def hold(directory: Path, *, beside: Path | None = None, wait: bool = False) -> Iterator[None]:
    """Keeps every other process from holding a directory meanwhile.

    On a disk, the lock is the operating system's (see `lock`), on a file that says who holds it: it
    ends with the process that holds it, however that ends. In a bucket it is a lease that is
    renewed, against processes of other machines too; it takes 2 seconds to get, and one that its
    holder left behind is taken over after 45 seconds.

    Args:
        directory: the directory, which is made on a disk, and removed again if it stays empty.
        beside: the lock's path, if the directory may not be made yet; by default `.lock` in it.
        wait: wait for another process that holds it, instead of raising.

    Raises:
        UserError: another process holds it, and the message says which; or it cannot be written to.
        OutageError: the disk, the network or the store fails.
    """
    holder = (
        f"process {os.getpid()} on {socket.gethostname()}, since "
        f"{datetime.datetime.now().isoformat(' ', 'seconds')}"
    )
    path = beside if beside is not None else directory / LOCK
    with (_lease if is_remote(path) else _lock)(directory, path, holder, wait):
        yield


def _held(directory: Path, path: Path, holder: object) -> UserError:
    return UserError(
        f"{directory} is in use by {holder or 'another process'} ({path}). Wait until it has "
        "ended, or stop it, and run the same command again; or use another directory."
    )


@contextlib.contextmanager
def _lock(directory: Path, path: Path, holder: str, wait: bool) -> Iterator[None]:
    descriptor = _locked(directory, path, wait)
    try:
        with contextlib.suppress(OSError):  # a full disk; the lock holds nonetheless
            os.ftruncate(descriptor, 0)
            os.write(descriptor, holder.encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            if _is_there(path, descriptor):  # else it is another's
                os.unlink(path)
        os.close(descriptor)
        with contextlib.suppress(OSError):  # not empty
            os.rmdir(path.parent)


def _locked(directory: Path, path: Path, wait: bool) -> int:
    """The descriptor of a directory's lock."""
    for left in itertools.count(_ATTEMPTS, -1):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = lock(path)
            if descriptor is None:
                with open(path, encoding="utf-8", errors="replace") as file:
                    found = file.read() or "another process"
                if not wait:
                    raise _held(directory, path, found)
                print(f"waiting for {found}, which holds {directory}", flush=True)
                descriptor = lock(path, wait=True)
            return descriptor
        except OSError as error:
            # Who held it before may just have removed it, and the empty directory.
            if isinstance(error, FileNotFoundError) and left > 1:
                continue
            if is_outage(error) and error.errno not in NO_SPACE:
                raise OutageError(
                    f"{directory} cannot be locked: {error}. When the disk works again, the same "
                    "command goes on."
                ) from error
            raise UserError(
                f"{directory}: expected a directory to write to, found: {error}. Choose another."
            ) from error


@contextlib.contextmanager
def _lease(directory: Path, path: Path, holder: str, wait: bool) -> Iterator[None]:
    mine = uuid.uuid4().hex

    def read() -> dict[str, str | int]:
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            return {}
        except ValueError:
            return {"holder": "a process that left no name"}

    def renew(beat: int) -> None:
        write(path, json.dumps({"id": mine, "holder": holder, "beat": beat}))

    def take() -> bool:
        """Whether it is ours now; False when another process has it that is alive."""
        nonlocal found
        found = read()
        if found:
            print(
                f"{directory} is in use by {found.get('holder')}: waiting "
                + ("for it to end" if wait else f"up to {_LEASE:.0f} s for it to end"),
                flush=True,
            )
        began = changed = time.monotonic()  # a holder that is ending may still renew it for a while
        while found and time.monotonic() - changed < _LEASE:
            time.sleep(_RENEWED / 4)
            if (now := read()) != found:
                found, changed = now, time.monotonic()
            if found and not wait and changed > began and time.monotonic() - began > _LEASE:
                return False
        renew(0)
        time.sleep(_SETTLED)  # of two that begin at once, the last to write has it
        found = read()
        return found.get("id") == mine

    found: dict[str, str | int] = {}
    try:
        while not (taken := take()) and wait:
            pass
    except Exception as error:  # each kind of store has its own
        raise _unreachable(path, error) from error
    if not taken:
        raise _held(directory, path, found.get("holder"))
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
        print(
            f"interrupted: {directory} was taken over by {other.get('holder')}, because this "
            "process could not renew its lease there. Stopped; once that has ended, the same "
            "command goes on.",
            file=sys.stderr,
            flush=True,
        )
        # At once: what this process still wrote could destroy the other's work. Started again, it
        # waits for up to _LEASE seconds, and is refused if the other is still at work.
        os._exit(os.EX_TEMPFAIL)

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
