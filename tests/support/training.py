"""Runs the training loop on the synthetic data: for tests, in this process or in one of its own.

As a program, `python -m tests.support.training WORKDIR MOMENT` trains and kills itself with SIGKILL
at a moment: "never", "step" (in the middle of an epoch), "write" (a checkpoint is written but not
yet committed) or "evaluation" (its files half written). At the moment "term" it is sent SIGTERM
instead; at "error" and "mistake" it raises an error of its own. With `COORDINATOR PROCESSES ID`
after them, it is one process of several. With `--vision` before them, the model is CLIP4Clip, for
tests of what does not depend on it: it compiles in half the time. The exit code is 75 when it was
interrupted, as the main program's.
"""

import dataclasses
import functools
import os
import pathlib
import signal
import sys

import jax

from save_jax import (
    checkpoint,
    distributed,
    evaluate,
    optimizer,
    retention,
    sharding,
    stopping,
    train,
)
from save_jax.checkpoint import Checkpoints
from save_jax.errors import UserError
from save_jax.evaluations import Evaluations
from save_jax.following import Trainers, Watch
from save_jax.meter import Meter, Plan
from save_jax.models.save import SAVEConfig
from save_jax.objectives import LossConfig
from save_jax.optimizer import OptimizerConfig
from save_jax.progress import Writer
from tests.support import synthetic

RATES = OptimizerConfig(clip=1e-3, clip_stem=1e-3, ast_norm=1e-3, new=1e-3, total_steps=12)
FIVE = dataclasses.replace(RATES, total_steps=5)
VISION = dataclasses.replace(synthetic.MODEL, sound_weight=0.0, speech_weight=0.0)
BATCH = 8
MATRIX = 10_000  # entries of similarity.npy, which every evaluation here is below


def mesh_of(devices: int) -> jax.sharding.Mesh:
    return sharding.make_mesh({"data": -1}, jax.devices()[:devices])


def program(rates: OptimizerConfig, devices: int, model: SAVEConfig = synthetic.MODEL):
    """Returns a mesh, a fresh state on it, and the compiled step and evaluator for them.

    Rates and schedule are the state's: what trains, the mesh and the model decide what is compiled,
    and every test of them shares it.
    """
    trains = {group: float(bool(rates.rate(group))) for group in optimizer.GROUPS}
    same = dataclasses.replace(rates, **trains, weight_decay=0.0, total_steps=1)
    mesh, state, step, evaluator = _program(same, devices, model)
    numbers = train.place_hyperparameters(rates, mesh)
    return mesh, state._replace(hyperparameters=numbers), step, evaluator


@functools.cache
def _program(rates: OptimizerConfig, devices: int, model: SAVEConfig):
    mesh = mesh_of(devices)
    graphdef, state = train.create_state(model, rates, 0, mesh)
    loss = LossConfig(soft_albef_weight=float(bool(model.sound_weight)))
    step = jax.jit(train.make_train_step(graphdef, rates, loss, mesh))
    return mesh, state, step, evaluate.Evaluator(graphdef, mesh, BATCH, 0.5, MATRIX)


def run(
    workdir,
    *,
    stop_after: int | None = None,
    rates=RATES,
    data=None,
    devices=1,
    eval_every=1,
    model=synthetic.MODEL,
):
    """Trains in `workdir`, going on from what it holds; returns the final state.

    With `stop_after`, the data ends with an exception after that many steps, as a crash would.
    """
    mesh, state, step_function, evaluator = program(rates, devices, model)
    training = synthetic.training_set(BATCH, data)
    plan = Plan(
        total_steps=rates.total_steps,
        steps_per_epoch=training.steps_per_epoch,
        batch_size=BATCH,
        eval_every=eval_every,
        checkpoint_every=3,
        log_every=1,
    )
    kept = retention.Retention(pathlib.Path(workdir), "test", plan.evaluates, 5)
    checkpoints = Checkpoints(workdir, kept)
    step = checkpoints.latest_step()
    if step is not None:
        state = checkpoints.restore(step, state)
    if stop_after is not None:
        inner = training.batches

        def crashing(start, steps):
            for number, batch in enumerate(inner(start, steps), start):
                if number == stop_after:
                    raise KeyError("crash")
                yield batch

        training = training._replace(batches=crashing)
    writer = Writer(workdir, restored_step=step or 0)
    final = {}

    def keep(state, batch):
        state, scalars = step_function(state, batch)
        final["state"] = state
        return state, scalars

    try:
        with stopping.StopRequest(mesh) as stop, distributed.exit_if_peer_lost():
            data = synthetic.evaluation_set(BATCH)
            evaluations = Evaluations(workdir, plan, evaluator, data, None, writer, stop)
            like = checkpoint.abstract({**state.trained, **state.frozen})
            train.train(
                state,
                keep,
                training=training,
                evaluate=Trainers(evaluations, Watch(workdir), like).evaluate,
                checkpoints=checkpoints,
                meter=Meter(plan, rates, writer, first=step or 0),
                plan=plan,
                stop=stop,
            )
    finally:
        checkpoints.wait()
        writer.close()
        checkpoints.close()
    return final["state"]


def fail() -> None:
    """Raises a fault of the program, in words that a lost connection has too."""
    raise ValueError("the connection of two peers: coordinates that are unavailable")


def mistake() -> None:
    """Raises what this process alone finds wrong with what it was given."""
    raise UserError("/data/a: no such file on this host")


def die(*args, **kwargs) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str) -> None:
    """Arranges for SIGKILL at a moment."""
    ends = {"step": die, "error": fail, "mistake": mistake}
    ends["term"] = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
    if moment in ends:
        original = synthetic.training_set

        def dying(*args, **kwargs):
            training = original(*args, **kwargs)

            def batches(start, steps):
                for number, batch in enumerate(training.batches(start, steps), start):
                    if number == 10:
                        ends[moment]()
                    yield batch

            return training._replace(batches=batches)

        synthetic.training_set = dying
    elif moment == "write":
        from orbax.checkpoint._src.path import atomicity

        finalize = atomicity.AtomicRenameTemporaryPath.finalize

        async def dying_finalize(self, *args, **kwargs):
            if "6" in pathlib.Path(self.get_final()).name:
                die()
            return await finalize(self, *args, **kwargs)

        atomicity.AtomicRenameTemporaryPath.finalize = dying_finalize
    elif moment == "evaluation":
        evaluate.np.savez = die  # similarity.npy is written, the names of its rows are not
    elif moment not in ("never", "five"):
        raise ValueError(moment)


def main(*arguments: str) -> int:
    model = synthetic.MODEL
    if arguments[0] == "--vision":
        model, arguments = VISION, arguments[1:]
    workdir, moment, *others = arguments
    if others:
        coordinator, count, number = others
        distributed.join(coordinator, int(count), int(number))
    arm(moment)
    with distributed.exit_alone():
        final = run(
            pathlib.Path(workdir),
            devices=jax.device_count(),
            rates=rates_of(moment),
            model=model,
        )
    return 0 if int(final.step) == rates_of(moment).total_steps else os.EX_TEMPFAIL


def rates_of(moment: str) -> OptimizerConfig:
    """Five steps are enough where only the numbers are asked for."""
    return FIVE if moment == "five" else RATES


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
