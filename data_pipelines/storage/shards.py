"""Shards: some clips of a split and the file of their records, the unit of work and of resuming.

A split's clips are cut into shards before any work is done. A shard is done once its records are
written and then its note, a small JSON file with the results of its clips and a fingerprint of what
they were made from. So a preparation may be interrupted at any moment: the next one writes the
missing shards, and the result has the same bytes.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from data_pipelines import outages, sidecars
from data_pipelines.datasets.types import Clip, Problem
from data_pipelines.modalities.record import Record, read_records
from data_pipelines.recipe import Recipe
from data_pipelines.storage import tfds_format
from save_jax.files import is_remote
from save_jax.messages import counted

# Few clips per shard, so that an interruption costs little and many machines find work; but readers
# keep all files of a split open, and a process may usually open 1,024.
CLIPS_PER_SHARD = 64
MOST_SHARDS = 512

# What the index keeps of a record: all but the heavy arrays.
INDEX_FIELDS = (
    "video_id",
    "captions",
    "groups",
    "transcript",
    "has_audio",
    "has_teacher",
    "num_frames",
)

# Raised whenever the stored form of a clip changes while its recipe does not.
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Shard:
    """Some clips of a split, and where their records go.

    Attributes:
        directory: the folder of the records.
        notes: the folder of the notes on shards that are done.
        dataset: the data set's name.
        split: the split's name.
        number: which shard of the split this is, from 0.
        of: how many there are.
        recipe: what to make of the media.
        clips: the clips.
    """

    directory: str
    notes: str
    dataset: str
    split: str
    number: int
    of: int
    recipe: Recipe
    clips: tuple[Clip, ...]

    @property
    def name(self) -> str:
        return tfds_format.record_file(self.dataset, self.split, self.number, self.of)

    @property
    def records_path(self) -> str:
        return os.path.join(self.directory, self.name)

    @property
    def note_path(self) -> str:
        return os.path.join(self.notes, f"{self.name}.json")

    @property
    def plan_path(self) -> str:
        return os.path.join(self.notes, f"{self.name}.plan.json")


@dataclasses.dataclass(frozen=True)
class Note:
    """The results of a shard.

    Attributes:
        fingerprint: hash of what it was made from.
        index: INDEX_FIELDS of each record.
        problems: the split, a clip's id and what is wrong with its files, for each fault.
        num_bytes: size of all records.
        file_size: size of the file that holds them, in bytes.
    """

    fingerprint: str
    index: list[dict[str, Any]]
    problems: list[tuple[str, str, str]]
    num_bytes: int
    file_size: int
    digest: str


def cut(
    splits: Mapping[str, Sequence[Clip]],
    *,
    directory: str,
    notes: str,
    dataset: str,
    recipe: Recipe,
) -> list[Shard]:
    """Cuts the clips of all splits into shards; a split without clips has none."""
    shards = []
    for split, clips in splits.items():
        size = max(CLIPS_PER_SHARD, -(-len(clips) // MOST_SHARDS))
        starts = range(0, len(clips), size)
        shards += [
            Shard(
                directory=directory,
                notes=notes,
                dataset=dataset,
                split=split,
                number=number,
                of=len(starts),
                recipe=recipe,
                clips=tuple(clips[start : start + size]),
            )
            for number, start in enumerate(starts)
        ]
    return shards


def fingerprints(shards: Sequence[Shard]) -> list[str]:
    """Hashes for each shard everything that decides its records.

    This is the recipe, the version of the code, the annotations of its clips, and the sizes and
    times of their files; for a folder of images, their names and its time.
    """
    # Each needs the status of a few hundred files, which may be remote.
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return list(pool.map(_fingerprint, shards))


def note_if_done(shard: Shard, fingerprint: str) -> Note | None:
    """Returns the note of a shard that is done with the same clips and files; otherwise None."""
    note = tfds_format.read_json(shard.note_path)
    if note is None or note["fingerprint"] != fingerprint or "digest" not in note:
        return None  # an earlier version took no digest
    stamp = _stamp(shard.records_path)
    if not stamp or stamp[0] != note["file_size"]:
        return None
    return Note(**note | {"problems": [tuple(problem) for problem in note["problems"]]})


def write(
    shard: Shard, fingerprint: str, records: Iterable[Record], *, strict: bool = False
) -> None:
    """Writes the records of a shard, and then its note.

    Args:
        shard: the shard.
        fingerprint: its fingerprint, taken before its files were read.
        records: one for each of its clips, in their order; consumed one by one.
        strict: raise UserError at the first problem, and write nothing.
    """
    index, problems, num_bytes, digest = [], [], 0, hashlib.sha256()

    def serialized():
        nonlocal num_bytes
        for record in records:
            its = [(shard.split, record.clip.video_id, problem) for problem in record.problems]
            problems.extend(its)
            sidecars.check(shard.dataset, its, strict)
            if record.features is None:
                continue
            index.append({field: record.features[field] for field in INDEX_FIELDS})
            example = tfds_format.serialize(record.features, shard.recipe)
            num_bytes += len(example)
            digest.update(example)
            yield example

    file_size = tfds_format.write_records(shard.records_path, serialized())
    _check_still_there(shard, fingerprint, problems)
    note = Note(fingerprint, index, problems, num_bytes, file_size, digest.hexdigest())
    tfds_format.write_file(shard.note_path, json.dumps(dataclasses.asdict(note)).encode())


def _check_still_there(shard: Shard, fingerprint: str, problems: list[Problem]) -> None:
    """Raises OutageError if files were absent when read that existed before or exist now.

    When a mount is lost during the work, each of its files seems not to exist.
    """
    absent = [words for _, _, words in problems if words.endswith("the file does not exist")]
    if not absent:
        return
    there = [path for clip in shard.clips for path in _files(clip) if path and _stamp(path)]
    back = [path for path in there if any(f" {path}: " in words for words in absent)]
    if back or _fingerprint(shard) != fingerprint:
        raise outages.in_words(
            back[0] if back else shard.records_path,
            f"{counted(len(absent), 'file')} disappeared between the start of the work and its "
            f"reading, the first: {absent[0]}",
            "Check that the disk or the mount is there",
        )


def _files(clip: Clip) -> tuple[str | None, ...]:
    return clip.video, clip.audio, clip.teacher_video, clip.teacher_audio


def write_plan(shard: Shard, fingerprint: str) -> None:
    """Writes everything that `write_planned` needs to know about a shard."""
    plan = {"fingerprint": fingerprint, "shard": dataclasses.asdict(shard)}
    tfds_format.write_file(shard.plan_path, json.dumps(plan).encode())


def write_planned(plan_path: str, workers: int) -> None:
    """Reads the media and writes the records of a planned shard: the work of one Beam worker.

    Args:
        plan_path: where `write_plan` wrote it.
        workers: processes that read media; 1 = this one.
    """
    plan = json.loads(epath.Path(plan_path).read_text())
    fields = plan["shard"]
    clips = tuple(
        Clip(**clip | {"captions": tuple(clip["captions"]), "groups": tuple(clip["groups"])})
        for clip in fields["clips"]
    )
    shard = Shard(**fields | {"clips": clips, "recipe": Recipe(**fields["recipe"])})
    if note_if_done(shard, plan["fingerprint"]) is None:
        write(shard, plan["fingerprint"], read_records(clips, shard.recipe, workers))


def _fingerprint(shard: Shard) -> str:
    known = {
        "format": _FORMAT,
        "recipe": shard.recipe.to_json(),
        "clips": [dataclasses.asdict(clip) for clip in shard.clips],
        "files": [_stamp(path) for clip in shard.clips for path in _files(clip)],
    }
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _stamp(path: str | None) -> list[Any]:
    """Returns size and time of a file, or time and names of a folder; [] when there is none.

    Raises:
        OutageError: the store or disk cannot say now.
    """
    if not path:
        return []
    try:
        with outages.reaching(path):
            if is_remote(path):
                status = epath.Path(path).stat()
                size, time, is_folder = status.length, status.mtime, status.is_directory
            else:
                status = os.stat(path)
                size, time, is_folder = status.st_size, status.st_mtime_ns, os.path.isdir(path)
            if is_folder:
                return [time, sorted(entry.name for entry in epath.Path(path).iterdir())]
    except OSError:  # reading it will report the reason
        return []
    return [size, time]
