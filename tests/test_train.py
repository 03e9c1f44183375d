"""The step and the loop: device count, batch order, interruption, breakdown, resumption."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from save_jax import optimizer, sharding, train
from save_jax.checkpoint import Checkpoints, load_parameters
from save_jax.errors import NonFiniteLossError
from save_jax.objectives import LossConfig
from save_jax.optimizer import OptimizerConfig
from tests.support import synthetic
from tests.support.training import BATCH, FIVE, RATES, VISION, mesh_of, program, run


def lines(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir) -> list[float]:
    return [line["loss"] for line in lines(workdir) if "loss" in line]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of twelve steps that nothing happens to: its workdir, and its final state."""
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, run(workdir)


def assert_identical(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_five_steps_agree_on_one_and_eight_devices(tmp_path):
    state_of_one = run(tmp_path / "1", rates=FIVE)
    state_of_eight = run(tmp_path / "8", rates=FIVE, devices=8)
    one, eight = losses(tmp_path / "1"), losses(tmp_path / "8")
    assert len(one) == 5 and one[0] != one[4]
    np.testing.assert_allclose(one, eight, atol=1e-5)
    assert_close(state_of_one.trained, state_of_eight.trained)


def test_a_run_goes_on_with_another_number_of_devices(tmp_path):
    straight = run(tmp_path / "straight", rates=FIVE)
    with pytest.raises(KeyError):
        run(tmp_path / "moved", rates=FIVE, stop_after=4, devices=8)
    moved = run(tmp_path / "moved", rates=FIVE)
    assert [x["step"] for x in lines(tmp_path / "moved") if "loss" in x] == [1, 2, 3, 4, 5]
    assert_close(straight.trained, moved.trained)


def assert_close(a, b):
    for name, value in a.items():
        np.testing.assert_allclose(np.asarray(b[name]), value, atol=1e-5, err_msg=name)


def test_step_does_not_depend_on_batch_order():
    mesh, state, step, _ = program(RATES, 1)
    batch = synthetic.clips(0, BATCH)
    shuffled = synthetic.rows(batch, np.random.default_rng(0).permutation(BATCH))
    assert list(shuffled.index) != list(batch.index)
    (a, one), (b, other) = (step(state, sharding.put_batch(x, mesh)) for x in (batch, shuffled))
    assert float(one["loss"]) == pytest.approx(float(other["loss"]), abs=1e-5)
    assert float(one["grad_norm"]) == pytest.approx(float(other["grad_norm"]), rel=1e-4)
    assert a.step == b.step == 1


def test_a_sweep_of_rates_has_one_step():
    """Its points are processes of their own, which share the cache of compiled programs."""
    mesh, batch = mesh_of(1), synthetic.clips()

    def step(rates: OptimizerConfig) -> str:
        structure, state = train.abstract_state(synthetic.MODEL, rates, mesh)
        step = train.make_train_step(structure, rates, LossConfig(), mesh)
        return jax.jit(step).lower(state, batch).as_text()

    other = dataclasses.replace(RATES, new=2e-3, query_tokens=1e-3, weight_decay=0.1)
    assert step(RATES) == step(dataclasses.replace(other, total_steps=7))
    assert step(RATES) != step(
        dataclasses.replace(RATES, clip=0.0)
    )  # what trains is of the program


def test_frozen_parameters_do_not_move_and_others_do(straight):
    _, before, _, _ = program(RATES, 1)
    _, after = straight
    assert_identical(before.frozen, after.frozen)
    assert before.frozen and all(optimizer.group_of(k) == "ast" for k in before.frozen)
    still = [
        k
        for k, v in before.trained.items()
        if np.array_equal(np.asarray(v), np.asarray(after.trained[k]))
    ]
    assert not still


def test_logit_scale_never_exceeds_ln_100():
    mesh, state, step, _ = program(RATES, 1)
    scale = jax.device_put(np.float32(9.0), state.trained["clip.logit_scale"].sharding)
    state = state._replace(trained={**state.trained, "clip.logit_scale": scale})
    state, _ = step(state, sharding.put_batch(synthetic.clips(0, BATCH), mesh))
    assert float(state.trained["clip.logit_scale"]) == pytest.approx(math.log(100))


@pytest.fixture(scope="module", params=["--vision", pytest.param("", marks=pytest.mark.soak)])
def uninterrupted(tmp_path_factory, request):
    """A model's flag, and the parameters that its run in a process of its own ends with."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    assert process(workdir, "never", request.param) == 0
    return request.param, final_parameters(workdir, request.param)


def process(workdir, moment: str, model: str) -> int:
    # All processes run one program: compiling it once is enough.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.run(
        [sys.executable, "-m", "tests.support.training", *model.split(), str(workdir), moment],
        check=False,
        capture_output=True,
        env=os.environ | cache,
    ).returncode


def final_parameters(workdir, model: str) -> dict[str, np.ndarray]:
    like = program(RATES, 1, VISION if model else synthetic.MODEL)[1]
    step, params = load_parameters(workdir, {**like.trained, **like.frozen})
    assert step == RATES.total_steps
    return params


# Each comes to its moment from where the one before has left off.
KILLS = ("write", "evaluation", "step")


@pytest.mark.parametrize(
    "moments",
    [KILLS, *(pytest.param((moment,), marks=pytest.mark.soak) for moment in KILLS)],
    ids="+".join,
)
def test_a_killed_run_goes_on_bit_identically(tmp_path, uninterrupted, moments):
    model, expected = uninterrupted
    for moment in moments:
        assert process(tmp_path, moment, model) == -signal.SIGKILL
        if moment == "write":
            assert list((tmp_path / "checkpoints").glob("*tmp*")), "killed too late: nothing open"
    assert process(tmp_path, "never", model) == 0
    assert_identical(expected, final_parameters(tmp_path, model))
    assert [x["step"] for x in lines(tmp_path) if "loss" in x] == list(range(1, 13))


@pytest.mark.parametrize("crash", [2, 5, 10])
def test_a_crashed_run_goes_on_bit_identically(tmp_path, straight, crash):
    with pytest.raises(KeyError):
        run(tmp_path, stop_after=crash)
    workdir, state = straight
    assert_identical(state, run(tmp_path))
    assert [x["step"] for x in lines(workdir)] == [x["step"] for x in lines(tmp_path)]
    assert losses(workdir) == losses(tmp_path)


def test_a_broken_loss_stops_names_the_clips_and_keeps_the_checkpoint(tmp_path):
    data = synthetic.clips()
    poisoned = data._replace(teacher_video=data.teacher_video.copy())
    poisoned.teacher_video[13] = np.nan
    poisoned = poisoned._replace(has_audio=np.ones(synthetic.CLIPS, bool))
    with pytest.raises(NonFiniteLossError, match=r"step \d+: (loss|grad_norm) = nan(.|\n)*clip13"):
        run(tmp_path, data=poisoned)
    assert all(math.isfinite(loss) for loss in losses(tmp_path))


def test_a_broken_step_never_reaches_a_checkpoint(tmp_path):
    wild = OptimizerConfig(**{**vars(RATES), "new": 1e30, "query_tokens": 1e30})
    with pytest.raises(NonFiniteLossError, match=r"is intact|no checkpoint"):
        run(tmp_path, rates=wild, eval_every=100)
    checkpoints = Checkpoints(tmp_path)
    for step in [checkpoints.latest_step()] if checkpoints.latest_step() else []:
        restored = checkpoints.restore(step, program(wild, 1)[1])
        assert all(np.isfinite(v).all() for v in restored.trained.values())


def test_evaluation_is_written_as_promised(straight):
    workdir, _ = straight
    folders = sorted(int(p.name) for p in (workdir / "evaluation").iterdir())
    assert folders == [4, 8, 12]
    last = workdir / "evaluation" / "12"
    result = json.loads((last / "metrics.json").read_text())
    assert set(result["t2v"]) == {"R1", "R5", "R10", "MdR", "MnR", "SumR"}
    assert result["groups"]["sound"]["queries"] == 7
    assert result["protocol"] == {
        "split": "test",
        "captions": 15,
        "videos": 11,
        "videos_with_captions": 11,
        "selection": "after epoch 3 (the last step)",
        "ties": "count against the model",
        "v2t": "the best of each video's captions",
        "checkpoint": "checkpoints/12",
    }
    assert np.load(last / "similarity.npy").shape == (15, 11)
    assert (last / "captions.csv").read_text().splitlines()[0] == "caption,video_id,group"
    assert len((last / "videos.csv").read_text().splitlines()) == 12


def test_best_and_latest_checkpoints_are_kept(straight):
    workdir, _ = straight
    kept = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    sums = {
        step: json.loads((workdir / f"evaluation/{step}/metrics.json").read_text())["t2v"]["SumR"]
        for step in (4, 8, 12)
    }
    assert 12 in kept and max(sums, key=sums.get) in kept and len(kept) <= 3
