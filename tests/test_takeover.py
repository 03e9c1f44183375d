"""A lock whose holder has died or stands still is taken over, and its holder writes no more."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from save_jax import files, locks, processes
from save_jax.errors import UserError
from tests.support import object_store

# Holds argv[1] with short times, in seconds; then runs what argv[2] says.
HOLDER = """
import sys, time
from save_jax import files, locks
from tests.support import object_store
object_store.share(sys.argv[3])
locks._RENEWED, locks._LEASE, locks._SETTLED, locks._FRESH = 0.2, 2.0, 0.4, 0.1
where = files.path(sys.argv[1])
with locks.hold(where):
    print("held", flush=True)
    exec(sys.argv[2])
"""
WRITE = """
for number in range(10**6):
    files.write(where / "written", str(number), fsync=False)
    time.sleep(0.05)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in (("_RENEWED", 0.2), ("_LEASE", 2.0), ("_SETTLED", 0.4), ("_FRESH", 0.1)):
        monkeypatch.setattr(locks, name, seconds)


@pytest.fixture
def store(tmp_path):
    """A bucket that processes share."""
    object_store.share(str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def holders(store):
    """Starts processes that hold a directory; they are killed at the end."""
    started = []

    def start(where, then="input()"):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(where), then, str(store)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.communicate()


def held(process) -> None:
    assert process.stdout.readline() == "held\n", process.communicate()


def left(where, **changes) -> None:
    """Leaves the lock of a process that has died on this host, with changes."""
    dead = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    content = {"id": "x", "holder": "process 7", **processes.describe(dead.pid), "beat": 3}
    dead.communicate()
    where.mkdir(parents=True, exist_ok=True)
    (where / locks.LOCK).write_text(json.dumps({**content, **changes}))


def test_a_holder_that_died_on_this_host_is_followed_at_once(tmp_path, holders, monkeypatch):
    monkeypatch.undo()  # by the times that users have
    first = holders(tmp_path)
    held(first)
    first.kill()
    began = time.monotonic()
    with locks.hold(tmp_path):
        assert time.monotonic() - began < 15  # two seconds, and more on a busy machine
    assert not (tmp_path / locks.LOCK).exists()


def test_a_holder_that_died_on_this_host_is_followed_at_once_in_a_bucket(holders, monkeypatch):
    monkeypatch.undo()
    where = files.path("gs://bucket/run")
    first = holders(where)
    held(first)
    first.kill()
    began = time.monotonic()
    with locks.hold(where):
        assert time.monotonic() - began < 15  # two seconds, and more on a busy machine
    assert not (where / locks.LOCK).exists()


def test_a_number_that_another_process_has_now_is_no_holder(tmp_path):
    mine = processes.describe()
    left(tmp_path, pid=mine["pid"], started=mine["started"] - 1)
    began = time.monotonic()
    with locks.hold(tmp_path):
        assert time.monotonic() - began < 1


@pytest.mark.parametrize("other", ["host", "boot", "namespace"])
def test_what_died_elsewhere_is_waited_for_as_long_as_a_heartbeat_may_take(tmp_path, other):
    left(tmp_path, **{other: "elsewhere"})
    began = time.monotonic()
    with locks.hold(tmp_path):
        assert time.monotonic() - began > 2.0


def test_a_heartbeat_that_moves_refuses_at_once_and_names_the_holder(tmp_path, holders):
    first = holders(tmp_path)
    held(first)
    began = time.monotonic()
    with pytest.raises(UserError, match=f"is in use by process {first.pid} on"):
        locks.hold(tmp_path).__enter__()
    assert time.monotonic() - began < 1.5
    assert first.poll() is None


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_a_stopped_holder_is_taken_over_and_writes_no_more(tmp_path, holders, place):
    run = files.path("gs://bucket/run" if place == "bucket" else tmp_path / "run")
    first = holders(run, WRITE)
    held(first)
    while not (run / "written").exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    with locks.hold(run):
        (run / "written").write_text("the successor's")
        before = {path.name for path in run.iterdir()}
        first.send_signal(signal.SIGCONT)
        said = first.communicate(timeout=30)[1]
        assert first.returncode == 1, said
        assert f"run was taken over by process {os.getpid()} on" in said
        assert (run / "written").read_text() == "the successor's"
        assert {path.name for path in run.iterdir()} <= before
    assert not (run / locks.LOCK).exists()


def test_a_stopped_holder_writes_no_more_after_its_successor_has_ended(tmp_path, holders):
    first = holders(tmp_path, WRITE)
    held(first)
    first.send_signal(signal.SIGSTOP)
    with locks.hold(tmp_path):
        (tmp_path / "written").write_text("the successor's")
    first.send_signal(signal.SIGCONT)
    assert "was taken over" in first.communicate(timeout=30)[1] and first.returncode == 1
    assert (tmp_path / "written").read_text() == "the successor's"


def test_a_holder_that_was_stopped_and_is_alone_goes_on(tmp_path, holders):
    """As by Ctrl-Z and fg."""
    first = holders(tmp_path)
    held(first)
    first.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    first.send_signal(signal.SIGCONT)
    time.sleep(0.5)
    assert first.communicate("\n", timeout=30) == ("", "")
    assert first.returncode == 0


@pytest.mark.parametrize("stopped", [False, True])
def test_of_two_that_take_over_at_once_one_has_it(tmp_path, holders, stopped):
    then = "open(where / 'has', 'a').write('x'); time.sleep(2)"
    if stopped:
        first = holders(tmp_path)
        held(first)
        first.send_signal(signal.SIGSTOP)
    else:
        left(tmp_path)
    racing = [holders(tmp_path, then), holders(tmp_path, then)]
    said = [process.communicate(timeout=60)[1] for process in racing]
    assert sorted(process.returncode for process in racing) == [0, 1], said
    refused = next(text for text, process in zip(said, racing, strict=True) if process.returncode)
    assert "is in use by process" in refused  # a UserError, with which a command ends with 2
    assert (tmp_path / "has").read_text() == "x"


def test_what_an_earlier_version_has_left_is_named_and_taken_over(tmp_path, capsys):
    (tmp_path / locks.LOCK).write_text("process 7 on pod-0, since 2020-01-01 00:00:00")
    with locks.hold(tmp_path):
        assert "of process 7 on pod-0, since 2020-01-01 00:00:00, which" in capsys.readouterr().out


COMMIT = """
import pathlib, sys
import jax.numpy as jnp
from save_jax import checkpoint, files, locks
workdir, calls = pathlib.Path(sys.argv[1]), []

def taken(where):
    calls.append(where)
    if len(calls) == 3:  # to begin, to save, to commit
        (workdir / ".lock").write_text('{"id": "y", "holder": "process 8 on pod-1"}')

locks._FRESH, locks._RENEWED = -1.0, 60.0
files.guards.insert(0, taken)
with locks.hold(workdir):
    checkpoints = checkpoint.Checkpoints(workdir)
    tree = {"a": jnp.ones(3)}
    checkpoints.save(checkpoint.TrainState(jnp.int32(1), tree, {}, (), None, {}), 1)
    checkpoints.wait()
    print("committed")
"""


def test_a_checkpoint_is_not_committed_to_what_is_anothers(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", COMMIT, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert f"error: {tmp_path} was taken over by process 8 on pod-1" in done.stderr
    assert not (tmp_path / "checkpoints" / "1").exists()


def test_times_are_such_that_no_two_write(monkeypatch):
    from save_jax import distributed

    monkeypatch.undo()
    assert distributed.HEARTBEAT < locks._LEASE  # a run's other processes have ended by then
    assert 4 * locks._RENEWED < locks._LEASE
    assert 2 * locks._FRESH < locks._SETTLED < 2
