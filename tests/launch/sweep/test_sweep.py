"""Sweeps on this machine: what runs, when, where, and what a signal or a failure does."""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from launch.report import runs
from launch.sweep import __main__ as sweep
from launch.sweep import local

SIX = 'yield from ({"seed": seed} for seed in range(6))'


def run(config: str, workdir, *arguments: str) -> int:
    return sweep.main([f"--config={config}", f"--workdir={workdir}", *arguments])


def logs(workdir) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in workdir.glob("*/log.txt")}


@pytest.mark.usefixtures("stand_in")
def test_all_points_run_on_their_own_devices_and_only_once(tmp_path, write_config, capsys):
    config, workdir = write_config(SIX), tmp_path / "sweep"
    assert run(config, workdir, "--devices=0,1,2,3", "--jobs=2", "--config.steps=3") == 0
    given = [re.findall(r"devices (\S+) first 1", text) for text in logs(workdir).values()]
    assert len(given) == 6 and all(each in (["0,1"], ["2,3"]) for each in given)
    assert len(set(map(tuple, given))) == 2
    assert "[6/6 complete]" in capsys.readouterr().out
    before = logs(workdir)
    assert run(config, workdir, "--jobs=2", "--config.steps=3") == 0
    assert "6 complete; 0 to run" in capsys.readouterr().out
    assert logs(workdir) == before


@pytest.mark.usefixtures("stand_in")
def test_no_more_than_the_jobs_run_at_once_and_no_device_twice(tmp_path, write_config, monkeypatch):
    monkeypatch.setenv("STAND_IN_PAUSE", "0.2")
    most = []
    start = local.Runner._start

    def starting(self, name):
        start(self, name)
        in_use = [child.slot.devices for child in self._running.values()]
        most.append(len(in_use))
        assert len(set(in_use)) == len(in_use)
        assert runs.lock(self._directory / name) is None  # the point has it

    monkeypatch.setattr(local.Runner, "_start", starting)
    assert run(write_config(SIX), tmp_path / "sweep", "--devices=5,7,9") == 0
    assert max(most) == 3


@pytest.mark.usefixtures("stand_in")
def test_a_failed_point_is_reported_and_stops_no_other(tmp_path, write_config, capsys):
    config = write_config('yield from ({"seed": seed} for seed in (13, 1))')
    workdir = tmp_path / "sweep"
    assert run(config, workdir) == 1
    out = capsys.readouterr().out
    assert "seed-13: FAILED with exit code 1" in out and "the loss is not finite" in out
    assert "seed-1: complete" in out and "1 of 2 points complete" in out
    assert [runs.read(workdir / name).state for name in ("seed-13", "seed-1")] == [
        "failed",
        "complete",
    ]
    assert run(config, workdir) == 1
    assert logs(workdir)["seed-13"].count("not finite") == 2
    assert logs(workdir)["seed-1"].count("devices") == 1


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_and_the_same_command_goes_on(
    tmp_path, write_config, monkeypatch, capsys, number
):
    monkeypatch.setenv("STAND_IN_PAUSE", "0.15")
    config, workdir = write_config(SIX), tmp_path / "sweep"

    def interrupt():
        while len(list(workdir.glob("*/metrics.jsonl"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert run(config, workdir, "--jobs=2", "--config.steps=20") == 75
    thread.join()
    out = capsys.readouterr().out
    assert "2 running points asked to write a checkpoint and stop" in out
    assert "0 of 6 points complete" in out and "6 not finished: run the same command again" in out
    assert len(logs(workdir)) == 2  # though seed 0 was done sooner, no other was started
    assert [runs.read(workdir / name).state for name in logs(workdir)] == ["stopped"] * 2

    monkeypatch.setenv("STAND_IN_PAUSE", "0")
    assert run(config, workdir, "--jobs=2", "--config.steps=20") == 0
    for name in ("seed-0", "seed-1"):
        first = re.findall(r"first (\d+)", logs(workdir)[name])
        assert first[0] == "1" and int(first[1]) > 1


@pytest.mark.usefixtures("stand_in")
def test_a_point_that_somebody_else_runs_is_left_alone(tmp_path, write_config, capsys):
    config, workdir = write_config('yield {"seed": 1}'), tmp_path / "sweep"
    (workdir / "seed-1").mkdir(parents=True)
    lock = runs.lock(workdir / "seed-1")
    assert lock is not None
    assert run(config, workdir) == 75
    out = capsys.readouterr().out
    assert "seed-1: left alone, because another process is running it" in out and not logs(workdir)
    assert "1 point in" in out and "0 of 1 point complete" in out
    os.close(lock)
    assert run(config, workdir) == 0


@pytest.mark.usefixtures("stand_in")
def test_the_lock_outlives_a_sweep_that_is_killed(tmp_path):
    lock = runs.lock(tmp_path)
    assert lock is not None
    child = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock]
    )
    os.close(lock)
    assert runs.lock(tmp_path) is None
    child.communicate(b"\n")
    lock = runs.lock(tmp_path)
    assert lock is not None
    os.close(lock)


@pytest.mark.usefixtures("stand_in")
def test_a_sweep_runs_where_the_file_system_has_no_locks(
    tmp_path, write_config, monkeypatch, capsys
):
    def without(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", without)
    assert run(write_config('yield {"seed": 1}'), tmp_path / "sweep") == 0
    assert "launch.lock: this file system has no locks" in capsys.readouterr().err


def test_a_dry_run_prints_the_commands_and_starts_nothing(tmp_path, write_config, capsys):
    config = write_config('yield {"optimizer.new": 3e-4, "seed": 1}')
    workdir = tmp_path / "with space"
    assert run(config, workdir, "--dry_run", "--devices=1,3", "--jobs=1", "--config.steps=5") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        "CUDA_VISIBLE_DEVICES=1,3 TPU_VISIBLE_DEVICES=1,3 TPU_CHIPS_PER_PROCESS_BOUNDS=1,2,1 "
        f"TPU_PROCESS_BOUNDS=1,1,1 {sys.executable} -m save_jax.main --config={config} "
        f"'--workdir={workdir}/optimizer.new-0.0003__seed-1' --config.steps=5 "
        "--config.optimizer.new=0.0003 --config.seed=1"
    )
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices=0,1,2", "--jobs=2"], "--jobs=2 does not divide the 3 devices"),
        (["--devices=0,0"], "expected different indices"),
        (["--jobs=-1"], "expected at least 1"),
        (["--config.nokey=1"], "unknown config key 'nokey'"),
        (["stray"], "unexpected argument stray"),
        (["--config.seed", "3"], "unexpected argument --config.seed"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    tmp_path, write_config, capsys, arguments, message
):
    assert run(write_config('yield {"optimizer.new": 1e-3}'), tmp_path / "s", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "s").exists()


def test_the_real_program_is_what_runs(tmp_path, write_config, capsys):
    body = 'yield {"data.dataset": "msrvtt", "data.dir": "/nowhere"}'
    assert run(write_config(body), tmp_path / "s") == 1
    out = capsys.readouterr().out
    assert "FAILED with exit code 2" in out and "did not find /nowhere/msrvtt" in out
