"""A workdir belongs to one job at a time."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from save_jax import main
from tests.support import caching, miniatures, programs, system

WITHIN = 300  # seconds for a job on a busy machine


def prepared(root, out, n_train=5, n_test=3):
    """The miniature MSR-VTT, prepared."""
    from data_pipelines.preparation import prepare
    from data_pipelines.recipe import Recipe

    miniatures.msrvtt(root, n_train=n_train, n_test=n_test)
    recipe = Recipe(image_size=32, fbank_frames=64, max_frames=4)
    prepare("msrvtt", root=str(root), out=str(out), recipe=recipe, workers=1)
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("miniature"), tmp_path_factory.mktemp("prepared"))


def start(data, workdir, program=("-m", "save_jax.main"), **changes) -> subprocess.Popen:
    """Starts training by the command line."""
    changes = caching.CHANGES | {"data.dir": data} | changes
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    return subprocess.Popen(
        [sys.executable, *program, "--config=configs/demo.py", *flags, f"--workdir={workdir}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"XLA_FLAGS": programs.flags()},
    )


# Waits 4 seconds for a sign of life of the process that has the workdir.
IMPATIENT = "import sys; from save_jax import locks, main; locks._LEASE = 4.0; "
IMPATIENT += "sys.exit(main.main(sys.argv))"


def last_checkpoint(workdir) -> int:
    names = (path.name for path in workdir.glob("checkpoints/*"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def wait_for_checkpoint(workdir, after: int, job: subprocess.Popen) -> None:
    end = time.monotonic() + WITHIN
    while last_checkpoint(workdir) <= after:
        assert job.poll() is None and time.monotonic() < end, job.communicate()[0]
        time.sleep(0.2)


@pytest.mark.soak
def test_one_job_has_a_workdir(data, tmp_path):
    """A second one is refused; one that stands still is followed, and writes no more."""
    changes = {"steps": 3000, "checkpoint_every": 50, "log_every": 1, "eval_every": 1000}
    run = tmp_path / "run"
    jobs = [first := start(data, run, **changes)]
    try:
        wait_for_checkpoint(run, 0, first)
        jobs.append(second := start(data, run, **changes))
        said, _ = second.communicate(timeout=WITHIN)
        still_going = first.poll() is None
        first.send_signal(signal.SIGSTOP)
        before = last_checkpoint(run)
        jobs.append(third := start(data, run, ("-c", IMPATIENT), **changes))
        wait_for_checkpoint(run, before, third)
        third.send_signal(signal.SIGTERM)
        third_said, _ = third.communicate(timeout=WITHIN)
        found = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        first.send_signal(signal.SIGCONT)
        first_said, _ = first.communicate(timeout=WITHIN)
    finally:
        for job in jobs:
            job.send_signal(signal.SIGCONT)
            job.kill()
    assert still_going, "the first job should last longer: more steps"
    assert second.returncode == 2, said
    assert f"is in use by process {first.pid} on " in said and "Traceback" not in said
    assert third.returncode == os.EX_TEMPFAIL, third_said
    assert f"life of process {first.pid} on" in third_said and "resuming from" in third_said
    assert first.returncode == 1, first_said
    assert f"error: {run} was taken over by" in first_said
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == found
    assert not (run / ".lock").exists()
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))
    assert (run / "checkpoints" / str(len(steps))).is_dir()


def command(data, workdir, **changes) -> int:
    """Trains by the command, in this process; returns its exit code."""
    changes = caching.CHANGES | {"data.dir": data} | changes
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    return main.main(["main", "--config=configs/demo.py", *flags, f"--workdir={workdir}"])


def test_a_run_resumes_on_the_same_data_wherever_they_are(data, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(data, first)
    assert command(first, tmp_path / "run") == 0
    # As an earlier version has left the workdir.
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    began = config.pop("provenance")["data"]
    path.write_text(json.dumps(config))
    (tmp_path / "run" / "data.json").write_text(json.dumps(began["digests"]))
    # On a faster disk, on more devices, without the weights that it started from.
    first.rename(second)
    changes = {"data.dir": str(second), "eval_batch_size": 16, "init_from": "gone"}
    assert command(second, tmp_path / "run", **changes) == 0
    found = json.loads(path.read_text())
    provenance = found.pop("provenance")
    assert found == config and provenance["data"] == began
    (start,) = provenance["starts"]
    assert (start["step"], start["changed"]) == (5, changes)

    # Other clips to train on in the same place.
    shutil.rmtree(second)
    prepared(tmp_path / "raw", second, n_train=6, n_test=3)
    capsys.readouterr()
    assert command(second, tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "run that began with other data: since then, the split 'test' and the split" in said
    assert f"--config.init_from={tmp_path / 'run'}" in said


def test_a_full_disk_is_one_message_and_what_was_trained_is_resumed(data, tmp_path, capsys):
    system.need("mount", "mount")
    full = tmp_path / "full"
    full.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(full)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can make a file system that is full")
    try:
        assert command(data, full / "run") == 2
        said = capsys.readouterr().err
        assert "No space left on device" in said and str(full) in said and "Make room" in said
        assert "Traceback" not in said
        subprocess.run(["mount", "-o", "remount,size=200m", str(full)], check=True)
        assert command(data, full / "run") == 0
    finally:
        gc.collect()  # with its traceback goes the failed start's map of similarity.npy
        subprocess.run(["umount", str(full)], check=True)
