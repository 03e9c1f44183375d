"""The entry point: a config in, a trained model or a retrieval table out; without one, the demo.

python -m save_jax.main --config=configs/msrvtt.py --workdir=DIR [--config.KEY=VALUE ...]
"""

import contextlib
import os
import sys
import time
from collections.abc import Collection
from typing import Any

import jax
from absl import logging

from save_jax import (
    checkpoint,
    cli,
    compilation,
    distributed,
    evaluate,
    files,
    following,
    profiling,
    progress,
    recorded,
    results,
    resume,
    retention,
    sharding,
    stopping,
    train,
)
from save_jax import config as configuration
from save_jax.data import open_splits
from save_jax.errors import exit_codes
from save_jax.evaluations import Evaluations
from save_jax.meter import Meter, Plan
from save_jax.optimizer import ALL_FROZEN


def run(
    config: dict[str, Any],
    workdir: files.Path,
    *,
    writer: progress.Writer | None = None,
    trust_archive: bool = False,
    explicit: Collection[str] = (),
) -> bool:
    """Trains, evaluates or follows as the config says.

    Args:
        config: all of it.
        workdir: the run's directory.
        writer: takes the run's scalars, and is left open; None = the workdir's own.
        trust_archive: read a TorchScript archive that is none of OpenAI's.
        explicit: keys that the command line sets: they may not contradict an evaluated run.

    Returns:
        True when what was asked for is complete, False when it was interrupted before.

    Raises:
        UserError: a mistake in what the user gave us.
        NonFiniteLossError: training broke down.
    """
    with contextlib.ExitStack() as closing:
        # --------------------------------------------- every mistake that shows before long work
        configuration.check_run(config)
        if config["mode"] == "evaluate":
            config = resume.as_trained(config, workdir, explicit)
        elif config["mode"] == "follow":
            closing.enter_context(following.beating(workdir))
            config = following.config_of_run(config, workdir, explicit)
        configuration.check(config)
        configuration.set_matmul_precision(config)
        compilation.use_cache(config["compilation_cache"])
        mesh = sharding.make_mesh(config["mesh"])
        sharding.check_batch_sizes(config, mesh)
        if config["mode"] == "follow":
            return following.follow(config, workdir, mesh, writer)
        if config["mode"] == "evaluate":  # which a run may be while it trains
            return _evaluate(config, workdir, mesh, writer, trust_archive)
        closing.enter_context(distributed.hold(workdir))
        return _train(config, workdir, mesh, writer, trust_archive)


def _train(
    config: dict[str, Any],
    workdir: files.Path,
    mesh: jax.sharding.Mesh,
    writer: progress.Writer | None,
    trust_archive: bool,
) -> bool:
    began = time.time()
    resume.check_same_config(config, workdir)

    # ----------------------------------------------------------------------------------- data
    splits = open_splits(config)
    evaluation, test, training = splits.evaluation(), splits.test(), splits.training()
    resume.check_same_data(splits.contents(), workdir)
    plan = Plan.of(config, training.steps_per_epoch)

    # ---------------------------------------------------------------------------------- state
    model, loss = configuration.model_config(config), configuration.loss_config(config)
    rates = configuration.optimizer_config(config, plan.total_steps)
    with splits, contextlib.ExitStack() as closing:
        kept = retention.Retention(workdir, evaluation.split, plan.evaluates, config["follow_keep"])
        checkpoints = checkpoint.Checkpoints(workdir, kept)
        closing.callback(checkpoints.close)
        structure, state, resumed = resume.initial_state(
            config, model, rates, mesh, checkpoints, trust_archive
        )
        splits.use_cache({**state.trained, **state.frozen}, rates, mesh)
        start = {"step": resumed or 0, "mesh": dict(mesh.shape), **plan.recorded()}
        began = recorded.write(config, workdir, splits.provenance(), start, began)
        results.drop_beyond(workdir, resumed or 0, evaluation.split)
        writer = closing.enter_context(progress.writing(workdir, resumed or 0, writer))

        # ------------------------------------------------------------------------------ train
        closing.enter_context(distributed.exit_if_peer_lost())
        step = train.make_train_step(structure, rates, loss, mesh, config["micro_batch"])
        meter = Meter.of(config, plan, rates, writer, first=resumed or 0, began=began)
        stop = closing.enter_context(stopping.StopRequest(mesh))
        evaluator = evaluate.Evaluator.of(config, structure, mesh)
        evaluations = following.Trainers(
            Evaluations(workdir, plan, evaluator, evaluation, test, writer, stop),
            closing.enter_context(following.Watch(workdir)),
            checkpoint.abstract({**state.trained, **state.frozen}),
        )
        complete = train.train(
            state,
            meter.compiled(train.jit_train_step(step, state)),
            training=training,
            evaluate=evaluations.evaluate,
            checkpoints=checkpoints,
            meter=meter,
            plan=plan,
            stop=stop,
            trace=closing.enter_context(profiling.Trace(plan.traced, workdir, resumed or 0)),
        )
        del state  # what is left to evaluate is read from checkpoints
        return complete and evaluations.finish()


def _evaluate(
    config: dict[str, Any],
    workdir: files.Path,
    mesh: jax.sharding.Mesh,
    writer: progress.Writer | None,
    trust_archive: bool,
) -> bool:
    # ----------------------------------------------------------------------------------- data
    splits = open_splits(config)
    evaluation = splits.evaluation()

    # ---------------------------------------------------------------------------------- state
    structure, models, step, source = resume.evaluated_models(config, workdir, mesh, trust_archive)
    subset = results.subset(config, workdir, evaluation.digest)
    where = evaluate.announce(evaluation, source, step, workdir, subset)
    for each in models.values():
        splits.use_cache(each, ALL_FROZEN, mesh)

    # ------------------------------------------------------------------------------- evaluate
    with splits, distributed.hold(where), progress.writing(where, None, writer) as writer:
        evaluate.run_evaluations(
            models,
            step,
            f"checkpoint {source}",
            data=evaluation,
            evaluator=evaluate.Evaluator.of(config, structure, mesh),
            writer=writer,
            workdir=workdir,
            source=source.removeprefix(f"{workdir}/"),
            subset=subset,
        )
    progress.say(f"the results are in {where}")
    return True


@exit_codes
def main(argv: list[str]) -> int:
    """Parses the command line, joins the other processes if any, and runs; returns the exit code.

    0: complete. 1: training broke down. 2: a mistake in what the user gave us. 75: interrupted by
    a signal, with a checkpoint, or another process is lost; the same command resumes.
    """
    logging.set_verbosity(logging.ERROR)  # orbax and TFDS say much that no user needs
    line = cli.parse(argv, __doc__, cli.define_run)
    workdir = cli.workdir(line.flags)
    cli.join_processes(line.flags)
    with distributed.exit_alone():
        complete = run(
            line.config, workdir, trust_archive=line.flags.trust_archive, explicit=line.explicit
        )
    return 0 if complete else os.EX_TEMPFAIL


if __name__ == "__main__":
    sys.exit(main(sys.argv))
