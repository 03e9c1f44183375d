"""A workdir belongs to one job at a time."""

import json
import os
import subprocess
import sys
import time

import pytest

from tests.support import caching, miniatures, programs

WITHIN = 300  # seconds for a job on a busy machine


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The miniature MSR-VTT, prepared."""
    from data_pipelines.preparation import prepare
    from data_pipelines.recipe import Recipe

    root, out = tmp_path_factory.mktemp("miniature"), tmp_path_factory.mktemp("prepared")
    miniatures.msrvtt(root, n_train=5, n_test=3)
    recipe = Recipe(image_size=32, fbank_frames=64, max_frames=4)
    prepare("msrvtt", root=str(root), out=str(out), recipe=recipe, workers=1)
    return out


def start(data, workdir, **changes) -> subprocess.Popen:
    """Starts training by the command line."""
    changes = caching.CHANGES | {"data.dir": data} | changes
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "save_jax.main", "--config=configs/demo.py", *flags,
         f"--workdir={workdir}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"XLA_FLAGS": programs.flags()},
    )  # fmt: skip


def test_the_second_job_on_a_workdir_is_refused(data, tmp_path):
    changes = {"steps": 3000, "checkpoint_every": 50, "log_every": 1, "eval_every": 1000}
    first = start(data, tmp_path / "run", **changes)
    try:
        end = time.monotonic() + WITHIN
        while not list(tmp_path.glob("run/checkpoints/*/default")):
            assert first.poll() is None and time.monotonic() < end, first.communicate()[0]
            time.sleep(0.2)
        second = start(data, tmp_path / "run", **changes)
        said, _ = second.communicate(timeout=WITHIN)
        still_going = first.poll() is None
        first.send_signal(15)
        first_said, _ = first.communicate(timeout=WITHIN)
    finally:
        first.kill()
    assert still_going, "the first job should last longer: more steps"
    assert second.returncode == 2, said
    assert f"is in use by process {first.pid} on " in said and "Traceback" not in said
    assert first.returncode == os.EX_TEMPFAIL, first_said
    assert not (tmp_path / "run" / ".lock").exists()
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))
    assert (tmp_path / "run" / "checkpoints" / str(len(steps))).is_dir()
