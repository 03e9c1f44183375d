"""The training step and the training loop."""

import collections
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from save_jax import averaging, microbatch, objectives, optimizer, parameters, sharding
from save_jax.batch import Batch
from save_jax.checkpoint import Checkpoints, TrainState
from save_jax.errors import NonFiniteLossError
from save_jax.meter import Meter, Plan
from save_jax.models import save
from save_jax.objectives import LossConfig
from save_jax.optimizer import Hyperparameters, OptimizerConfig
from save_jax.parameters import Parameters, Structure
from save_jax.profiling import Trace
from save_jax.progress import say
from save_jax.stopping import Stopped, StopRequest

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


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


def _abstract(
    model: save.SAVEConfig, optimizer_config: OptimizerConfig
) -> tuple[Structure, TrainState]:
    """Returns the model's structure, and the shapes of a state."""
    structure, params = parameters.split(nnx.eval_shape(lambda: save.create(model, seed=0)))
    trained, frozen = optimizer.partition(params, optimizer_config)
    moments = optimizer.make_optimizer(optimizer_config, structure.stacked).init
    numbers = Hyperparameters.of(optimizer_config)
    state = TrainState(
        step=cast(jax.Array, np.int32(0)),
        trained=trained,
        frozen=frozen,
        opt_state=jax.eval_shape(moments, trained),
        hyperparameters=numbers,
        average=trained if optimizer_config.ema else {},
    )
    return structure, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def abstract_state(
    model: save.SAVEConfig, optimizer_config: OptimizerConfig, mesh: jax.sharding.Mesh
) -> tuple[Structure, TrainState]:
    """Returns the shapes and shardings of a state; nothing is computed."""
    structure, shapes = _abstract(model, optimizer_config)
    return structure, jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        shapes,
        sharding.tree_shardings(shapes, structure.stacked, mesh),
    )


def place_hyperparameters(
    optimizer_config: OptimizerConfig, mesh: jax.sharding.Mesh
) -> Hyperparameters:
    """Returns an optimiser's numbers on the mesh."""
    everywhere = sharding.replicated(mesh)
    numbers = Hyperparameters.of(optimizer_config)
    return jax.tree.map(lambda x: sharding.global_array(np.asarray(x), everywhere), numbers)


def create_state(
    model: save.SAVEConfig,
    optimizer_config: OptimizerConfig,
    seed: int,
    mesh: jax.sharding.Mesh,
    given: Parameters | None = None,
) -> tuple[Structure, TrainState]:
    """Creates a fresh state on the mesh, each shard on its device.

    Args:
        model: what the parameters are of.
        optimizer_config: which of them train, and the optimiser's numbers.
        seed: alone decides the random values; the mesh, and what is given, do not.
        mesh: devices.
        given: parameters by name, on the mesh, which need no random values.
    """
    given = given or {}
    structure, like = abstract_state(model, optimizer_config, mesh)
    tx = optimizer.make_optimizer(optimizer_config, structure.stacked)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in like.trained.items()}
    absent = [name for name in {**like.trained, **like.frozen} if name not in given]

    def init(seed: jax.Array) -> tuple[Parameters, optax.OptState]:
        made = parameters.split(save.create(model, jax.random.key(seed)))[1] if absent else {}
        return {name: made[name] for name in absent}, tx.init(shapes)

    places = jax.tree.map(lambda x: x.sharding, like)
    params = {**places.trained, **places.frozen}
    compiled = jax.jit(init, out_shardings=({k: params[k] for k in absent}, places.opt_state))
    made, opt_state = compiled(np.asarray(seed).astype(np.int32))  # any seed has one program
    trained, frozen = optimizer.partition({**made, **given}, optimizer_config)
    trained = {name: trained[name] for name in like.trained}
    average: Parameters = {}
    if optimizer_config.ema:
        average = jax.jit(averaging.start, out_shardings=places.average)(trained)
    return structure, TrainState(
        step=sharding.global_array(np.asarray(0, np.int32), places.step),
        trained=trained,
        frozen={name: frozen[name] for name in like.frozen},
        opt_state=opt_state,
        hyperparameters=place_hyperparameters(optimizer_config, mesh),
        average=average,
    )


def make_train_step(
    structure: Structure,
    optimizer_config: OptimizerConfig,
    loss_config: LossConfig,
    mesh: jax.sharding.Mesh,
    micro_batch: int = 0,
) -> TrainStep:
    """Makes the training step, to be compiled: (state, global batch) -> (state, scalars).

    The gradient is taken of the trained parameters only: a frozen encoder keeps no activations.

    Args:
        structure: of the model.
        optimizer_config: which groups train; rates and schedule are the state's.
        loss_config: constants of the losses.
        mesh: devices.
        micro_batch: clips, over all devices, that are encoded at a time; 0 = all of the batch. The
            losses are of the whole batch either way, and so is the gradient; less memory is paid
            for with a second forward pass of what trains (gradient caching, `save_jax.microbatch`).
    """

    def loss_fn(
        trained: parameters.Parameters, frozen: parameters.Parameters, batch: Batch
    ) -> tuple[jax.Array, objectives.Losses]:
        params = {
            # Stacked ones are gathered layer by layer, where they are used.
            name: x if name in structure.stacked else sharding.all_gather(x)
            for name, x in {**trained, **frozen}.items()
        }
        model = save.merge(structure, params)
        count = len(batch.index) // micro_batch if micro_batch else 1
        # The model does not read the teacher's vectors.
        inputs = batch._replace(teacher_video=None, teacher_audio=None)
        if count > 1:
            inputs = _encode_frozen(model, trained, inputs, count)
        text, video = microbatch.join(microbatch.map_blocks(model, inputs, count))
        usable = None
        if loss_config.soft_albef_weight:
            assert batch.has_audio is not None and batch.has_teacher is not None
            usable = batch.has_audio & batch.has_teacher
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
        tx = optimizer.make_optimizer(optimizer_config, structure.stacked, state.hyperparameters)
        updates, opt_state = tx.update(grads, state.opt_state, state.trained)
        trained = cast(Parameters, optax.apply_updates(state.trained, updates))
        if "clip.logit_scale" in trained:
            scale = cast(jax.Array, trained["clip.logit_scale"])
            trained["clip.logit_scale"] = jnp.minimum(scale, optimizer.MAX_LOGIT_SCALE)
        scalars = {
            "loss": losses.total,
            "contrastive": losses.contrastive,
            "soft_albef": losses.soft_albef,
            "grad_norm": optimizer.global_norm(grads),
        }
        average, decay = state.average, state.hyperparameters.ema
        if decay is not None:
            average = averaging.update(average, trained, state.step, decay)
        done = state._replace(
            step=state.step + 1, trained=trained, opt_state=opt_state, average=average
        )
        return done, scalars

    return train_step


def _encode_frozen(
    model: save.SAVE, trained: parameters.Parameters, batch: Batch, count: int
) -> Batch:
    """Replaces the inputs of frozen encoders in a batch by their outputs, block by block.

    Gradient caching computes each block twice. What no gradient goes through is computed once, and
    kept for the whole batch: AST base's states take 1.9 MB per clip in bfloat16, 3.7 in float32.
    """
    sources = {
        name: feature.source
        for name, feature in save.FEATURES.items()
        if model.config.has(name)
        and getattr(batch, feature.source) is not None
        and not save.tower_parameters(feature.tower, trained)
    }
    made = microbatch.map_blocks(lambda block: model.features(block, sources), batch, count)
    return batch._replace(
        **dict.fromkeys(sources.values()), **sharding.shard_rows(microbatch.join(made))
    )


def jit_train_step(train_step: TrainStep, state: TrainState) -> jax.stages.Wrapped:
    """Jits the step with the state donated and its sharding preserved.

    Args:
        train_step: see `make_train_step`.
        state: a state or an abstract one, on its mesh.
    """
    mesh = sharding.mesh_of(state.step)
    places = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(places, sharding.replicated(mesh)))


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


class _Dispatched(NamedTuple):
    """A step that the devices have been given, and whose results are not read yet."""

    step: int
    scalars: dict[str, jax.Array]
    index: np.ndarray
    vote: jax.Array | None


# A NumPy array that slips into the loop would be copied to the devices at each step, and a result
# that is read by accident awaited: a stall that nothing shows. Within this, it is an error.
_no_hidden_transfers = functools.partial(jax.transfer_guard, "disallow")


def train(
    state: TrainState,
    train_step: TrainStep,
    *,
    training: TrainingSet,
    evaluate: Callable[[Mapping[str, Parameters], int], None],
    checkpoints: Checkpoints,
    meter: Meter,
    plan: Plan,
    stop: StopRequest,
    trace: Trace | None = None,
) -> bool:
    """Trains from `state` to the plan's end.

    Args:
        state: where to resume; donated.
        train_step: compiled, see `make_train_step`.
        training: the data.
        evaluate: (parameters and average, as `averaging.models`; step) -> None, called once the
            step's checkpoint is on its way; also with the step that is resumed, which may have
            been left unevaluated. It may raise Stopped, on all processes, when `stop` says so.
        checkpoints: where states go.
        meter: where scalars and progress go.
        plan: how long to train, and what happens how often.
        stop: asked after each step.
        trace: records some of the steps.

    Returns:
        True when the run is complete, False when it was asked to stop before.

    Raises:
        NonFiniteLossError: a loss or gradient is not finite.
    """
    first, total = int(state.step), plan.total_steps
    pending: collections.deque[_Dispatched] = collections.deque()

    def settle() -> None:
        """Reads the oldest dispatched step's results."""
        done = pending.popleft()
        with _no_hidden_transfers():
            scalars = {k: float(value) for k, value in jax.device_get(done.scalars).items()}
            stop.count(done.vote)
        check_finite(done.step, scalars, done.index, training, checkpoints)
        meter.log(done.step, scalars)

    def evaluated(step: int) -> bool:
        """Evaluates the state; False when it was asked to stop before that was done."""
        if stop.agreed:
            return False
        try:
            params = {**state.trained, **state.frozen}
            evaluate(averaging.models(params, state.average), step)
        except Stopped:
            stop.agreed = True
            return False
        return True

    def stopped(step: int, unevaluated: bool) -> bool:
        """Says that the run was stopped, once its checkpoint is complete; returns False."""
        checkpoints.wait()
        name = stop.signal.name if stop.signal else "a signal to another process"
        say(
            f"{name}: stopped after step {step} of {total}, checkpoint written; "
            "the same command resumes from there" + (", and evaluates it" if unevaluated else "")
        )
        return False

    # ------------------------------------------------ evaluate what the last start has not come to
    if first and plan.evaluates(first):
        with meter.paused():
            done = evaluated(first)
        if not done:
            return stopped(first, unevaluated=True)

    mesh = sharding.mesh_of(state.step)
    batches = sharding.prefetch(training.batches(first, total), mesh)
    for step in range(first + 1, total + 1):
        # --------------------------------------------------------- begin or end a trace of steps
        if trace and trace.turns(step):
            while pending:
                settle()
            with meter.paused():
                trace.turn(step)

        # ---------------------------------------------------------------- dispatch the next step
        with _no_hidden_transfers(), jax.profiler.StepTraceAnnotation("train", step_num=step):
            with meter.waiting():
                host, batch = next(batches)
            state, scalars = train_step(state, batch)
            pending.append(_Dispatched(step, scalars, host.index, stop.vote()))
        # One step behind: reading a step's scalars must not keep the device waiting.
        if len(pending) > 1:
            settle()

        # ------------------------------------- save and evaluate; only a step known to be sound
        evaluates, done = plan.evaluates(step), True
        if evaluates or stop.agreed or plan.saves(step):
            while pending:
                settle()
            with meter.paused():
                meter.sync()
                checkpoints.save(state, step)  # first: nothing that happens then loses a step
                done = not evaluates or evaluated(step)

        # ------------------------------------------------------------------ stop when asked to
        if stop.agreed and not (step == total and done):
            return stopped(step, unevaluated=not done)
    checkpoints.wait()
    return True
