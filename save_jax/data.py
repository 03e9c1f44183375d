"""The splits of a config as training, evaluation and the cache want them.

The only module that knows both the model's configs and the data pipelines, which it imports only
where they are needed: TensorFlow comes with them.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import numpy as np

from save_jax import cache, coverage, evaluate, optimizer, recorded, sharding, train
from save_jax import config as configuration
from save_jax.batch import Batch
from save_jax.errors import UserError
from save_jax.messages import counted
from save_jax.parameters import Parameters
from save_jax.progress import say, warn

SAMPLED_RECORDS = 16  # a split's stored clips whose bytes tell whether it was prepared anew


class Splits:
    """Opens the splits of a config. It is a context manager, at whose end nothing reads any more.

    Args:
        config: all of a config's values.

    Raises:
        UserError: packages that read data are not installed.
    """

    def __init__(self, config: dict[str, Any]):
        try:
            from data_pipelines import input as pipeline
            from data_pipelines import splits
            from save_jax.tokenizer import Tokenizer
        except ImportError as error:
            raise UserError(
                f"reading data needs the package {error.name!r}: pip install -e '.[data]' in the "
                "project's folder"
            ) from error
        self._pipeline, self._stored = pipeline, splits
        self._config, data = config, config["data"]
        self._model = configuration.model_config(config)
        self._tokenizer = Tokenizer(data["tokenizer"])
        self._splits: dict[str, Any] = {}
        self._caches: dict[str, cache.Cache] = {}
        self._digests: dict[str, str] = {}

    def __enter__(self) -> "Splits":
        return self

    def __exit__(self, *_: Any) -> None:
        """Ends the threads that read ahead."""
        for found in self._caches.values():
            found.close()

    def _open(self, split: str) -> Any:
        data = self._config["data"]
        if not data["dir"]:
            raise UserError(
                "config.data.dir is empty: prepare the data once with `python -m "
                f"data_pipelines.prepare {data['dataset']} --root=ROOT --out=DIR`, then pass "
                "--config.data.dir=DIR"
            )
        self._splits[split] = self._stored.open_split(
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
        """Reads from config.cache.dir, from now on, what encoders that `rates` freeze compute.

        Raises:
            UserError: the cache is of other weights, data or sizes, not complete, or damaged.
            OutageError: the store that it is in fails.
        """
        directory = self._config["cache"]["dir"]
        if not directory:
            return
        parts = cache.frozen_parts(self._model, rates, params)
        for split in self._splits.values():
            if not cache.has_split(directory, split.name):
                say(f"{split.name}: not in the cache {directory}, so everything is computed")
                continue
            found = cache.open_split(
                directory, self._for_cache(split), self._model, params, parts, mesh
            )
            if split.name in self._caches:
                self._caches[split.name].close()
            self._caches[split.name] = found
            say(f"{split.name}: {', '.join(sorted(found.parts))} from the cache {directory}")

    def _for_cache(self, split: Any) -> cache.Split:
        """Returns what a cache must know of an open split."""
        words, teacher = self._config["data"]["max_words"], self._config["loss"]
        return cache.Split(
            split.name,
            split.num_clips,
            self._content(split),
            self._tokenizer(self._stored.caption_table(split).texts, words),
            self._tokenizer(split.transcripts, words),
            split.recipe.max_frames,
            split.recipe.teacher_size if teacher["soft_albef_weight"] else 0,
        )

    def _content(self, split: Any) -> str:
        """Returns a digest of a split's clips, in their order, and of what is stored of each."""
        stored = [split.content]
        if not split.content:  # by an earlier version, which took no digest of all records
            stored = self._stored.records_sample(split, SAMPLED_RECORDS)
            stored += [split.has_audio.tobytes(), split.has_teacher.tobytes()]
        return cache.digest(split.recipe.to_json(), *split.video_ids, *stored)

    def contents(self) -> dict[str, str]:
        """Returns a digest of each open split: its clips, their arrays, captions and transcripts.

        The order of training, and what it sees, follow from these and the config.
        """
        return {split.name: self._digest(split) for split in self._splits.values()}

    def _digest(self, split: Any) -> str:
        if split.name not in self._digests:
            self._digests[split.name] = cache.digest(
                self._content(split),
                *(text for texts in (*split.captions, *split.groups) for text in texts),
                *map(str, map(len, split.captions)),
                *split.transcripts,
            )
        return self._digests[split.name]

    def provenance(self) -> dict[str, Any]:
        """Describes the open splits for a run's record: how they were made, and their digests."""
        split = next(iter(self._splits.values()))  # all are of one directory
        return {**self._made(split), "digests": self.contents()}

    def _made(self, split: Any) -> dict[str, Any]:
        """Describes what made a split's arrays and ids."""
        data = self._config["data"]
        return {
            "dataset": data["dataset"],
            "variant": data["variant"],
            "recipe": split.recipe.describe(),
            "transcripts": split.speech,
            "vocabulary": self._tokenizer.digest(),
        }

    def to_cache(
        self, split: str, parts: Collection[str]
    ) -> tuple[cache.Split, Callable[[np.ndarray], Iterator[Batch]]]:
        """Returns the split to cache, and (clips of each batch) -> the stream of these batches."""
        opened = self._open(split)

        def batches(index: np.ndarray) -> Iterator[Batch]:
            return self._pipeline.chosen_clips(
                opened,
                index,
                max_words=self._config["data"]["max_words"],
                tokenizer=self._tokenizer,
                frames="frames" in parts,
                sound="ast" in parts,
                speech="speech" in parts,
                teacher="teacher" in parts,
            )

        return self._for_cache(opened), batches

    def _share(self, batch_size: int) -> np.ndarray | None:
        """Returns the rows of a global batch that this process reads; None = all of them.

        They are those that its devices hold, so that the batch is the same, row by row, whatever
        the number of processes and the order of their devices.
        """
        if jax.process_count() == 1:
            return None
        return sharding.process_rows(sharding.make_mesh(self._config["mesh"]), batch_size)

    def _reading(self, split: Any) -> dict[str, Any]:
        """Returns what to read of a split: what the model needs and no cache holds."""
        parts = self._cached_parts(split)
        return {
            "max_words": self._config["data"]["max_words"],
            "tokenizer": self._tokenizer,
            "frames": "frames" not in parts,
            "sound": bool(self._model.sound_weight) and "ast" not in parts,
            "speech": bool(self._model.speech_weight) and "speech" not in parts,
        }

    def _cached_parts(self, split: Any) -> frozenset[str]:
        found = self._caches.get(split.name)
        return found.parts if found else frozenset()

    def _with_cache(self, split: Any, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Adds what the cache holds of a split to its batches."""
        found = self._caches.get(split.name)
        if found is None:
            return batches
        # What the pipeline gives only with arrays that it does not read now.
        facts = {
            "has_audio": ("ast_states", split.has_audio),
            "has_teacher": ("teacher_video", split.has_teacher),
        }
        return found.lay_over(batches, facts)

    def training(self) -> train.TrainingSet:
        """Opens the training split.

        Raises:
            UserError: it cannot be used, or has nothing for a branch that is switched on.
        """
        split = self._open(self._config["data"]["train_split"])
        directory = self._config["cache"]["dir"]
        if directory and not cache.has_split(directory, split.name):
            raise UserError(
                f"config.cache.dir = {directory!r}: expected a cache of the split {split.name!r} "
                "there, found none. Write it with `python -m save_jax.cache --config=… "
                f"--init_from=… --out={directory}`, or leave config.cache.dir empty."
            )

        say(coverage.line(self._splits.values()))
        if left_out := coverage.check_training(split, self._config):
            say(left_out)

        def batches(start_step: int, total_steps: int) -> Iterator[Batch]:
            read = self._pipeline.train_batches(
                split,
                batch_size=self._config["batch_size"],
                seed=self._config["seed"],
                start_step=start_step,
                total_steps=total_steps,
                teacher=bool(self._config["loss"]["soft_albef_weight"])
                and "teacher" not in self._cached_parts(split),
                share=self._share(self._config["batch_size"]),
                **self._reading(split),
            )
            return self._with_cache(split, read)

        per_epoch = self._pipeline.steps_per_epoch(split, self._config["batch_size"])
        say(
            f"training on {counted(split.num_clips, 'clip')}, "
            f"{counted(split.num_pairs, 'caption')}: {counted(per_epoch, 'step')} per epoch"
        )
        return train.TrainingSet(batches, per_epoch, lambda row: split.video_ids[row])

    def test(self) -> evaluate.EvaluationSet | None:
        """Opens the split that reports what the evaluation split chose, if the config names one.

        Raises:
            UserError: as `evaluation`.
        """
        name = self._config["data"]["test_split"]
        return self.evaluation(name) if name else None

    def evaluation(self, name: str = "") -> evaluate.EvaluationSet:
        """Opens the evaluation split, and warns of what its results will not show.

        Args:
            name: another split to evaluate.

        Raises:
            UserError: it cannot be used, has no captions, or was made as no run can be evaluated.
        """
        split = self._open(name or self._config["data"]["eval_split"])
        if self._config["mode"] != "train":
            say(coverage.line([split]))
        table = self._stored.caption_table(split)
        clips = counted(split.num_clips, "clip")
        if not table.texts:
            raise UserError(
                f"expected captions in the split {split.name!r}, found {clips} "
                "without any: there is nothing to rank them by. "
                "Add captions to the annotations (captions.csv for your own folder) and prepare "
                "again, or evaluate another split: --config.data.eval_split=NAME"
            )
        max_words = self._config["data"]["max_words"]
        data = {
            **self._made(split),
            "digest": self._digest(split),
            "clips_with": coverage.percentages(split),
        }
        trained_on = self._config.get(recorded.PROVENANCE, {}).get("data", {})
        warnings = [
            *coverage.lacking(split, self._model),
            *recorded.differences_of_data(split.name, data, trained_on),
        ]
        for words in warnings:
            warn(words)
        size = sharding.even_size(
            split.num_clips, self._config["eval_batch_size"], jax.device_count()
        )

        def batches() -> Iterator[Batch]:
            read = self._pipeline.clip_batches(
                split, batch_size=size, share=self._share(size), **self._reading(split)
            )
            return self._with_cache(split, read)

        return evaluate.EvaluationSet(
            split.name,
            batches,
            split.video_ids,
            table.texts,
            self._tokenizer(table.texts, max_words),
            table.video_rows,
            table.groups,
            recorded.protocol(self._config, self._model.attention, data, warnings),
        )


def open_splits(config: dict[str, Any]) -> Splits:
    """Opens the splits of a config; those of the demo are made where they are not there yet.

    Raises:
        UserError: packages that read data are not installed.
    """
    if config["data"]["dataset"] == "demo":
        _prepare_demo(config)
    return Splits(config)


def _prepare_demo(config: dict[str, Any]) -> None:
    """Makes the demo's clips and prepares them, unless that is done already."""
    from data_pipelines.preparation import prepare
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
