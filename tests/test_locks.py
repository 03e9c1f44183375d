"""Locks on a disk, leases in a bucket."""

import errno
import fcntl
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from save_jax import files, locks
from save_jax.errors import OutageError, UserError
from tests.support import object_store
from tests.support.object_store import HttpError


@pytest.fixture
def store():
    return object_store.register()


@pytest.fixture(autouse=True)
def quick_lease(monkeypatch):
    monkeypatch.setattr(locks, "_RENEWED", 0.1)
    monkeypatch.setattr(locks, "_LEASE", 1.0)
    monkeypatch.setattr(locks, "_SETTLED", 0.2)


@pytest.mark.parametrize("method", ["_open", "open"])
def test_a_store_that_fails_as_a_directory_is_taken(store, monkeypatch, method):
    where = files.path("gs://bucket/run")

    def fail(*arguments, **options):
        raise HttpError(503)

    monkeypatch.setattr(object_store.ObjectStore, method, fail)
    with pytest.raises(OutageError, match=r"gs://bucket/run/\.lock cannot"), locks.hold(where):
        pass


def test_a_lock_that_its_last_holder_removed_is_taken_anew(tmp_path):
    """What waited got a lock on a file that is not there any more, as anybody's second would."""
    path, waited = tmp_path / "lock", []
    first = locks.lock(path)
    assert locks.lock(path) is None
    waiting = threading.Thread(target=lambda: waited.append(locks.lock(path, wait=True)))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive() and not waited
    path.unlink()
    os.close(first)
    waiting.join(10)
    assert path.exists() and locks.lock(path) is None  # the one that waited has it
    os.close(waited[0])
    os.close(locks.lock(path))


def test_a_reader_that_asks_for_an_instant_keeps_nobody_off(tmp_path, monkeypatch):
    """What `is_locked` takes to find out is gone by the next attempt."""
    path = tmp_path / "launch.lock"
    path.touch()  # as a run that was killed leaves it
    reader = open(path, "rb")  # noqa: SIM115, closed below
    fcntl.flock(reader, fcntl.LOCK_SH)
    monkeypatch.setattr(time, "sleep", lambda _: reader.close())
    descriptor = locks.lock(path)
    assert descriptor is not None and locks.is_locked(path)
    os.close(descriptor)


def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, capsys):
    def without(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    for _ in range(2):
        os.close(locks.lock(tmp_path / "lock"))
    with locks.hold(tmp_path / "run"):  # which needs none
        pass
    said = capsys.readouterr().err
    assert said.count("this file system has no locks") == 1 and f"{tmp_path}/lock" in said


HOLD = """
import sys
from save_jax import files, locks
locks._RENEWED = 0.1
with locks.hold(files.path(sys.argv[1])): input()
"""


def test_a_directory_is_held_by_one_process(tmp_path):
    with locks.hold(tmp_path / "run"):
        with (
            pytest.raises(UserError, match=f"run is in use by process {os.getpid()} on"),
            locks.hold(tmp_path / "run"),
        ):
            pass
        (tmp_path / "run" / "config.json").touch()
    with locks.hold(tmp_path / "run"):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_nothing_is_left_of_a_directory_that_was_not_written_to(tmp_path):
    with locks.hold(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()


def test_a_lock_ends_with_its_process(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE)
    while not (tmp_path / ".lock").exists() or not (tmp_path / ".lock").read_text():
        time.sleep(0.05)
    with pytest.raises(UserError, match=f"process {holder.pid} on"), locks.hold(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with locks.hold(tmp_path):
        pass


def test_a_directory_that_is_made_later_is_held_by_a_file_beside_it(tmp_path):
    directory, lock = tmp_path / "out" / "1.0.0", tmp_path / "out" / "1.0.0.lock"
    with locks.hold(directory, beside=lock):
        assert os.listdir(lock.parent) == ["1.0.0.lock"]
        with pytest.raises(UserError, match=r"1\.0\.0 is in use by .*1\.0\.0\.lock"):
            locks.hold(directory, beside=lock).__enter__()
        directory.mkdir()
    assert os.listdir(lock.parent) == ["1.0.0"]


def test_a_lock_is_left_to_another_process_that_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_RENEWED", 60.0)  # it has not noticed yet
    with locks.hold(tmp_path):
        (tmp_path / ".lock").unlink()
        (tmp_path / ".lock").write_text('{"id": "y", "holder": "process 8 on pod-1"}')
    assert "process 8 on pod-1" in (tmp_path / ".lock").read_text()


def test_a_process_may_wait_for_the_one_that_holds_a_directory(tmp_path, capfd):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE)
    while not (tmp_path / ".lock").exists() or not (tmp_path / ".lock").read_text():
        time.sleep(0.05)
    threading.Timer(0.5, holder.communicate, [b"\n"]).start()
    with locks.hold(tmp_path, wait=True):
        assert holder.wait() == 0
    assert f"waiting for process {holder.pid} on" in capfd.readouterr().out


def test_where_no_directory_can_be_made_there_is_an_end():
    with pytest.raises(UserError, match="/proc/run: expected a directory to write to, found"):
        locks.hold(pathlib.Path("/proc/run")).__enter__()


@pytest.mark.parametrize(("number", "error"), [(errno.EIO, OutageError), (errno.EROFS, UserError)])
def test_a_disk_that_fails_as_a_directory_is_taken(tmp_path, monkeypatch, number, error):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(error, match=f"{tmp_path}.*{os.strerror(number)}"), locks.hold(tmp_path):
        pass


def test_a_bucket_is_held_by_one_process(store):
    where = files.path("gs://bucket/run")
    with locks.hold(where):
        with (
            pytest.raises(UserError, match=f"run is in use by process {os.getpid()} on"),
            locks.hold(where),
        ):
            pass
        time.sleep(0.5)
    assert not store.store
    with locks.hold(where):
        pass


def test_a_lease_that_was_left_behind_is_taken_over(store, capsys):
    where = files.path("gs://bucket/run")
    files.write(where / locks.LOCK, '{"id": "x", "holder": "process 7 on pod-0", "beat": 3}')
    with locks.hold(where):
        said = capsys.readouterr().out
        assert f"for a sign of life of process 7 on pod-0, which holds {where}" in said
    assert not store.store


def test_a_lease_whose_holder_is_ending_is_waited_for(store):
    where, began = files.path("gs://bucket/run"), time.monotonic()
    files.write(where / locks.LOCK, '{"id": "x", "holder": "pod-0", "beat": -1}')
    ending = threading.Timer(0.3, (where / locks.LOCK).unlink)
    ending.start()
    with locks.hold(where):
        assert time.monotonic() - began < 1.0
    ending.join()


def test_a_bucket_may_be_waited_for_as_long_as_it_takes(store):
    """Longer than a lease lasts, for it is renewed."""
    where = files.path("gs://bucket/run")
    lock, waited = where / locks.LOCK, []

    def wait() -> None:
        with locks.hold(where, wait=True):
            waited.append(True)

    files.write(lock, '{"id": "x", "holder": "process 7 on pod-0", "beat": 0}')
    waiting = threading.Thread(target=wait)
    waiting.start()
    for beat in range(20):
        files.write(lock, f'{{"id": "x", "holder": "process 7 on pod-0", "beat": {beat}}}')
        time.sleep(0.1)
    assert not waited
    lock.unlink()
    waiting.join(10)
    assert waited and not store.store


def test_of_two_that_begin_at_once_one_has_the_bucket(store, monkeypatch, capsys):
    where, written = files.path("gs://bucket/run"), []

    def slow_write(path, text):
        write(path, text)
        if not written:  # another process writes its own right after
            written.append(True)
            write(path, '{"id": "y", "holder": "process 8 on pod-1", "beat": 0}')

    write = locks.write
    monkeypatch.setattr(locks, "write", slow_write)
    with locks.hold(where):  # once the other, which does not renew it, counts as dead
        assert written and json.loads((where / locks.LOCK).read_text())["id"] != "y"
    assert "a sign of life of process 8 on pod-1, which holds" in capsys.readouterr().out


def test_a_process_whose_lease_was_taken_over_ends(tmp_path):
    """It must not write any more, at once. Its exit code says that somebody should look."""
    program = f"""
import time
from save_jax import files, locks
from tests.support import object_store
object_store.register()
locks._RENEWED, locks._SETTLED = 0.1, 0.1
where = files.path("gs://bucket/run")
with locks.hold(where):
    files.write(where / locks.LOCK, '{{"id": "z", "holder": "process 9 on pod-2"}}')
    time.sleep(30)
    open({str(tmp_path / "late")!r}, "w")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "was taken over by process 9 on pod-2" in done.stderr
    assert not (tmp_path / "late").exists()


def test_a_file_in_the_place_of_a_directory_is_named(tmp_path):
    (tmp_path / "run").touch()
    with (
        pytest.raises(UserError, match=r"run: expected a directory to write to"),
        locks.hold(tmp_path / "run"),
    ):
        pass
