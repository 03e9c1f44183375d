"""Checks a prepared directory and a data set's files, and prints what training would lack."""

import collections
import dataclasses
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from array_record.python import array_record_data_source
from etils import epath
from PIL import Image

from data_pipelines import datasets, outages
from data_pipelines.datasets.types import Clip
from data_pipelines.modalities import teacher, teacher_files
from data_pipelines.modalities.transcripts import read_asr
from data_pipelines.recipe import Recipe
from data_pipelines.storage import tfds_format
from data_pipelines.tables import of_teacher, table
from save_jax.errors import UserError
from save_jax.files import is_remote
from save_jax.messages import counted

_EXAMPLES = 3  # clips named per kind of fault
_MOST_LINES = 8  # printed about what stops training


def verify(
    directory: epath.Path,
    recipe: Recipe | None,
    dataset: str,
    variant: str,
    root: str,
    out: str,
    transcripts: str = "",
) -> bool:
    """Prints what is prepared, what the data set's files lack, and what stops training.

    Every record is read and parsed, which also verifies its checksum, and its first frame decoded;
    every vector of the teacher is read. Videos are only checked for existence.

    Args:
        directory: the prepared directory, which may be absent.
        recipe: what it was prepared by; None = it is absent or incomplete.
        dataset: the data set's name.
        variant: the name of its variant.
        root: the folder of its files; "" = check only what is prepared.
        out: the folder of prepared data sets.
        transcripts: their source, as recorded or as it will be; "none" = they are not missed.

    Returns:
        Whether nothing stops training.
    """
    stops: list[str] = []
    prepared: dict[str, list[dict[str, Any]]] = {}
    if recipe is not None:
        prepared = _check_prepared(directory, recipe, stops)
    wrong = ""
    if root:
        try:
            _check_files(dataset, variant, root, out, prepared if recipe else None, transcripts)
        except UserError as error:
            wrong = str(error)
    if recipe is None:
        stops += [wrong] if wrong else []
        first = "correct the file first, then run" if wrong else "run"
        stops.append(f"{directory} is not prepared, or not completely: {first} without --verify")
    elif wrong:  # training reads only what is prepared
        print(f"{root}: {wrong}")
    if recipe or (root and not wrong):
        print(of_teacher("teacher, vector"))
    if recipe and not any(entry["captions"] for entry in prepared.get("train", [])):
        stops.append("no clip of the split 'train' has a caption: there is nothing to train on")
    if not stops:
        print("Nothing stops training.")
        return True
    print(f"{len(stops)} thing{'s stop' if len(stops) > 1 else ' stops'} training:")
    for line in stops[:_MOST_LINES]:
        print(f"  {line}")
    if len(stops) > _MOST_LINES:
        print(f"  and {len(stops) - _MOST_LINES} more")
    return False


def _check_prepared(
    directory: epath.Path, recipe: Recipe, stops: list[str]
) -> dict[str, list[dict[str, Any]]]:
    """Prints what is prepared; returns the index of each split that has one."""
    try:
        info = tfds.builder_from_directory(os.fspath(directory)).info
    except Exception as error:  # a damaged file may raise anything
        outages.pass_on(error, directory)
        stops.append(f"{directory}: TFDS cannot read its metadata: {_first_line(error)}")
        return {}
    indices, counts = {}, {}
    total = info.splits.total_num_examples
    with tqdm.tqdm(total=total, desc="checking records", unit="clip") as progress:
        for split, its in info.splits.items():
            index = tfds_format.read_json(os.fspath(directory / f"index-{split}.json"))
            if index is None:
                stops.append(f"index-{split}.json is absent or damaged")
                continue
            indices[split] = index
            if len(index) != its.num_examples:
                stops.append(f"{split}: {len(index)} clips in the index, {its.num_examples} stored")
            entries = iter(index)
            readable = 0
            for path, length in zip(its.filepaths, its.shard_lengths, strict=True):
                expected = [next(entries, {}) for _ in range(length)]
                its_readable, wrong = _check_records(path, expected, recipe)
                progress.update(length)
                readable += its_readable
                stops += [f"{path.name}: {words}" for words in wrong]
            counts[split] = {
                "prepared": len(index),
                "readable": readable,
                "captions": sum(len(entry["captions"]) for entry in index),
                "without caption": sum(not entry["captions"] for entry in index),
                "without audio": sum(not entry["has_audio"] for entry in index),
                "without transcript": sum(not entry["transcript"] for entry in index),
                "without teacher": sum(not entry["has_teacher"] for entry in index),
            }
    made_by = ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(recipe).items())
    print(f"{directory}: {made_by}")
    if counts:
        print(table(counts))
    return indices


def _check_records(
    path: epath.Path, expected: Sequence[dict[str, Any]], recipe: Recipe
) -> tuple[int, list[str]]:
    """Returns how many records of a file match the index, and what is wrong with the others."""
    if not outages.exists(path):
        return 0, ["the file is absent"]
    with outages.temporary(), tempfile.TemporaryDirectory() as scratch:
        local = os.fspath(path)
        if is_remote(local):  # array_record reads files of this machine only
            local = os.path.join(scratch, path.name)
            path.copy(local)
        try:
            records = array_record_data_source.ArrayRecordDataSource([local])
        except (RuntimeError, ValueError, IndexError) as error:
            outages.pass_on(_told(error), path)
            return 0, [f"it cannot be read: {_first_line(error)}"]
        with records:
            if len(records) != len(expected):
                return 0, [f"expected {len(expected)} records, found {len(records)}"]
            wrong = []
            for position, entry in enumerate(expected):
                words = _wrong_record(records, position, entry, recipe)
                if words:
                    wrong.append(f"record {position} ({entry.get('video_id', 'unknown')}): {words}")
    return len(expected) - len(wrong), wrong


def _wrong_record(records: Any, position: int, entry: dict[str, Any], recipe: Recipe) -> str | None:
    """Describes what is wrong with a record; None when nothing is."""
    try:
        example = tfds_format.features(recipe).deserialize_example_np(records[position])
    except Exception as error:  # a damaged file may raise anything
        outages.pass_on(_told(error), "the records")
        return f"it cannot be read: {_first_line(error)}"
    record = cast("dict[str, Any]", example)
    video_id = record["video_id"].decode()
    if video_id != entry.get("video_id"):
        return f"expected the clip {entry.get('video_id')!r} of the index, found {video_id!r}"
    frames = record["frames"]
    if not 1 <= len(frames) == record["num_frames"] <= recipe.max_frames:
        return (
            f"expected 1 to {recipe.max_frames} frames and their number, found "
            f"{counted(len(frames), 'frame')} and the number {record['num_frames']}"
        )
    size = recipe.image_size
    try:
        if recipe.encoding == "raw":
            shape = np.frombuffer(frames[0], np.uint8).reshape(size, size, 3).shape
        else:
            with Image.open(io.BytesIO(frames[0]), formats=("JPEG",)) as image:
                shape = np.asarray(image).shape
    except (OSError, ValueError) as error:
        return f"its first frame cannot be decoded: {_first_line(error)}"
    if shape != (size, size, 3):
        return f"its first frame has shape {shape}, expected {(size, size, 3)}"
    if not np.isfinite(record["fbank"]).all():
        return "its filterbank is not finite"
    return None


def _check_files(
    dataset: str,
    variant: str,
    root: str,
    out: str,
    prepared: dict[str, list[dict[str, Any]]] | None,
    transcripts: str,
) -> None:
    """Prints which of the data set's own files are missing, and which clips are not prepared."""
    module = datasets.load_dataset(dataset)
    annotations = module.read_annotations(root, variant)
    asr = module.asr_file(root)
    wanted = transcripts != "none"
    spoken = set(read_asr(asr)) if wanted and outages.exists(asr) else None
    columns = ["video absent", "vector absent", "vector bad", "not transcribed", "not prepared"]
    if spoken is None:
        columns.remove("not transcribed")
    absent: dict[str, list[str]] = collections.defaultdict(list)
    counts = {}
    clips = sum(map(len, annotations.splits.values()))
    with tqdm.tqdm(total=clips, desc="checking files", unit="clip") as progress:
        for split, its in annotations.splits.items():
            ready = {entry["video_id"] for entry in (prepared or {}).get(split, [])}
            kinds = collections.Counter()
            for clip in its:
                progress.update()
                lacking = list(_lacking(clip, os.path.join(out, dataset, "ImageBind")))
                if spoken is not None and clip.video_id not in spoken:
                    lacking.append("not transcribed")
                if prepared is not None and clip.video_id not in ready:
                    lacking.append("not prepared")
                kinds.update(lacking)
                for kind in lacking:
                    absent[kind].append(clip.video_id)
            counts[split] = {"listed": len(its), **{column: kinds[column] for column in columns}}
    print(f"{root}:")
    print(table(counts))
    if wanted and spoken is None:
        how = "needs it" if transcripts == "file" else "would make one with Whisper"
        print(f"There is no file of transcripts at {asr}: preparing {how}.")
    for kind, names in absent.items():
        print(f"{kind}: {_some(names)}")
    if annotations.problems:
        words = [f"{name}: {words}" for _, name, words in annotations.problems]
        print(f"{counted(len(words), 'problem')} of the annotations: {_some(words)}")


def _lacking(clip: Clip, computed: str) -> Iterator[str]:
    """Yields what is missing or bad among a clip's files."""
    if not outages.exists(clip.video):
        yield "video absent"
    kinds = set()
    for given, folder in zip(
        (clip.teacher_video, clip.teacher_audio), teacher.FOLDERS.values(), strict=True
    ):
        path = given or os.path.join(computed, folder, f"{clip.video_id}.npy")
        if not outages.exists(path):
            kinds.add("vector absent")
            continue
        try:
            teacher_files.read_vector(path, Recipe.teacher_size)
        except teacher_files.VectorError:
            kinds.add("vector bad")
    yield from sorted(kinds)


def _some(names: Sequence[str]) -> str:
    """Joins the first few names and says how many there are."""
    return ", ".join(names[:_EXAMPLES]) + (
        f", … ({len(names)} in all)" if len(names) > _EXAMPLES else ""
    )


def _told(error: Exception) -> Exception:
    """Returns the system's error where array_record only quotes it, else the error itself."""
    told = tfds_format.system_error(error) if isinstance(error, RuntimeError) else None
    return told or error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:100]
