"""Locks: one process at a time in a directory, on a disk or in a bucket."""

import contextlib
import datetime
import errno
import fcntl
import functools
import json
import math
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from typing import Any, NoReturn

from save_jax import files, processes
from save_jax.errors import NO_SPACE, OutageError, UserError, is_outage
from save_jax.files import Path, is_remote, unreachable, write

LOCK = ".lock"  # in a directory that one process at a time may write to
# Whoever holds a directory rewrites LOCK every _RENEWED seconds; one that stays the same for _LEASE
# seconds was left by a process that has died or stands still. That is longer than JAX takes to end
# the other processes of a run whose first one does not answer (`distributed.HEARTBEAT`).
_RENEWED, _LEASE = 3.0, 45.0
# Who takes a lock over writes nothing else for _SETTLED seconds; who holds one writes nothing when
# it has not looked at it for _FRESH seconds. So of two that take it at once, one notices.
_SETTLED, _FRESH = 1.0, 0.3
# Seconds after which a lock is another writer's: `is_locked` of a reader takes it for an instant.
_INSTANT = 0.3
_ATTEMPTS = 100  # to make a directory and its lock, while others remove theirs
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # goes on while a machine sleeps


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


def read(path: Path) -> dict[str, Any]:
    """Returns what a directory's lock says of its holder; {} where there is no lock.

    Of a file that is no JSON, such as an earlier version's, it is {"holder": what the file says}.

    Raises:
        OSError: it cannot be read; each kind of store has its own exceptions besides.
    """
    text = ""
    for _ in range(3):
        try:
            text = path.read_bytes().decode(errors="replace").strip()
            found = json.loads(text)
        except FileNotFoundError:
            return {}
        except ValueError:
            time.sleep(0.02)  # it may just be written
            continue
        if isinstance(found, dict):
            return found
    return {"holder": text or "a process that left no name"}


class _Lease:
    """A directory's lock, held by this process: a file that is rewritten every few seconds.

    Args:
        directory: what is held.
        path: the file.
    """

    def __init__(self, directory: Path, path: Path):
        self.directory, self._path = directory, path
        since = datetime.datetime.now().isoformat(" ", "seconds")
        self._content: dict[str, Any] = {
            "id": uuid.uuid4().hex,
            "holder": f"process {os.getpid()} on {socket.gethostname()}, since {since}",
            **processes.describe(),
            "beat": 0,
        }
        # On a disk, beats go to the file that this process has made, even where another has put
        # its own in that one's place.
        self._descriptor: int | None = None
        self._made: list[Path] = []  # the folders above the file that were not there
        self._renewed = self._looked = -math.inf
        self._ended = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="lease", daemon=True)

    def take(self, wait: bool, heed: Callable[[], None]) -> None:
        """Takes the lock, as soon as no process has it that shows signs of life; see `hold`.

        Raises:
            UserError: one has it, without `wait`.
        """
        while True:
            left = self._wait_for_holder(wait, heed)
            if not self._claim(left):
                continue
            if left or self._descriptor is None:
                time.sleep(_SETTLED)
                if read(self._path).get("id") != self._content["id"]:
                    continue  # of two that begin at once, the last to write has it
            break
        self._keeper.start()
        _held.append(self)

    def _wait_for_holder(self, wait: bool, heed: Callable[[], None]) -> dict[str, Any]:
        """Returns what a dead holder has left; {} when there is no lock."""
        found, since, said = read(self._path), _now(), False
        while found and processes.is_alive(found) is not False and _now() - since < _LEASE:
            if not said:
                until = "" if wait else f"up to {_LEASE:.0f} s for a sign of life of "
                holder = found.get("holder", "another process")
                print(
                    f"waiting {until or 'for '}{holder}, which holds {self.directory}", flush=True
                )
                said = True
            time.sleep(_RENEWED / 10)
            heed()
            before, found = found, read(self._path)
            if found == before:
                continue
            since = _now()
            if found and found.get("id") == before.get("id") and not wait:
                raise UserError(
                    f"{self.directory} is in use by {found.get('holder')} ({self._path}). Wait "
                    "until it has ended, or stop it, and run the same command again; or use "
                    "another directory."
                )
        return found

    def _claim(self, left: Mapping[str, Any]) -> bool:
        """Says whether the file is this process's now, in place of what another has left."""
        self._renewed = self._looked = _now()
        content = json.dumps(self._content)
        if is_remote(self._path):
            write(self._path, content)
            return True
        self._make_folder()
        if left:
            if read(self._path) != left:
                return False
            self._path.unlink(missing_ok=True)
        self._close()
        try:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except (FileExistsError, FileNotFoundError):  # another was faster, or removed the folder
            return False
        try:
            os.write(self._descriptor, content.encode())
        except OSError:  # a full disk
            self._path.unlink()
            raise
        return True

    def _make_folder(self) -> None:
        """Makes the folder of the file, which others may be removing."""
        made = [folder for folder in self._path.parent.parents if not os.path.exists(folder)]
        self._made = made or self._made
        for left in reversed(range(_ATTEMPTS)):
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                return
            except FileNotFoundError:
                if not left:
                    raise

    def check(self) -> None:
        """Ends the process, with exit code 1, if another has the lock now; before each write.

        Raises:
            OutageError, UserError: that cannot be read, and this lock was not renewed for long.
        """
        if _now() - self._looked <= _FRESH:
            return
        try:
            self._look()
        except Exception as error:  # each kind of store has its own
            if _now() - self._renewed > _LEASE / 2:
                raise unreachable(self._path, error) from error

    def _look(self) -> None:
        now, found = _now(), read(self._path)
        if found.get("id") != self._content["id"]:
            self._lose(found)
        self._looked = now

    def _keep(self) -> None:
        """Renews the lock until it is released."""
        while not self._ended.wait(_RENEWED):
            try:
                self._renew()
            except Exception as error:  # the network comes back, or the run's own writes fail too
                print(f"warning: {self._path} cannot be renewed: {error}", file=sys.stderr)

    def _renew(self) -> None:
        self._look()
        self._content["beat"] += 1
        content = json.dumps(self._content)
        if self._descriptor is not None:
            os.pwrite(self._descriptor, content.encode(), 0)
        else:
            write(self._path, content)
            # Was it stopped in between, for so long that this was another's by then?
            if _now() - self._looked > _SETTLED and _now() - self._renewed > _LEASE:
                self._lose({})
        self._renewed = _now()

    def _lose(self, found: Mapping[str, Any]) -> NoReturn:
        """Ends the process at once: what it still wrote could destroy the other's work.

        No exception would do: files are written when it passes, too.
        """
        print(
            f"error: {self.directory} was taken over by {found.get('holder', 'another process')}, "
            f"because this process did not renew {self._path}: it was stopped, or could not write. "
            "It has ended without writing any more.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def release(self) -> None:
        """Gives the lock back, and removes folders that it was taken in and that are empty."""
        if self in _held:
            _held.remove(self)
            self._ended.set()
            self._keeper.join()
        with contextlib.suppress(Exception):  # then it is taken over after a while
            if read(self._path).get("id") == self._content["id"]:
                self._path.unlink()
        if self._descriptor is not None:
            with contextlib.suppress(OSError):  # not empty
                for folder in (self._path.parent, *self._made):
                    os.rmdir(folder)
        self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


_held: list[_Lease] = []  # by this process


def _now() -> float:
    return time.clock_gettime(_CLOCK)


def _check(where: Path) -> None:
    """Ends the process if a path is in a directory that another process has taken over."""
    for lease in tuple(_held):
        if f"{os.fspath(where)}/".startswith(f"{os.fspath(lease.directory)}/"):
            lease.check()


files.guards.append(_check)


@contextlib.contextmanager
def hold(
    directory: Path,
    *,
    beside: Path | None = None,
    wait: bool = False,
    heed: Callable[[], None] = lambda: None,
) -> Generator[None, None, None]:
    """Keeps every other process from holding a directory meanwhile.

    The lock is a file that says which process holds it, and that this process rewrites every 3
    seconds. One that was left behind is taken over at once if its process was of this host and is
    dead, else when it has stayed the same for 45 seconds.

    A process that finds that its own was taken over, as it was stopped for so long, ends with exit
    code 1. It looks every 3 seconds, and before it writes to the directory by `save_jax.files` or
    calls `files.check`. Left is only what was between that look and the write when it was stopped:
    neither a disk nor a bucket can refuse that.

    Args:
        directory: the directory, which is made on a disk with those above it, and removed again
            with them as far as they stay empty.
        beside: where the lock is, of a directory that may not be made yet; by default `.lock` in
            it.
        wait: wait for another process that holds it, instead of raising.
        heed: called again and again while it waits; what it raises ends that.

    Raises:
        UserError: another process holds it, and the message says which; or it cannot be written to.
        OutageError: the disk, the network or the store fails.
    """
    path = beside if beside is not None else directory / LOCK
    lease = _Lease(directory, path)
    try:
        with _explained(directory, path):
            lease.take(wait, heed)
        yield
    finally:
        lease.release()


@contextlib.contextmanager
def _explained(directory: Path, path: Path) -> Generator[None, None, None]:
    """Raises what prevents a lock as what it is."""
    try:
        yield
    except (UserError, OutageError):
        raise
    except Exception as error:  # each kind of store has its own
        if is_remote(path):
            raise unreachable(path, error) from error
        if not isinstance(error, OSError):
            raise
        if error.errno in NO_SPACE:
            raise OSError(error.errno, error.strerror, str(path)) from error
        if is_outage(error):
            raise OutageError(
                f"{directory} cannot be locked: {error}. When the disk works again, run the same "
                "command again to resume."
            ) from error
        raise UserError(
            f"{directory}: expected a directory to write to, found: {error}. Choose another."
        ) from error
