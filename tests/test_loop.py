"""The loop around the step, with a step that costs nothing: hidden transfers, traces."""

import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from save_jax import files, sharding, stopping, train
from save_jax.checkpoint import Checkpoints, TrainState
from save_jax.meter import Meter, Plan
from save_jax.optimizer import OptimizerConfig
from save_jax.profiling import Trace
from save_jax.progress import Writer
from tests.support import object_store, synthetic
from tests.support.training import BATCH, mesh_of

STEPS = 8
SOUND = {"loss": 1.0, "contrastive": 1.0, "soft_albef": 0.0, "grad_norm": 1.0}


@jax.jit
def traced_step(state, batch):
    scalars = {name: jnp.float32(value) for name, value in SOUND.items()}
    weight = state.trained["w"] + batch.frame_mask.sum()
    return state._replace(step=state.step + 1, trained={"w": weight}), scalars


def loop(workdir, step: Callable = traced_step, *, traced=range(0), first: int = 0, until=STEPS):
    """Trains with a step; returns the last state."""
    mesh, rates = mesh_of(2), OptimizerConfig(total_steps=STEPS)
    numbers, weight = (
        sharding.global_array(np.asarray(x), sharding.replicated(mesh))
        for x in (np.int32(first), np.float32(0))
    )
    state = TrainState(numbers, {"w": weight}, {}, (), (), {})
    training, final = synthetic.training_set(BATCH), {}

    def keep(state, batch):
        final["state"], scalars = step(state, batch)
        return final["state"], scalars

    def batches(start, steps):
        for number, batch in enumerate(synthetic.training_set(BATCH).batches(start, steps), start):
            if number == until:
                raise KeyError("crash")
            yield batch

    plan = Plan(STEPS, 4, BATCH, eval_every=1, checkpoint_every=0, log_every=1)
    checkpoints = Checkpoints(workdir)
    writer = Writer(pathlib.Path(workdir), first)
    try:
        with stopping.StopRequest(mesh) as stop, Trace(traced, checkpoints.workdir, first) as trace:
            train.train(
                state,
                keep,
                training=training._replace(batches=batches),
                evaluate=lambda models, step: None,
                checkpoints=checkpoints,
                meter=Meter(plan, rates, writer, first=first),
                plan=plan,
                stop=stop,
                trace=trace,
            )
    finally:
        checkpoints.close()
        writer.close()
    return final["state"]


def test_the_loop_hides_no_transfer(tmp_path):
    assert int(loop(tmp_path).step) == STEPS


def test_an_array_of_the_host_in_a_step_is_an_error(tmp_path):
    """It would be copied to every device at every step, while they wait."""

    def step(state, batch):
        return traced_step(state, batch._replace(frame_mask=np.ones((BATCH, 3), bool)))

    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        loop(tmp_path, step)


def test_a_number_of_the_host_in_a_step_is_an_error(tmp_path):
    def step(state, batch):
        return traced_step(state._replace(step=state.step + 1), batch)

    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        loop(tmp_path, step)


def traces(workdir) -> list[pathlib.Path]:
    return list(pathlib.Path(workdir).glob("profile/process-0/plugins/profile/*/*.xplane.pb"))


def steps_in(trace: pathlib.Path) -> set[int]:
    """The steps that a trace has."""
    return {
        dict(event.stats)["step_num"]
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    }


@pytest.mark.profiler
def test_the_steps_that_were_asked_for_are_traced(tmp_path, capsys):
    loop(tmp_path, traced=range(3, 6))
    (found,) = traces(tmp_path)
    assert steps_in(found) == {3, 4, 5}
    said = capsys.readouterr().out
    assert f"the trace of config.profile is in {tmp_path}/profile/process-0\n" in said


@pytest.mark.profiler
def test_a_trace_ends_with_the_run(tmp_path):
    with pytest.raises(KeyError, match="crash"):
        loop(tmp_path, traced=range(5, STEPS + 1), until=7)
    (crashed,) = traces(tmp_path)
    assert steps_in(crashed) == {5, 6, 7}  # the last of which found no batch
    loop(tmp_path / "next", traced=range(5, STEPS + 1), first=6)
    (rest,) = traces(tmp_path / "next")
    assert steps_in(rest) == {7, 8}


def test_a_run_that_resumes_after_the_steps_to_trace_says_so(tmp_path, capsys):
    loop(tmp_path, traced=range(2, 5), first=4)
    assert not (tmp_path / "profile").exists()
    said = capsys.readouterr().out
    assert (
        "config.profile = '2:5': no trace is written, because the run resumes after step 4" in said
    )


@pytest.mark.profiler
def test_a_trace_of_a_run_in_a_bucket_is_copied_there():
    store = object_store.register()
    with Trace(range(2, 4), files.path("gs://bucket/run"), 0) as trace:
        assert [trace.turns(step) for step in range(1, 6)] == [False, True, False, True, False]
        trace.turn(2)
        jax.block_until_ready(jnp.ones(3) + 1)
        trace.turn(4)
    found = store.glob("gs://bucket/run/profile/process-0/plugins/profile/*/*.xplane.pb")
    assert len(found) == 1 and store.size(found[0])
