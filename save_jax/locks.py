"""Locks: one process at a time in a directory, on a disk or in a bucket."""

import contextlib
import datetime
import errno
import fcntl
import functools
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Generator

from save_jax.errors import NO_SPACE, OutageError, UserError, is_outage
from save_jax.files import Path, is_remote, unreachable, write

LOCK = ".lock"  # in a directory that one process at a time may write to
# An object store has no locks. Whoever holds a directory there rewrites LOCK every _RENEWED
# seconds; one that stays the same for _LEASE seconds was left by a process that has died.
_RENEWED, _LEASE, _SETTLED = 10.0, 45.0, 2.0
# Seconds after which a lock is another writer's: `is_locked` of a reader takes it for an instant.
_INSTANT = 0.3
_ATTEMPTS = 100  # to make a directory and its lock, while others remove theirs


def lock(path: Path, *, wait: bool = False) -> int | None:
    """Locks a file on a disk, which is made if need be, against every other process.

    The lock is the operating system's: it ends when the descriptor is closed, here and in every
    child process that has inherited it, or with these processes, however they end. Where the file
    system has no locks, a warning is printed, and nothing is kept off.

    Args:
        path: the file; whoever holds its lock may remove it.
        wait: wait for another process that has the lock.

    Returns:
        A descriptor, which child processes do not inherit by themselves; None when another process
        has the lock for longer than a reader asks for it (see `is_locked`), without `wait`.

    Raises:
        OSError: the file cannot be opened.
    """
    until = time.monotonic() + _INSTANT
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        locked = False
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                if time.monotonic() > until:
                    return None
                time.sleep(_INSTANT / 30)
                continue
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
                _warn_of_no_locks(os.fspath(path))
            # Who held it before may have removed the file in between: then this lock is on nothing.
            locked = _is_there(path, descriptor)
            if locked:
                return descriptor
        finally:
            if not locked:
                os.close(descriptor)


def is_locked(path: Path) -> bool | None:
    """Returns whether a process on this machine has a file's lock; None where that is unknown.

    To find out, it takes the lock for an instant, which `lock` allows for.
    """
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return {BlockingIOError: True, FileNotFoundError: False}.get(type(error))
    return False


@functools.cache
def _warn_of_no_locks(path: str) -> None:
    print(
        f"warning: {path}: this file system has no locks; nothing keeps a second process from "
        "writing there at the same time",
        file=sys.stderr,
    )


def _is_there(path: Path, descriptor: int) -> bool:
    """Says whether a path still names the file that was opened."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def hold(
    directory: Path, *, beside: Path | None = None, wait: bool = False
) -> Generator[None, None, None]:
    """Keeps every other process from holding a directory meanwhile.

    On a disk, the lock is the operating system's (see `lock`), on a file that says who holds it: it
    ends with the process that holds it, however that ends. In a bucket it is a lease that is
    renewed, against processes of other machines too; it takes 2 seconds to get, and one that its
    holder left behind is taken over after 45 seconds.

    Args:
        directory: the directory, which is made on a disk with those above it, and removed again
            with them as far as they stay empty.
        beside: where the lock is, of a directory that may not be made yet; by default `.lock` in
            it.
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
def _lock(directory: Path, path: Path, holder: str, wait: bool) -> Generator[None, None, None]:
    made = [folder for folder in path.parent.parents if not os.path.exists(folder)]
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
            for folder in (path.parent, *made):
                os.rmdir(folder)


def _locked(directory: Path, path: Path, wait: bool) -> int:
    """Returns the descriptor of a directory's lock."""
    left = _ATTEMPTS
    while True:
        left -= 1
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
                assert descriptor is not None, "a lock that is waited for is had"
            return descriptor
        except OSError as error:
            # Who held it before may just have removed it, and the empty directory.
            if isinstance(error, FileNotFoundError) and left:
                continue
            if is_outage(error) and error.errno not in NO_SPACE:
                raise OutageError(
                    f"{directory} cannot be locked: {error}. When the disk works again, run "
                    "the same command again to resume."
                ) from error
            raise UserError(
                f"{directory}: expected a directory to write to, found: {error}. Choose another."
            ) from error


@contextlib.contextmanager
def _lease(directory: Path, path: Path, holder: str, wait: bool) -> Generator[None, None, None]:
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
        """Says whether it is ours now; False when another process has it that is alive."""
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
        raise unreachable(path, error) from error
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
            "process could not renew its lease there. Once that process has ended, run the same "
            "command again to resume.",
            file=sys.stderr,
            flush=True,
        )
        # At once: what this process still wrote could destroy the other's work. The code says "can
        # be resumed", as nothing is wrong with the command (2) or the run (1). Started again, it
        # does no harm: it waits here for up to _LEASE seconds, and is refused with 2 if the other
        # is still at work, or finishes that work if the other has died.
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
