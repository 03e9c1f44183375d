"""metrics.jsonl survives interruption; durations read as people say them."""

import json
import subprocess
import sys

import pytest

from save_jax.progress import Writer, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0s"), (59.9, "59s"), (60.0, "1m00s"), (185.0, "3m05s"), (7800.0, "2h10m")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def steps(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_going_on_drops_what_will_be_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    writer = Writer(tmp_path, restored_step=1)
    writer.write_scalars(2, {"loss": 1.5})
    writer.close()
    assert steps(path) == [1, 2]
    assert json.loads(path.read_text().splitlines()[1]) == {"step": 2, "loss": 1.5}
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_a_run_does_not_import_pytorch(tmp_path):
    """It would take 3 s and 200 MB; a program that imports it afterwards gets it."""
    program = (
        "import pathlib, sys; from save_jax.progress import Writer\n"
        f"Writer(pathlib.Path({str(tmp_path)!r}), None).write_scalars(1, {{'loss': 1.0}})\n"
        "assert 'torch' not in sys.modules; import torch; torch.zeros(1)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_evaluation_adds_and_drops_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n')
    writer = Writer(tmp_path, restored_step=None)
    writer.write_scalars(5, {"eval/t2v/R1": 10.0})
    writer.close()
    assert steps(path) == [5, 5]
