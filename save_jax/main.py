"""The one entry point: a config in, a trained model or a retrieval table out.

python -m save_jax.main --config=configs/msrvtt.py --workdir=DIR [--config.KEY=VALUE ...]

Without --config it runs the demo. This is the composition root: the only place that knows both
the model and the data pipelines.
"""

import json
import os
import pathlib
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

import configs
from save_jax import (
    cache,
    checkpoint,
    distributed,
    evaluate,
    files,
    metrics,
    optimizer,
    sharding,
    train,
)
from save_jax import config as configuration
from save_jax.batch import Batch
from save_jax.errors import NonFiniteLossError, OutageError, UserError
from save_jax.models.save import SAVEConfig
from save_jax.objectives import LossConfig
from save_jax.parameters import Parameters
from save_jax.progress import Writer, say

DEMO = str(pathlib.Path(configs.__file__).parent / "demo.py")
CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Experiment, with an optional variant after a colon: configs/msrvtt.py:7k; "
    "without it, the demo.",
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and tables go.")
TRUST_ARCHIVE = flags.DEFINE_bool(
    "trust_archive", False, "Read a TorchScript archive whose SHA-256 is not one of OpenAI's."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, of several, where no cluster tells it."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many, with --coordinator.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one, from 0, with --coordinator.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join other processes even if this does not look like a cluster."
)

# Keys that may change when a run goes on: they do not touch its result.
FREE_KEYS = ("mode", "log_every", "checkpoint_every", "mesh.data", "mesh.fsdp", "micro_batch")
FREE_KEYS += ("model.remat", "model.attention", "cache.dir")

RANDOM = "config.init_from is empty: the weights are the random ones of seed {seed}"

SAMPLED_RECORDS = 16  # a split's stored clips whose bytes tell whether it was prepared anew


def check_same_config(config: dict[str, Any], path: files.Path) -> None:
    """Raises UserError naming the keys in which a run's recorded config differs from `config`."""
    recorded = configuration.flatten(configuration.read_recorded(path))
    current = configuration.flatten(config)
    differing = [
        f"  {key}: {recorded.get(key, '(absent)')!r} there, {current.get(key, '(absent)')!r} now"
        for key in sorted(set(recorded) | set(current))
        if key not in FREE_KEYS and recorded.get(key) != current.get(key)
    ]
    if differing:
        raise UserError(
            f"{path.parent} holds a run with another config:\n"
            + "\n".join(differing)
            + "\nUse another --workdir, or the config it was started with."
        )


class Data:
    """The splits of a config, as `train` and `evaluate` want them."""

    def __init__(self, config: dict[str, Any]):
        try:
            from data_pipelines import input as pipeline
            from save_jax.tokenizer import Tokenizer
        except ImportError as error:
            raise UserError(
                f"reading data needs the package {error.name!r}: pip install 'save_jax[data]'"
            ) from error
        self._pipeline = pipeline
        self._config, data = config, config["data"]
        self._model = configuration.model_config(config)
        self._tokenizer = Tokenizer(data["tokenizer"])
        self._splits: dict[str, Any] = {}
        self._caches: dict[str, cache.Cache] = {}
        self._processes = {
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
        }

    def _open(self, split: str) -> Any:
        data = self._config["data"]
        if not data["dir"]:
            raise UserError(
                "config.data.dir is empty: prepare the data once with `python -m "
                f"data_pipelines.prepare {data['dataset']} --root=ROOT --out=DIR`, then pass "
                "--config.data.dir=DIR"
            )
        self._splits[split] = self._pipeline.open_split(
            data["dir"],
            data["dataset"],
            data["variant"],
            split,
            configuration.expected_recipe(self._model, data["max_frames"]),
        )
        return self._splits[split]

    def use_cache(
        self, params: Parameters, rates: optimizer.OptimizerConfig, mesh: jax.sharding.Mesh
    ) -> None:
        """From now on, takes from config.cache.dir what encoders that `rates` freeze would make.

        Raises:
            UserError: the cache is of other weights, data or sizes, or is not complete.
        """
        directory = self._config["cache"]["dir"]
        if not directory:
            return
        parts = cache.frozen_parts(self._model, rates, params)
        for split in self._splits.values():
            if not cache.has_split(directory, split.name):
                say(f"{split.name}: not in the cache {directory}: everything is computed")
                continue
            found = cache.open_split(
                directory, self._for_cache(split), self._model, params, parts, mesh
            )
            self._caches[split.name] = found
            say(f"{split.name}: {', '.join(sorted(found.parts))} from the cache {directory}")

    def _for_cache(self, split: Any) -> cache.Split:
        """What a cache must know of an open split."""
        words, teacher = self._config["data"]["max_words"], self._config["loss"]
        stored = self._pipeline.records_sample(split, SAMPLED_RECORDS)
        return cache.Split(
            split.name,
            split.num_clips,
            cache.digest(split.recipe.to_json(), *split.video_ids, *stored),
            self._tokenizer(self._pipeline.caption_table(split).texts, words),
            self._tokenizer(split.transcripts, words),
            split.recipe.max_frames,
            split.recipe.teacher_size if teacher["soft_albef_weight"] else 0,
        )

    def to_cache(
        self, split: str, parts: Collection[str]
    ) -> tuple[cache.Split, Callable[[int], Iterator[Batch]]]:
        """A split to be cached, and (first batch) -> its clips, with what makes those parts."""
        opened = self._open(split)

        def batches(first: int) -> Iterator[Batch]:
            return self._pipeline.clip_batches(
                opened,
                batch_size=self._config["eval_batch_size"],
                max_words=self._config["data"]["max_words"],
                tokenizer=self._tokenizer,
                frames="frames" in parts,
                sound="ast" in parts,
                speech="speech" in parts,
                teacher="teacher" in parts,
                start_step=first,
                **self._processes,
            )

        return self._for_cache(opened), batches

    def _reading(self, split: Any) -> dict[str, Any]:
        """What to read of a split: what the model wants, but for what a cache has."""
        found = self._caches.get(split.name)
        parts = found.parts if found else frozenset()

        def cached(rows: np.ndarray, pairs: np.ndarray | None) -> dict[str, np.ndarray | None]:
            fields = found.read(rows, pairs)
            if "caption_embeddings" in fields:
                fields["caption_ids"] = None
            if "ast_states" in fields:
                fields["has_audio"] = split.has_audio[rows]
            if "teacher_video" in fields:
                fields["has_teacher"] = split.has_teacher[rows]
            return fields

        return {
            "max_words": self._config["data"]["max_words"],
            "tokenizer": self._tokenizer,
            "frames": "frames" not in parts,
            "sound": bool(self._model.sound_weight) and "ast" not in parts,
            "speech": bool(self._model.speech_weight) and "speech" not in parts,
            "cached": cached if found else None,
            **self._processes,
        }

    def training(self) -> train.TrainingSet:
        """The training split."""
        split = self._open(self._config["data"]["train_split"])
        directory = self._config["cache"]["dir"]
        if directory and not cache.has_split(directory, split.name):
            raise UserError(
                f"config.cache.dir = {directory!r}: expected a cache of the split {split.name!r} "
                "there, found none. Write it with `python -m save_jax.cache --config=… "
                f"--init_from=… --out={directory}`, or leave config.cache.dir empty."
            )

        def batches(start_step: int, total_steps: int) -> Iterator[Batch]:
            reading = self._reading(split)
            found = self._caches.get(split.name)
            return self._pipeline.train_batches(
                split,
                batch_size=self._config["batch_size"],
                seed=self._config["seed"],
                start_step=start_step,
                total_steps=total_steps,
                teacher=bool(self._config["loss"]["soft_albef_weight"])
                and not (found and "teacher" in found.parts),
                **reading,
            )

        per_epoch = self._pipeline.steps_per_epoch(split, self._config["batch_size"])
        say(
            f"training on {split.num_clips} clips, {split.num_pairs} captions: "
            f"{per_epoch} steps an epoch"
        )
        return train.TrainingSet(batches, per_epoch, lambda row: split.video_ids[row])

    def evaluation(self) -> evaluate.EvaluationSet:
        """The evaluation split."""
        split = self._open(self._config["data"]["eval_split"])
        table = self._pipeline.caption_table(split)
        if not table.texts:
            raise UserError(
                f"expected captions in the split {split.name!r}, found {split.num_clips} clips "
                "without any: there is nothing to rank them by. "
                "Add captions to the annotations (captions.csv for your own folder) and prepare "
                "again, or evaluate another split: --config.data.eval_split=NAME"
            )
        max_words = self._config["data"]["max_words"]

        def batches() -> Iterator[Batch]:
            return self._pipeline.clip_batches(
                split, batch_size=self._config["eval_batch_size"], **self._reading(split)
            )

        return evaluate.EvaluationSet(
            split.name,
            batches,
            split.video_ids,
            table.texts,
            self._tokenizer(table.texts, max_words),
            table.video_rows,
            table.groups,
            configuration.protocol(self._config),
        )


def prepare_demo(config: dict[str, Any]) -> None:
    """Makes the demo's clips and prepares them, unless that is done already."""
    from data_pipelines.prepare import prepare
    from data_pipelines.recipe import Recipe

    data = config["data"]
    model = configuration.model_config(config)
    prepare(
        "demo",
        root=None,
        out=data["dir"],
        variant=data["variant"],
        recipe=Recipe(
            image_size=model.clip.image_size,
            max_frames=data["max_frames"],
            fbank_frames=model.ast.fbank_frames,
            mel_bins=model.ast.mel_bins,
        ),
        wait=True,  # another process of this run may be at it
    )


def _as_trained(
    config: dict[str, Any], workdir: files.Path, explicit: Collection[str]
) -> dict[str, Any]:
    """The config to evaluate with: what decides a run's scores is the run's own, and is said.

    Raises:
        UserError: an explicit key contradicts the run, or the workdir is another run's.
    """
    from save_jax.weights.files import recognise

    source = config["init_from"] or str(checkpoint.find(workdir))
    found = recognise.recorded_config(source)
    if checkpoint.is_ours(source) and (workdir / configuration.RECORDED).exists():
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
    where, recorded = found
    if recorded is None:
        say(f"there is no {where}: {source} is evaluated as the config says")
        return config
    config, lines = configuration.as_trained(config, recorded, where, explicit)
    for line in lines:
        say(line)
    return config


def run(config: dict[str, Any], workdir: files.Path, explicit: Collection[str] = ()) -> bool:
    """Trains or evaluates as the config says.

    Args:
        config: all of it.
        workdir: the run's directory.
        explicit: keys that the command line sets: they may not contradict an evaluated run.

    Returns:
        True when what was asked for is complete, False when it was interrupted before.

    Raises:
        UserError, NonFiniteLossError: see there.
    """
    configuration.check_run(config)
    if config["mode"] == "evaluate":
        config = _as_trained(config, workdir, explicit)
    if config["dtype"] == "float32":
        # Without this, a GPU multiplies float32 in TF32 and a TPU in bfloat16.
        jax.config.update("jax_default_matmul_precision", "highest")
    # Every mistake in the config shows here, before any long work.
    model, loss = configuration.model_config(config), configuration.loss_config(config)
    configuration.optimizer_config(config, total_steps=1)
    mesh = sharding.make_mesh(config["mesh"])
    for key in ("batch_size", "eval_batch_size", "micro_batch"):
        if key != "micro_batch" or config[key]:
            sharding.check_batch_size(key, config[key], mesh)
    with distributed.hold(workdir):
        return _train_or_evaluate(config, workdir, model, loss, mesh)


def _train_or_evaluate(
    config: dict[str, Any],
    workdir: files.Path,
    model: SAVEConfig,
    loss: LossConfig,
    mesh: jax.sharding.Mesh,
) -> bool:
    recorded = workdir / configuration.RECORDED
    if config["mode"] == "train" and recorded.exists():
        check_same_config(config, recorded)

    if config["data"]["dataset"] == "demo":
        prepare_demo(config)
    data = Data(config)
    evaluation = data.evaluation()
    if config["mode"] == "evaluate":
        return _evaluate(config, workdir, model, loss, data, evaluation, mesh)

    training = data.training()
    total = config["steps"] or config["epochs"] * training.steps_per_epoch
    rates = configuration.optimizer_config(config, total)
    graphdef, state = train.create_state(model, rates, config["seed"], mesh)
    say(optimizer.describe({**state.trained, **state.frozen}, rates))

    workdir.mkdir(parents=True, exist_ok=True)
    checkpoints = checkpoint.Checkpoints(workdir)
    step = checkpoints.latest_step()
    if step is not None:
        state = checkpoints.restore(step, state)
        say(f"going on from checkpoint {step} of {total} in {workdir}")
    elif config["init_from"]:
        loaded = load_weights(config, model, state)
        trained, frozen = optimizer.partition(loaded, rates)
        state = state._replace(trained=trained, frozen=frozen)
    else:
        say(RANDOM.format(seed=config["seed"]))
    data.use_cache({**state.trained, **state.frozen}, rates, mesh)
    if jax.process_index() == 0 and not recorded.exists():
        files.write(recorded, json.dumps(config, indent=2) + "\n")

    writer = Writer(workdir, restored_step=step or 0)
    try:
        complete = train.train(
            state,
            train.jit_train_step(
                train.make_train_step(graphdef, rates, loss, mesh, config["micro_batch"]), state
            ),
            training=training,
            evaluation=evaluation,
            evaluator=evaluate.Evaluator(
                graphdef, mesh, config["eval_batch_size"], loss.local_weight
            ),
            checkpoints=checkpoints,
            writer=writer,
            mesh=mesh,
            optimizer_config=rates,
            workdir=workdir,
            batch_size=config["batch_size"],
            eval_every=config["eval_every"],
            checkpoint_every=config["checkpoint_every"],
            log_every=config["log_every"],
        )
    finally:
        writer.close()
        checkpoints.close()
    if complete and jax.process_index() == 0:
        summarise(workdir, evaluation.split)
    return complete


def summarise(workdir: files.Path, split: str) -> None:
    """Prints the last evaluation's table, and the best one's where that is another."""
    results = [
        json.loads(path.read_text()) for path in (workdir / "evaluation").glob("*/metrics.json")
    ]
    results.sort(key=lambda result: result["step"])
    last = results[-1]
    best = max(results, key=lambda result: result["t2v"][checkpoint.BEST_METRIC])
    say(f"last step ({last['step']}), {split} split:\n{metrics.table(last)}")
    if best["step"] != last["step"]:
        say(
            f"\nbest of {len(results)} evaluations on the {split} split itself (step "
            f"{best['step']}; an optimistic protocol):\n{metrics.table(best)}"
        )
    say(f"\neverything is in {workdir}")


def load_weights(
    config: dict[str, Any],
    model: SAVEConfig,
    state: checkpoint.TrainState,
    *,
    complete: bool = False,
) -> Parameters:
    """All parameters: those that config.init_from holds, the rest as they are in `state`.

    Says in what the model differs from that of a run which they are from.

    Raises:
        UserError: the source does not fit the model or, with `complete`, lacks some of it.
    """
    from save_jax import weights
    from save_jax.weights.files import recognise

    source = config["init_from"]
    current = {**state.trained, **state.frozen}
    loaded = weights.load(source, model, current, trust_archive=TRUST_ARCHIVE.value)
    say("\n".join(loaded.notes))
    for part, origin in weights.parse(source):
        where, recorded = recognise.recorded_config(origin) or ("", None)
        if recorded is None:
            continue
        trained = configuration.deciding(recorded, where)
        for key, (here, there) in configuration.differences(config, trained, part).items():
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


def _evaluate(
    config: dict[str, Any],
    workdir: files.Path,
    model: SAVEConfig,
    loss: LossConfig,
    data: Data,
    evaluation: evaluate.EvaluationSet,
    mesh: jax.sharding.Mesh,
) -> bool:
    graphdef, state = train.create_state(model, optimizer.ALL_FROZEN, config["seed"], mesh)
    source = config["init_from"]
    if not source or checkpoint.is_ours(source):
        source = checkpoint.find(source or workdir)
        step, params = checkpoint.load_parameters(source, {**state.trained, **state.frozen})
    else:
        step, params = 0, load_weights(config, model, state, complete=True)
    data.use_cache(params, optimizer.ALL_FROZEN, mesh)
    state = state._replace(trained=params, frozen={})
    workdir.mkdir(parents=True, exist_ok=True)
    writer = Writer(workdir, restored_step=None)
    try:
        train.run_evaluation(
            state,
            step,
            f"checkpoint {source}",
            evaluation,
            evaluate.Evaluator(graphdef, mesh, config["eval_batch_size"], loss.local_weight),
            writer,
            workdir,
            str(source).removeprefix(f"{workdir}/"),
        )
    finally:
        writer.close()
    return True


def parse_config(argv: list[str]) -> dict[str, Any]:
    """The config of a command line; the other flags have their values then.

    Raises:
        UserError: whatever is wrong with it.
    """
    app.define_help_flags()
    # config_flags wants --config before what it overrides. The default cannot be the flag's own:
    # it would be read, overrides and all, before a mistake in them can be reported.
    chosen = [arg for arg in argv[1:] if arg.startswith(("--config=", "-config="))]
    rest = [arg for arg in argv[1:] if arg not in chosen]
    if not chosen and "--config" not in rest and "-config" not in rest:
        chosen = [f"--config={DEMO}"]
    argv = [argv[0], *chosen, *rest]
    with configuration.mistakes_named():
        rest = flags.FLAGS(argv)
        config = CONFIG.value.to_dict()
    if len(rest) > 1:
        raise UserError(f"unexpected arguments: {' '.join(rest[1:])}")
    return config


def _parse(argv: list[str]) -> tuple[dict[str, Any], files.Path]:
    """The config and the workdir of a command line.

    Raises:
        UserError: whatever is wrong with it.
    """
    config = parse_config(argv)
    if not WORKDIR.value:
        raise UserError("--workdir=DIR is required: where checkpoints, metrics and tables go")
    return config, files.path(WORKDIR.value)


def main(argv: list[str]) -> int:
    """Parses the command line, joins the other processes if any, and runs; returns the exit code.

    0: complete. 1: training broke down. 2: a mistake in what the user gave us. 75: interrupted by
    a signal, with a checkpoint, or by an outage of what data are read from; the same command goes
    on.
    """
    logging.set_verbosity(logging.ERROR)  # orbax and TFDS say much that no user needs
    try:
        config, workdir = _parse(argv)
        distributed.join(
            COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, DISTRIBUTED.value
        )
        with distributed.lost_peers_end_this_one():
            explicit = config_flags.get_override_values(flags.FLAGS[CONFIG.name])
            complete = run(config, workdir, explicit)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OutageError as error:
        print(f"interrupted: {error}", file=sys.stderr)
        return os.EX_TEMPFAIL
    return 0 if complete else os.EX_TEMPFAIL


if __name__ == "__main__":
    sys.exit(main(sys.argv))
