"""Commands killed at random moments, again and again, end as one that is not: `make soak`.

SOAK_SEED chooses the moments (default: of the clock) and is printed, SOAK_KILLS how many there are.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from save_jax.checkpoint import find

pytestmark = pytest.mark.soak
ROOT = pathlib.Path(__file__).parents[2]
SEED = int(os.environ.get("SOAK_SEED", time.time_ns() % 2**32))
KILLS = int(os.environ.get("SOAK_KILLS", 8))
STEPS = 40
SMALL = ["--image_size=32", "--max_frames=4", "--fbank_frames=128"]


@pytest.fixture(scope="module")
def moments():
    print(f"SOAK_SEED={SEED} SOAK_KILLS={KILLS}")
    return random.Random(SEED)


def environment() -> dict[str, str]:
    """One device, as compiled as ever, whatever conftest.py wants of the tests."""
    return {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}


def command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def seconds(arguments: list[str]) -> float:
    """Runs a command to its end; returns how long that took."""
    began = time.monotonic()
    subprocess.run(arguments, check=True, cwd=ROOT, env=environment())
    return time.monotonic() - began


def survive(arguments: list[str], longest: float, moments: random.Random) -> int:
    """Runs a command, killed at KILLS moments of up to `longest` seconds, then to its end.

    Returns:
        How often SIGKILL met it at work; it may end before.
    """
    met = 0
    for _ in range(KILLS):
        process = subprocess.Popen(arguments, cwd=ROOT, env=environment(), start_new_session=True)
        try:
            code = process.wait(moments.uniform(0, longest))
            assert code == 0, f"it ended by itself with exit code {code}"
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            met += 1
    seconds(arguments)
    return met


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The demo, prepared without interruption, and the seconds from its corpus to its end."""
    out = tmp_path_factory.mktemp("demo")
    seconds(command("data_pipelines.prepare", "demo", f"--out={out}", *SMALL))
    return out


def test_preparation(prepared, tmp_path, moments):
    corpus = f"--root={prepared / 'corpus'}"
    prepare = [*command("data_pipelines.prepare", "demo"), corpus, *SMALL]
    usual = seconds([*prepare, f"--out={tmp_path / 'whole'}"])
    met = survive([*prepare, f"--out={tmp_path / 'killed'}"], usual, moments)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    print(f"preparation: {met} kills, {usual:.0f} s without")


def arrays(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of a run's last checkpoint, the optimiser's state included."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(find(workdir) / "default")
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(value) for path, value in leaves}


def test_training(prepared, tmp_path, moments):
    flags = ["--config=configs/demo.py:save", f"--config.data.dir={prepared}"]
    flags += [f"--config.steps={STEPS}", "--config.checkpoint_every=5"]
    train = command("save_jax.main", *flags)
    usual = seconds([*train, f"--workdir={tmp_path / 'whole'}"])
    met = survive([*train, f"--workdir={tmp_path / 'killed'}"], usual, moments)
    one, other = (arrays(tmp_path / name) for name in ("whole", "killed"))
    assert one.keys() == other.keys() and len(one) > 100
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)
    losses = []
    for name in ("whole", "killed"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        losses.append([(entry["step"], entry["loss"]) for entry in entries if "loss" in entry])
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
    print(f"training: {met} kills, {usual:.0f} s without")
