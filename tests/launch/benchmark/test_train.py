"""The benchmark of the training step, at a size that says nothing about speed."""

import json

import jax
import pytest

from launch.benchmark import __main__ as benchmark

SMALL = [
    "train", "--config=configs/demo.py", "--batch=8", "--steps=1", "--turns=1",
    "--set", "model.fusion_layers=1",
]  # fmt: skip


def test_both_steps_are_measured_in_one_run(capsys):
    assert benchmark.main(SMALL) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert result["batch"] == 8 and result["flops"] > 1e8
    assert result["clips_per_second"] == pytest.approx(8 / result["step_seconds"])
    ratio = result["torch_step_seconds"] / result["step_seconds"]
    assert result["ratio_to_torch"] == pytest.approx(ratio)
    assert "PyTorch" in out and "GFLOP per step" in out


def test_products_are_as_exact_as_a_runs(capsys):
    """Else a GPU would be timed in TF32, and a TPU in bfloat16, where a run takes float32."""
    before = jax.config.values["jax_default_matmul_precision"]
    try:
        jax.config.update("jax_default_matmul_precision", None)
        assert benchmark.main([*SMALL, "--no_torch"]) == 0
        assert jax.config.values["jax_default_matmul_precision"] == "highest"
    finally:
        jax.config.update("jax_default_matmul_precision", before)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps=0"], "at least 1"),
        (["--set", "modle=1"], "modle"),
        (["--config=configs/demo.py:clip4clip", "--batch=8"], "--no_torch"),
        (["--reference=absent.py"], "absent.py, which does not exist: run this in a clone"),
    ],
)
def test_mistakes_are_named(capsys, flags, message):
    assert benchmark.main([*SMALL, *flags]) == 2
    assert message in capsys.readouterr().err
