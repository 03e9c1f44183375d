"""The state a run starts from: its own checkpoint, a run's or PyTorch's weights, random ones."""

import os
from collections.abc import Collection, Mapping
from typing import Any

import jax

from save_jax import checkpoint, files, optimizer, recorded, train
from save_jax.checkpoint import Checkpoints, TrainState
from save_jax.errors import UserError
from save_jax.models.save import SAVEConfig
from save_jax.optimizer import OptimizerConfig
from save_jax.parameters import Parameters, Structure
from save_jax.progress import say, warn

# Keys that may change when a run is resumed: they do not touch its result.
FREE_KEYS = ("mode", "log_every", "checkpoint_every", "mesh.data", "mesh.fsdp", "micro_batch")
FREE_KEYS += ("model.remat", "model.attention", "cache.dir")
FREE_KEYS += ("eval_caption_batch_size", "eval_matrix_entries")

FROM_SCRATCH = 1e-5  # a lower peak rate is one for pretrained weights, or 0
RANDOM = "config.init_from is empty: the weights are the random ones of seed {seed}"


def check_same_config(config: dict[str, Any], workdir: files.Path) -> None:
    """Raises UserError naming the keys in which the config of a workdir's run, if any, differs."""
    path = workdir / recorded.RECORDED
    if not path.exists():
        return
    there, here = recorded.flatten(recorded.read(path)), recorded.flatten(config)
    differing = [
        f"  {key}: {there.get(key, '(absent)')!r} there, {here.get(key, '(absent)')!r} now"
        for key in sorted(set(there) | set(here))
        if key not in FREE_KEYS and there.get(key) != here.get(key)
    ]
    if differing:
        raise UserError(
            f"{workdir} holds a run with another config (there: its config.json):\n"
            + "\n".join(differing)
            + "\nUse another --workdir, or the config it was started with."
        )


def check_same_data(contents: Mapping[str, str], workdir: files.Path) -> None:
    """Raises UserError naming the splits that are not those which a workdir's run began with.

    The order of training follows from the clips and captions there are: on other data, a run that
    resumes would be another run.

    Args:
        contents: a digest of each split (`data.Splits.contents`).
        workdir: the run's directory; a run of an earlier version has recorded no digests.
    """
    path = workdir / recorded.CONTENTS
    if not path.exists():
        return
    began = recorded.read(path)
    changed = [name for name, found in contents.items() if began.get(name, found) != found]
    if changed:
        raise UserError(
            f"{workdir} holds a run that began with other data: since then, the split "
            f"{' and the split '.join(map(repr, changed))} was prepared anew from other clips, "
            "captions or transcripts. Put the earlier data back; or use another --workdir, with "
            f"--config.init_from={workdir} to start from this run's weights."
        )


def as_trained(
    config: dict[str, Any], workdir: files.Path, explicit: Collection[str]
) -> dict[str, Any]:
    """Returns the config to evaluate with: what decides a run's scores is the run's own.

    Raises:
        UserError: an explicit key contradicts the run, or the workdir is another run's.
    """
    from save_jax.weights.files import recognise

    source = config["init_from"] or str(checkpoint.find(workdir))
    found = recognise.recorded_config(source)
    if checkpoint.is_ours(source) and (workdir / recorded.RECORDED).exists():
        home = checkpoint.workdir_of(source)
        if os.path.realpath(home) != os.path.realpath(workdir):
            raise UserError(
                f"{workdir} holds a run, and config.init_from = {source!r} is of another, whose "
                "evaluation would take the place of its own. Leave config.init_from empty to "
                "evaluate the run in the workdir, or use another --workdir"
            )
    elif not checkpoint.is_ours(source) and checkpoint.is_ours(workdir):
        say(
            f"evaluating {source}, not the run in {workdir}: for that, leave config.init_from empty"
        )
    if found is None:
        return config
    where, trained = found
    if trained is None:
        say(f"there is no {where}: {source} is evaluated as the config says")
        return config
    config, lines = recorded.as_trained(config, trained, where, explicit)
    for line in lines:
        say(line)
    return config


def initial_state(
    config: dict[str, Any],
    model: SAVEConfig,
    rates: OptimizerConfig,
    mesh: jax.sharding.Mesh,
    checkpoints: Checkpoints,
    trust_archive: bool = False,
) -> tuple[Structure, TrainState, int | None]:
    """Creates the state that training starts from, and says which.

    Returns:
        The model's structure, the state, and the step of the checkpoint that it resumes; None when
        training begins.

    Raises:
        UserError: a checkpoint or config.init_from cannot be read, or does not fit the model.
    """
    structure, state = train.create_state(model, rates, config["seed"], mesh)
    say(optimizer.describe({**state.trained, **state.frozen}, rates))
    step = checkpoints.latest_step()
    if step is not None:
        state = checkpoints.restore(step, state)
        say(f"resuming from checkpoint {step} of {rates.total_steps} in {checkpoints.workdir}")
    elif config["init_from"]:
        current = {**state.trained, **state.frozen}
        loaded = load_weights(config, model, current, trust_archive=trust_archive)
        trained, frozen = optimizer.partition(loaded, rates)
        state = state._replace(trained=trained, frozen=frozen)
    else:
        say(RANDOM.format(seed=config["seed"]))
        _warn_of_slow_encoders(model, rates)
    return structure, state, step


def _warn_of_slow_encoders(model: SAVEConfig, rates: OptimizerConfig) -> None:
    """Warns where random encoders would hardly learn: at rates for pretrained ones, or frozen."""
    groups = ("clip", "clip_stem", "ast") if model.sound_weight else ("clip", "clip_stem")
    slow = [group for group in groups if rates.rate(group) < FROM_SCRATCH]
    if slow:
        warn(
            "the encoders start at random and hardly learn: "
            + ", ".join(f"config.optimizer.{group} = {rates.rate(group):g}" for group in slow)
            + f" ({'rates' if len(slow) > 1 else 'a rate'} for pretrained weights; 0 is frozen). "
            "Give pretrained weights, --config.init_from=clip=FILE,ast=FILE, or train from scratch "
            "with rates as in configs/demo.py"
        )


def evaluated_parameters(
    config: dict[str, Any],
    workdir: files.Path,
    model: SAVEConfig,
    mesh: jax.sharding.Mesh,
    trust_archive: bool = False,
) -> tuple[Structure, Parameters, int, str]:
    """Reads the parameters to evaluate: of config.init_from or, without it, of the workdir's run.

    Returns:
        The model's structure, its parameters, the step that they are of, and where they are from.

    Raises:
        UserError: they cannot be read, do not fit the model, or are not all there.
    """
    structure, state = train.create_state(model, optimizer.ALL_FROZEN, config["seed"], mesh)
    source = config["init_from"]
    if not source or checkpoint.is_ours(source):
        found = checkpoint.find(source or workdir)
        step, params = checkpoint.load_parameters(found, state.frozen)
        return structure, params, step, str(found)
    params = load_weights(config, model, state.frozen, complete=True, trust_archive=trust_archive)
    return structure, params, 0, source


def load_weights(
    config: dict[str, Any],
    model: SAVEConfig,
    current: Parameters,
    *,
    complete: bool = False,
    trust_archive: bool = False,
) -> Parameters:
    """Returns all parameters: those that config.init_from holds, the rest as in `current`.

    Prints how the model differs from that of the run that the weights are from.

    Raises:
        UserError: the source does not fit the model or, with `complete`, lacks some of it.
    """
    from save_jax import weights
    from save_jax.weights.files import recognise

    source = config["init_from"]
    loaded = weights.load(source, model, current, trust_archive=trust_archive)
    say("\n".join(loaded.notes))
    for part, origin in weights.parse(source):
        where, found = recognise.recorded_config(origin) or ("", None)
        if found is None:
            continue
        trained = recorded.deciding(found, where)
        for key, (here, there) in recorded.differences(config, trained, part).items():
            say(f"{key}: {here!r} in the config, {there!r} in {where}, where the weights are from")
    if complete and loaded.absent:
        raise UserError(
            f"{source} lacks {len(loaded.absent)} of the model's arrays, {loaded.absent[0]} first: "
            "evaluate it with the config of the model that it holds"
        )
    placed = {
        name: jax.device_put(value, current[name].sharding)
        for name, value in loaded.parameters.items()
    }
    return current | placed
