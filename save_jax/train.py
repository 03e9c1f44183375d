"""The training step and the training loop."""

import collections
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from save_jax import (
    evaluate,
    files,
    metrics,
    microbatch,
    objectives,
    optimizer,
    parameters,
    sharding,
)
from save_jax.batch import Batch
from save_jax.checkpoint import DIRECTORY, Checkpoints, TrainState
from save_jax.errors import NonFiniteLossError
from save_jax.models import save
from save_jax.objectives import LossConfig
from save_jax.optimizer import OptimizerConfig
from save_jax.progress import Writer, duration, say

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]

LOG_EACH_UP_TO = 100  # steps; shorter runs log every step


class TrainingSet(NamedTuple):
    """What to train on.

    Attributes:
        batches: (first step, total steps) -> the stream of this process's batches.
        steps_per_epoch: full batches in a pass.
        clip_name: names the clip of a batch's index.
    """

    batches: Callable[[int, int], Iterator[Batch]]
    steps_per_epoch: int
    clip_name: Callable[[int], str]


def _initialise(
    model: save.SAVEConfig, optimizer_config: OptimizerConfig, seed: int
) -> tuple[nnx.GraphDef, Callable[[], TrainState]]:
    """The model's structure, and the function that makes a fresh state."""

    def init() -> TrainState:
        _, params = parameters.split(save.create(model, seed))
        trained, frozen = optimizer.partition(params, optimizer_config)
        opt_state = optimizer.make_optimizer(optimizer_config).init(trained)
        return TrainState(jnp.zeros((), jnp.int32), trained, frozen, opt_state)

    graphdef, _ = parameters.split(nnx.eval_shape(lambda: save.create(model, seed)))
    return graphdef, init


def abstract_state(
    model: save.SAVEConfig, optimizer_config: OptimizerConfig, mesh: jax.sharding.Mesh
) -> tuple[nnx.GraphDef, TrainState]:
    """The shapes of a state, and where its arrays lie; nothing is computed."""
    graphdef, init = _initialise(model, optimizer_config, seed=0)
    shapes = jax.eval_shape(init)
    return graphdef, jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        shapes,
        sharding.tree_shardings(shapes, mesh),
    )


def create_state(
    model: save.SAVEConfig, optimizer_config: OptimizerConfig, seed: int, mesh: jax.sharding.Mesh
) -> tuple[nnx.GraphDef, TrainState]:
    """A fresh state on the mesh; a function of the seed only, not of the mesh."""
    graphdef, init = _initialise(model, optimizer_config, seed)
    places = sharding.tree_shardings(jax.eval_shape(init), mesh)
    return graphdef, jax.jit(init, out_shardings=places)()  # made where they will live


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer_config: OptimizerConfig,
    loss_config: LossConfig,
    mesh: jax.sharding.Mesh,
    micro_batch: int = 0,
) -> TrainStep:
    """The training step, to be compiled: (state, global batch) -> (state, scalars).

    The gradient is taken of the trained parameters only: a frozen encoder keeps no activations.

    Args:
        graphdef: the model's structure.
        optimizer_config: rates and schedule.
        loss_config: constants of the losses.
        mesh: devices.
        micro_batch: clips, over all devices, that are encoded at a time; 0 = all of the batch. The
            losses are of the whole batch either way, and so is the gradient; less memory is paid
            for with a second forward pass of what trains (gradient caching, `save_jax.microbatch`).
    """
    tx = optimizer.make_optimizer(optimizer_config)

    def loss_fn(
        trained: parameters.Parameters, frozen: parameters.Parameters, batch: Batch
    ) -> tuple[jax.Array, objectives.Losses]:
        params = {
            # Stacked ones are put together layer by layer, where they are used.
            name: x if parameters.STACKED in name else sharding.put_together(x)
            for name, x in {**trained, **frozen}.items()
        }
        model: save.SAVE = parameters.merge(graphdef, params)
        count = len(batch.index) // micro_batch if micro_batch else 1
        # The model leaves the teacher alone.
        inputs = batch._replace(teacher_video=None, teacher_audio=None)
        if count > 1:
            inputs = _encode_frozen(model, trained, inputs, count)
        text, video = microbatch.join(microbatch.map_blocks(model, inputs, count))
        usable = batch.has_audio & batch.has_teacher if loss_config.soft_albef_weight else None
        losses = objectives.losses(
            *(text, video, batch.teacher_video, batch.teacher_audio, usable),
            model.clip.logit_scale[...],
            loss_config,
            mesh.size,
        )
        return losses.total, losses

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        with sharding.on_mesh(mesh):
            grads, losses = jax.grad(loss_fn, has_aux=True)(state.trained, state.frozen, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        if "clip.logit_scale" in trained:
            trained["clip.logit_scale"] = jnp.minimum(
                trained["clip.logit_scale"], optimizer.MAX_LOGIT_SCALE
            )
        scalars = {
            "loss": losses.total,
            "contrastive": losses.contrastive,
            "soft_albef": losses.soft_albef,
            "grad_norm": optimizer.global_norm(grads),
        }
        return TrainState(state.step + 1, trained, state.frozen, opt_state), scalars

    return train_step


def _encode_frozen(
    model: save.SAVE, trained: parameters.Parameters, batch: Batch, count: int
) -> Batch:
    """The batch with what frozen encoders make of it, block by block, in place of their inputs.

    Gradient caching computes each block twice. What no gradient goes through is computed once, and
    kept for the whole batch: AST base's states take 1.9 MB a clip in bfloat16, 3.7 MB in float32.
    """
    sources = {
        name: feature.source
        for name, feature in save.FEATURES.items()
        if model.config.has(name)
        and getattr(batch, feature.source) is not None
        and not save.makers(feature.tower, trained)
    }
    made = microbatch.map_blocks(lambda block: model.features(block, sources), batch, count)
    return batch._replace(
        **dict.fromkeys(sources.values()), **sharding.by_rows(microbatch.join(made))
    )


def jit_train_step(train_step: TrainStep, state: TrainState) -> TrainStep:
    """The training step as it runs: a state's arrays are given up, and the next lie like them.

    Args:
        train_step: see `make_train_step`.
        state: a state or an abstract one, on its mesh.
    """
    mesh = state.step.sharding.mesh
    places = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(places, sharding.replicated(mesh)))


class StopRequest:
    """Ctrl-C and SIGTERM ask all processes to stop after the same step, with a checkpoint.

    A signal may reach one process only, and not at the same step everywhere. So with every step
    the processes vote, and act upon a vote when they read that step's results.
    """

    def __init__(self, mesh: jax.sharding.Mesh) -> None:
        self.signal: signal.Signals | None = None
        self.agreed = False
        self._by_device = sharding.batch_sharding(mesh)
        self._any = jax.jit(jnp.any, out_shardings=sharding.replicated(mesh))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        del frame
        self.signal = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C is immediate

    def vote(self) -> jax.Array | None:
        """This step's vote, to be counted later; None where there is nobody to vote with."""
        if jax.process_count() == 1:
            return None
        mine = np.full(len(jax.local_devices()), self.signal is not None)
        return self._any(jax.make_array_from_process_local_data(self._by_device, mine))

    def count(self, vote: jax.Array | None) -> None:
        """Waits for a vote, and notes its outcome."""
        self.agreed |= bool(vote) if vote is not None else self.signal is not None


def check_finite(
    step: int,
    scalars: Mapping[str, float],
    index: np.ndarray,
    training: TrainingSet,
    checkpoints: Checkpoints,
) -> None:
    """Raises NonFiniteLossError, naming the step and its clips, if the step broke down."""
    broken = {k: v for k, v in scalars.items() if not np.isfinite(v)}
    if broken:
        checkpoints.wait()
        last = checkpoints.latest_step()
        kept = "no checkpoint was written yet" if last is None else f"checkpoint {last} is intact"
        clips = ", ".join(training.clip_name(int(i)) for i in index)
        raise NonFiniteLossError(
            f"step {step}: "
            + ", ".join(f"{k} = {v}" for k, v in broken.items())
            + f"; stopped, {kept}.\nThe step's clips on this process: {clips}\n"
            "Look at these clips, or lower config.optimizer's rates."
        )


def train(
    state: TrainState,
    train_step: Callable,
    *,
    training: TrainingSet,
    evaluation: evaluate.EvaluationSet,
    evaluator: evaluate.Evaluator,
    checkpoints: Checkpoints,
    writer: Writer,
    mesh: jax.sharding.Mesh,
    optimizer_config: OptimizerConfig,
    workdir: files.Path,
    batch_size: int,
    eval_every: int,
    checkpoint_every: int,
    log_every: int,
) -> bool:
    """Trains from `state` to the schedule's end.

    Args:
        state: where to go on from; donated.
        train_step: compiled, see `make_train_step`.
        training, evaluation: the data.
        evaluator: compiled functions for `evaluation`.
        checkpoints, writer, workdir: where results go.
        mesh: devices.
        optimizer_config: for the schedule's length and the rates shown.
        batch_size: global, for the clips/s shown.
        eval_every: epochs between evaluations.
        checkpoint_every: steps between checkpoints that are not evaluated; 0 for none.
        log_every: steps between progress lines.

    Returns:
        True when the run is complete, False when it was asked to stop before.

    Raises:
        NonFiniteLossError: a loss or gradient is not finite.
    """
    total, per_epoch = optimizer_config.total_steps, training.steps_per_epoch
    log_every = 1 if total <= LOG_EACH_UP_TO else log_every
    first = int(state.step)
    stop = StopRequest(mesh)

    #### One step behind: reading a step's scalars must not keep the device waiting.
    pending: collections.deque[tuple[int, dict[str, jax.Array], np.ndarray, jax.Array | None]] = (
        collections.deque()
    )
    clock_step, clock = first, time.monotonic()

    def settle() -> None:
        nonlocal clock, clock_step
        step, device_scalars, index, vote = pending.popleft()
        scalars = {k: float(v) for k, v in device_scalars.items()}
        stop.count(vote)
        check_finite(step, scalars, index, training, checkpoints)
        if step % log_every and step != total:
            return
        now = time.monotonic()
        seconds = (now - clock) / max(step - clock_step, 1)
        rates = optimizer.learning_rates(optimizer_config, step - 1)
        writer.write_scalars(
            step,
            {
                **scalars,
                "epoch": step / per_epoch,
                "clips_per_second": batch_size / seconds,
                **{f"learning_rate/{k}": v for k, v in rates.items()},
            },
        )
        say(
            f"step {step:>{len(str(total))}}/{total}  epoch {step / per_epoch:.1f}  "
            f"loss {scalars['loss']:.4f} (contrastive {scalars['contrastive']:.4f}, "
            f"soft-ALBEF {scalars['soft_albef']:.4f})  lr "
            + " ".join(f"{k} {v:.1e}" for k, v in rates.items())
            + f"  {batch_size / seconds:.1f} clips/s  {duration(seconds * (total - step))} left"
        )
        clock, clock_step = now, step

    batches = sharding.prefetch(training.batches(first, total), mesh)
    for step in range(first + 1, total + 1):
        host, batch = next(batches)
        state, scalars = train_step(state, batch)
        pending.append((step, scalars, host.index, stop.vote()))
        if len(pending) > 1:
            settle()

        #### Evaluate and save; a checkpoint is only written of a step known to be sound.
        last = step == total
        evaluates = last or step % (per_epoch * eval_every) == 0
        if evaluates or stop.agreed or (checkpoint_every and step % checkpoint_every == 0):
            while pending:
                settle()
            paused = time.monotonic()
            result = None
            if evaluates:
                name = f"after epoch {step / per_epoch:g}" + (" (the last step)" if last else "")
                result = run_evaluation(state, step, name, evaluation, evaluator, writer, workdir)
            writer.sync()
            checkpoints.save(state, step, result["t2v"] if result else None)
            clock += time.monotonic() - paused
        if stop.agreed and not last:
            checkpoints.wait()
            name = stop.signal.name if stop.signal else "a signal to another process"
            say(
                f"{name}: stopped after step {step} of {total}, checkpoint written; "
                "the same command goes on from there"
            )
            return False
    checkpoints.wait()
    return True


def run_evaluation(
    state: TrainState,
    step: int,
    selection: str,
    data: evaluate.EvaluationSet,
    evaluator: evaluate.Evaluator,
    writer: Writer,
    workdir: files.Path,
    source: str = "",
) -> dict:
    """Evaluates a state, writes evaluation/STEP, scalars and the table; returns the metrics.

    `source` says where the state is from; by default it is the workdir's checkpoint of this step.
    """
    scores, result = evaluator.evaluate({**state.trained, **state.frozen}, data)
    protocol = evaluate.protocol(data, selection)
    protocol["checkpoint"] = source or f"{DIRECTORY}/{step}"
    result = {"step": step, "protocol": protocol, **result}
    if jax.process_index() == 0:
        evaluate.write(workdir / "evaluation" / str(step), data, scores, result)
    writer.write_scalars(
        step,
        {
            **{f"eval/t2v/{k}": v for k, v in result["t2v"].items()},
            **{f"eval/v2t/{k}": v for k, v in result["v2t"].items()},
            **{f"eval/{name}/R1": group["t2v"]["R1"] for name, group in result["groups"].items()},
        },
    )
    say(
        f"\n{data.split}: {len(data.captions)} captions, {len(data.video_ids)} videos, "
        f"{selection}\n{metrics.table(result)}\n"
    )
    return result
