"""The splits of a prepared data set: which clips, captions and files of records each has."""

import dataclasses
import json
import os
import resource

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source
from etils import epath

from data_pipelines.prepared import metadata, prepared_by
from data_pipelines.recipe import Recipe, flags, version_directory
from data_pipelines.storage.local_copies import local_copies
from save_jax.errors import UserError
from save_jax.files import is_remote

# A split has up to 512 files of records, and training reads one split while evaluation reads
# another: the usual soft limit of 1,024 open files is too low, and a process may raise it.
_ENOUGH_FILES = 65_536
_soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
_most = _ENOUGH_FILES if _hard == resource.RLIM_INFINITY else min(_hard, _ENOUGH_FILES)
if _soft != resource.RLIM_INFINITY and _soft < _most:
    resource.setrlimit(resource.RLIMIT_NOFILE, (_most, _hard))


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a prepared data set: light facts in memory, heavy arrays on disk.

    Attributes:
        name: "train", "val" or "test".
        recipe: what made the stored arrays.
        record_paths: the files of its records, in order.
        video_ids: the clips, in the order of their records; a clip's place here is its row.
        captions: the captions of each clip.
        groups: for each clip, the group of each of its captions; "" = none.
        transcripts: what is said in each clip; "" = nothing.
        has_audio: bool [clips].
        has_teacher: bool [clips].
        content: digest of its records; "" = prepared by a version that took none.
        speech: source of the transcripts: "file", "none" or "whisper MODEL".
    """

    name: str
    recipe: Recipe
    record_paths: list[str]
    video_ids: list[str]
    captions: list[list[str]]
    groups: list[list[str]]
    transcripts: list[str]
    has_audio: np.ndarray
    has_teacher: np.ndarray
    content: str = ""
    speech: str = ""

    @property
    def num_clips(self) -> int:
        return len(self.video_ids)

    @property
    def num_pairs(self) -> int:
        """How many (clip, caption) pairs there are."""
        return sum(map(len, self.captions))


@dataclasses.dataclass(frozen=True)
class CaptionTable:
    """All captions of a split, clip by clip.

    Attributes:
        texts: the captions.
        video_rows: int32 [captions], the row of each caption's clip.
        groups: the group of each caption; "" = none.
    """

    texts: list[str]
    video_rows: np.ndarray
    groups: list[str]


def open_split(
    data_dir: str, dataset: str, variant: str, split: str, expected_recipe: dict[str, int | str]
) -> Split:
    """Opens a split that data_pipelines.prepare has written.

    Args:
        data_dir: the --out of data_pipelines.prepare.
        dataset: the data set's name.
        variant: the name of its variant.
        split: "train", "val" or "test".
        expected_recipe: fields of Recipe, and the values that the model needs.

    Raises:
        UserError: the split is not prepared, was prepared by another recipe, or lacks files.
    """
    directory = version_directory(data_dir, dataset, variant, Recipe.version)
    if not (directory / "metadata.json").exists():
        raise UserError(
            f"expected {dataset} {variant} prepared in {data_dir}, did not find "
            f"{directory / 'metadata.json'}. Prepare it with\n  python -m data_pipelines.prepare "
            f"{dataset} --root=ROOT --out={data_dir} --variant={variant} "
            f"{flags(expected_recipe)}\n"
            "where ROOT is the folder of the data set's own files; or set --config.data.dir to the "
            "folder where it is prepared."
        )
    recipe = prepared_by(directory)
    recipe.check(expected_recipe, str(directory), of_config=True)
    index = _read_index(directory, split)
    paths = _record_paths(directory, split)
    facts = metadata(directory)
    return Split(
        name=split,
        recipe=recipe,
        record_paths=paths,
        video_ids=[entry["video_id"] for entry in index],
        captions=[entry["captions"] for entry in index],
        groups=[entry["groups"] for entry in index],
        transcripts=[entry["transcript"] for entry in index],
        has_audio=np.array([entry["has_audio"] for entry in index], bool),
        has_teacher=np.array([entry["has_teacher"] for entry in index], bool),
        content=facts.get("content", {}).get(split, ""),
        speech=facts.get("transcripts", ""),
    )


def records_sample(split: Split, count: int) -> list[bytes]:
    """Reads up to `count` records as they are stored, evenly spread over the split."""
    if not split.num_clips:
        return []
    rows = np.unique(np.linspace(0, split.num_clips - 1, count, dtype=int))
    with array_record_data_source.ArrayRecordDataSource(split.record_paths) as records:
        return [records[int(row)] for row in rows]


def caption_table(split: Split) -> CaptionTable:
    """Lists all captions of a split with the rows of their clips."""
    return CaptionTable(
        texts=[caption for captions in split.captions for caption in captions],
        video_rows=np.repeat(
            np.arange(split.num_clips, dtype=np.int32), [len(c) for c in split.captions]
        ),
        groups=[group for groups in split.groups for group in groups],
    )


def _read_index(directory: epath.Path, split: str) -> list[dict]:
    path = directory / f"index-{split}.json"
    if not path.exists():
        there = sorted(p.stem.removeprefix("index-") for p in directory.glob("index-*.json"))
        raise UserError(
            f"expected the split {split!r} in {directory}, did not find {path.name}; the splits "
            f"there: {', '.join(there) or 'none'}. --config.data.train_split and "
            "--config.data.eval_split choose among them."
        )
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path}: expected the index that data_pipelines.prepare wrote, found malformed JSON "
            f"({error}). Remove {directory} and prepare again."
        ) from error


def _record_paths(directory: epath.Path, split: str) -> list[str]:
    """Returns the files of a split's records, in order; raises UserError naming absent ones.

    array_record reads local files only, in random order: of remote files, these are local copies.
    """
    info = tfds.builder_from_directory(directory).info.splits[split]
    paths = [os.fspath(path) for path in info.filepaths]
    absent = [path for path in paths if not epath.Path(path).exists()]
    if absent:
        raise UserError(
            f"{directory}: expected {len(paths)} files of records, did not find\n"
            + "\n".join(f"  {path}" for path in absent)
            + f"\nCopy them there too, or remove {directory} and prepare again."
        )
    return local_copies(paths) if is_remote(directory) else paths
