"""Writes prepared clips: one tensorflow_datasets builder for every data set.

A prepared directory is `OUT/dataset/variant/version/`. Beside TFDS's own files it holds
`index-SPLIT.json`, all that training start-up needs of the records without reading them, and
`problems.csv`, which names every clip whose files were not all usable.
"""

import contextlib
import csv
import io
import itertools
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf
import tensorflow_datasets as tfds
import tqdm

from data_pipelines.datasets.clip import Clip
from data_pipelines.recipe import Recipe, version_directory
from data_pipelines.records import Record, read_records
from save_jax.errors import UserError

_log = logging.getLogger(__name__)

# What the sidecar index keeps of a record: all but the heavy arrays.
INDEX_FIELDS = (
    "video_id",
    "captions",
    "groups",
    "transcript",
    "has_audio",
    "has_teacher",
    "num_frames",
)


class ClipsBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Prepares the clips of one variant of one data set.

    Its metadata holds the recipe, and counts a split of what was prepared and what went wrong.
    """

    def __init__(
        self,
        *,
        out: str,
        dataset: str,
        variant: str,
        recipe: Recipe,
        splits: dict[str, Sequence[Clip]],
        workers: int,
        strict: bool,
    ):
        """Prepares nothing yet: `build` does.

        Args:
            out: the folder that holds all prepared data sets.
            dataset: the data set's name.
            variant: the name of its variant.
            recipe: what to make of the media.
            splits: the clips of each split.
            workers: processes that read media.
            strict: raise UserError on the first file that is not usable.
        """
        self.name = dataset
        self._recipe = recipe
        self._splits = splits
        self._workers = workers
        self._strict = strict
        self._problems: list[tuple[str, str, str]] = []
        logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS's remarks are for its developers
        tfds.disable_progress_bar()
        version = version_directory(out, dataset, variant, recipe.version).name
        super().__init__(
            data_dir=out,
            config=tfds.core.BuilderConfig(name=variant, version=version),
            file_format="array_record",
        )

    def build(self) -> None:
        """Prepares all splits; the directory appears once all is done.

        Raises:
            UserError: no clip of a split is usable, or with `strict`, one is not.
        """
        # One stream for all splits, which TFDS asks for one after the other, so that the worker
        # processes start once.
        clips = itertools.chain.from_iterable(self._splits.values())
        self._records = read_records(clips, self._recipe, self._workers)
        with (
            contextlib.closing(self._records),
            # TFDS speaks of downloads and makes a folder for them, though there are none.
            contextlib.redirect_stdout(io.StringIO()),
            tempfile.TemporaryDirectory() as download_dir,
        ):
            self.download_and_prepare(download_dir=download_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        recipe = self._recipe
        strings = tfds.features.Sequence(tfds.features.Tensor(shape=(), dtype=tf.string))
        vector = tfds.features.Tensor(shape=(recipe.teacher_size,), dtype=tf.float32)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Clips prepared for SAVE: save_jax's data_pipelines.",
            features=tfds.features.FeaturesDict(
                {
                    "video_id": tfds.features.Text(),
                    "frames": strings,
                    "num_frames": tf.int32,
                    "fbank": tfds.features.Tensor(
                        shape=(recipe.fbank_frames, recipe.mel_bins),
                        dtype=tf.float16,
                        encoding=tfds.features.Encoding.BYTES,
                    ),
                    "has_audio": tf.bool,
                    "transcript": tfds.features.Text(),
                    "captions": strings,
                    "groups": strings,
                    "teacher_video": vector,
                    "teacher_audio": vector,
                    "has_teacher": tf.bool,
                }
            ),
            metadata=tfds.core.MetadataDict(recipe=json.loads(recipe.to_json()), counts={}),
            disable_shuffling=True,  # the index names records by their position
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {split: self._generate_examples(split) for split in self._splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the usable clips of a split, then writes its index, counts and problems.

        Raises:
            UserError: no clip is usable, or with `strict`, one is not.
        """
        clips = self._splits[split]
        index = []
        # TFDS keeps the order of its keys, and sorts them bucket by bucket, a bucket being a range
        # of 128-bit keys: 0, 1, 2, … would all meet in one, the whole split in memory.
        spacing = 2**128 // (len(clips) + 1)
        with tqdm.tqdm(
            itertools.islice(self._records, len(clips)),
            desc=f"{self.name} {split}",
            total=len(clips),
            unit="clip",
        ) as records:
            for record in records:
                self._note_problems(split, record)
                if record.features is None:
                    continue
                yield len(index) * spacing, record.features
                index.append({field: record.features[field] for field in INDEX_FIELDS})
        if not index:
            reason = self._problems[-1][2] if clips else "none is listed"
            raise UserError(
                f"{self.name}, split {split!r}: expected clips to prepare, found none usable among "
                f"{len(clips)}; the last one: {reason}. Are the videos where the data set's layout "
                "puts them?"
            )
        self._write(split, index)

    def _note_problems(self, split: str, record: Record) -> None:
        if record.problems and self._strict:
            raise UserError(
                f"{self.name}, split {split!r}, clip {record.clip.video_id}: expected usable "
                f"files, found: {'; '.join(record.problems)}. Mend the file, or prepare without "
                "--strict."
            )
        for problem in record.problems:
            self._problems.append((split, record.clip.video_id, problem))

    def _write(self, split: str, index: list[dict[str, Any]]) -> None:
        """Writes what lies beside the records; TFDS moves it all into place when all is done."""
        (self.data_path / f"index-{split}.json").write_text(json.dumps(index))
        with (self.data_path / "problems.csv").open("w") as file:
            csv.writer(file).writerows([("split", "video_id", "problem"), *self._problems])
        problems = [problem for its_split, _, problem in self._problems if its_split == split]
        self.info.metadata["counts"][split] = {
            "listed": len(self._splits[split]),
            "prepared": len(index),
            "left out": len(self._splits[split]) - len(index),
            "captions": sum(len(entry["captions"]) for entry in index),
            "without audio": sum(not entry["has_audio"] for entry in index),
            "without transcript": sum(not entry["transcript"] for entry in index),
            "without teacher": sum(not entry["has_teacher"] for entry in index),
            "problems": len(problems),
        }
        if problems:
            _log.warning(
                "%s, split %s: %d problems with the clips' files; all are in problems.csv beside "
                "the data. The first: %s",
                self.name,
                split,
                len(problems),
                problems[0],
            )
