"""The state a run starts from: its own checkpoint, a run's or PyTorch's weights, random ones."""

import os
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from save_jax import averaging, checkpoint, files, optimizer, recorded, sharding, train
from save_jax import config as configuration
from save_jax.checkpoint import Checkpoints, TrainState
from save_jax.errors import UserError
from save_jax.models.save import SAVEConfig
from save_jax.optimizer import OptimizerConfig
from save_jax.parameters import Parameters, Structure
from save_jax.progress import say, warn

FROM_SCRATCH = 1e-5  # a lower peak rate is one for pretrained weights, or 0
RANDOM = "config.init_from is empty: the weights are the random ones of seed {seed}"


def check_same_config(config: dict[str, Any], workdir: files.Path) -> None:
    """Checks that a run, if the workdir holds one, can be resumed with a config.

    Raises:
        UserError: a key differs that can change the result (all but `recorded.FREE`); names it.
    """
    path = workdir / recorded.RECORDED
    if not path.exists():
        if checkpoint.is_ours(workdir):
            raise UserError(
                f"{workdir} has checkpoints and no {recorded.RECORDED}: nothing says which run "
                "they are of, and whether this one may go on from them. Put that file back, or "
                "use another --workdir"
            )
        return
    free = set(recorded.FREE)
    if not checkpoint.is_ours(workdir):
        free.remove("init_from")  # it would be read now
    if not recorded.digests(workdir):
        free.remove("data.dir")  # nothing else tells whether the data are the same
    try:
        differing = recorded.resumable_differences(config, recorded.read(path), free)
    except UserError as error:  # a size that this version does not know
        raise UserError(f"{path}: {error}") from error
    if differing:
        lines = (
            f"  {key}: {there!r} there, {now!r} now" for key, (there, now) in differing.items()
        )
        raise UserError(
            f"{workdir} holds a run with another config (there: its config.json):\n"
            + "\n".join(lines)
            + "\nUse another --workdir, or the config it was started with."
        )


def check_same_data(contents: Mapping[str, str], workdir: files.Path) -> None:
    """Checks that the splits are those which a workdir's run began with, wherever they lie.

    The order of training follows from the clips and captions there are: on other data, a run that
    resumes would be another run.

    Args:
        contents: a digest of each split (`data.Splits.contents`).
        workdir: the run's directory; a run of an earlier version may have recorded no digests.

    Raises:
        UserError: a split is another; names it.
    """
    began = recorded.digests(workdir)
    changed = [name for name, found in contents.items() if began.get(name, found) != found]
    if changed:
        raise UserError(
            f"{workdir} holds a run that began with other data: since then, the split "
            f"{' and the split '.join(map(repr, changed))} was prepared anew from other clips, "
            "captions or transcripts, or config.data.dir leads to another. Put the earlier data "
            f"back; or use another --workdir, with --config.init_from={workdir} to start from this "
            "run's weights."
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
    # What the run was trained on, with which the data of this evaluation are compared.
    return {**config, recorded.PROVENANCE: trained.get(recorded.PROVENANCE, {})}


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
    structure, like = train.abstract_state(model, rates, mesh)
    params = {**like.trained, **like.frozen}
    say(optimizer.describe(params, rates))
    step = checkpoints.latest_step()
    if step is not None:
        numbers = train.place_hyperparameters(rates, mesh)
        state = checkpoints.restore(step, like._replace(hyperparameters=numbers))
        say(f"resuming from checkpoint {step} of {rates.total_steps} in {checkpoints.workdir}")
        return structure, state, step
    given: Parameters = {}
    if config["init_from"]:
        given = load_weights(config, model, params, trust_archive=trust_archive)
    else:
        say(RANDOM.format(seed=config["seed"]))
        _warn_of_slow_encoders(model, rates)
    _, state = train.create_state(model, rates, config["seed"], mesh, given)
    return structure, state, None


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


def evaluated_models(
    config: dict[str, Any],
    workdir: files.Path,
    mesh: jax.sharding.Mesh,
    trust_archive: bool = False,
) -> tuple[Structure, dict[str, Parameters], int, str]:
    """Reads what to evaluate: of config.init_from or, without it, of the workdir's run.

    Returns:
        The model's structure, its parameters and perhaps their average (`averaging.models`), the
        step that they are of, and where they are from.

    Raises:
        UserError: they cannot be read, do not fit the model, or are not all there.
    """
    model = configuration.model_config(config)
    structure, like = train.abstract_state(model, optimizer.ALL_FROZEN, mesh)
    source = config["init_from"]
    if not source or checkpoint.is_ours(source):
        found = checkpoint.find(source or workdir)
        if os.path.realpath(checkpoint.workdir_of(found)) == os.path.realpath(workdir):
            found = workdir / checkpoint.DIRECTORY / found.name  # by whatever name it was given
        step, params = checkpoint.load_parameters(found, like.frozen)
        average = averaging.load(str(found), like.frozen)
        return structure, averaging.models(params, average), step, str(found)
    params = load_weights(config, model, like.frozen, complete=True, trust_archive=trust_archive)
    return structure, averaging.models(params, {}), 0, source


def load_weights(
    config: dict[str, Any],
    model: SAVEConfig,
    like: Parameters,
    *,
    complete: bool = False,
    trust_archive: bool = False,
) -> Parameters:
    """Returns the parameters that config.init_from holds, each where the abstract one is.

    Prints how the model differs from that of the run that the weights are from.

    Raises:
        UserError: the source does not fit the model or, with `complete`, lacks some of it.
    """
    from save_jax import weights
    from save_jax.weights.files import recognise

    source = config["init_from"]
    sources = weights.parse(source)
    if len(sources) == 1 and not sources[0][0] and _is_whole_run(sources[0][1], like):
        # Restored shard by shard: no process reads what only others need.
        step, loaded = checkpoint.load_parameters(sources[0][1], like)
        say(f"{source}: all {len(loaded)} arrays of a run, after its step {step}")
    else:
        found = weights.load(source, model, like, trust_archive=trust_archive)
        say("\n".join(found.notes))
        if complete and found.absent:
            raise UserError(
                f"{source} lacks {len(found.absent)} of the model's arrays, {found.absent[0]} "
                "first: evaluate it with the config of the model that it holds"
            )
        loaded = Parameters()
        for name, value in found.parameters.items():
            loaded[name] = sharding.global_array(np.asarray(value), like[name].sharding)
    for part, origin in sources:
        where, its = recognise.recorded_config(origin) or ("", None)
        if its is None:
            continue
        trained = recorded.deciding(its, where)
        for key, (here, there) in recorded.differences(config, trained, part).items():
            say(f"{key}: {here!r} in the config, {there!r} in {where}, where the weights are from")
    return loaded


def _is_whole_run(source: str, like: Parameters) -> bool:
    """Says whether a source is a checkpoint of ours with exactly these arrays."""
    if not checkpoint.is_ours(source):
        return False
    found = checkpoint.parameter_shapes(source)
    return {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in like.items()}
