"""Writes shards on many machines: an Apache Beam pipeline, on any of Beam's runners."""

import shlex
from collections.abc import Sequence

from data_pipelines import outages
from data_pipelines.storage import shards
from data_pipelines.storage.shards import Shard
from save_jax.errors import OutageError, UserError


def write(
    todo: Sequence[tuple[Shard, str]],
    *,
    runner: str,
    options: str,
    workers: int,
) -> None:
    """Reads the media of shards and writes their records.

    The pipeline gets only the path of each shard's plan: all captions of a data set would exceed
    the size that a runner allows for a job.

    Args:
        todo: the shards, each with its fingerprint.
        runner: the name of Beam's runner.
        options: Beam's own options, as on a command line.
        workers: processes in which each of the runner's workers reads media; 1 = itself.

    Raises:
        UserError: Apache Beam is not installed, or the pipeline failed.
        OutageError: it failed because a worker's machine, the network or a store did.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(
            f"--beam_runner={runner} needs Apache Beam, found no package {error.name!r}: "
            "pip install -e '.[beam]' in a clone of save_jax"
        ) from error
    for shard, fingerprint in todo:
        shards.write_plan(shard, fingerprint)
    pipeline_options = PipelineOptions(shlex.split(options), runner=runner)
    try:
        with beam.Pipeline(options=pipeline_options) as pipeline:
            _ = (
                pipeline
                | beam.Create([shard.plan_path for shard, _ in todo])
                | beam.Reshuffle()
                | beam.Map(shards.write_planned, workers=workers)
            )
    except Exception as error:  # each runner has its own, which quotes the worker's
        outages.pass_on(error, runner)
        _, its_name, words = str(error).partition(f"{OutageError.__name__}: ")
        if its_name:
            raise OutageError(words.splitlines()[0]) from error
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise UserError(
            f"--beam_runner={runner}: expected the pipeline to finish, found "
            f"{type(error).__name__}: {lines[-1].rstrip('.') if lines else 'no reason given'}. "
            "Finished shards are kept: run the same command again to resume. Every worker must "
            "reach --root and --out and have save_jax installed with the extras [prepare,beam] "
            "(--beam_options=--help lists the options)."
        ) from error
