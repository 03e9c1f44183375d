"""Writes the records of a data set, shard by shard, and then their index and metadata."""

import contextlib
import csv
import hashlib
import io
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence

import tqdm
from etils import epath

from data_pipelines import outages, prepared, sidecars
from data_pipelines.datasets.types import Problem
from data_pipelines.modalities.record import Record, read_records
from data_pipelines.recipe import Recipe
from data_pipelines.sidecars import Sources
from data_pipelines.storage import shards, tfds_format
from data_pipelines.storage.shards import Note, Shard
from save_jax import files
from save_jax.errors import UserError
from save_jax.messages import counted

_log = logging.getLogger(__name__)

_PROBLEMS = "problems.csv"
_EXAMPLES = 5  # problems that the message names


def build(
    directory: epath.Path,
    dataset: str,
    variant: str,
    recipe: Recipe,
    found: Sources,
    *,
    workers: int,
    strict: bool,
    beam_runner: str,
    beam_options: str,
) -> None:
    """Writes what is missing of a prepared directory, which gets its name once it is complete.

    Args:
        directory: the prepared directory to write.
        dataset: the data set's name.
        variant: the name of its variant.
        recipe: decides the stored arrays.
        found: its clips.
        workers: processes that read media; with Beam, for each of the runner's workers.
        strict: raise UserError on the first file that is not usable.
        beam_runner: Beam's runner; "" = this machine alone.
        beam_options: Beam's own options.

    Raises:
        UserError: no clip of a split is usable, or with `strict`, one is not.
        OutageError: the machine or a store fails; finished shards are kept.
    """
    work, notes = prepared.work_directory(directory), prepared.notes_directory(directory)
    for folder in (work, notes):
        folder.mkdir(parents=True, exist_ok=True)
    all_shards = shards.cut(
        found.splits, directory=str(work), notes=str(notes), dataset=dataset, recipe=recipe
    )
    tfds_format.remove_others(str(work), [shard.name for shard in all_shards])
    tfds_format.remove_others(str(notes), [os.path.basename(s.note_path) for s in all_shards])
    prints = shards.fingerprints(all_shards)
    todo = [
        (shard, its_print)
        for shard, its_print in zip(all_shards, prints, strict=True)
        if shards.note_if_done(shard, its_print) is None
    ]
    clips = sum(len(shard.clips) for shard in all_shards)
    done = clips - sum(len(shard.clips) for shard, _ in todo)
    sidecars.announce(
        "frames and sound",
        f"{counted(clips, 'clip')} in {counted(len(all_shards), 'shard')}"
        + (f", {done} done already" if done else "")
        + (f", with Beam's {beam_runner}" if beam_runner else ""),
    )
    if todo and beam_runner:
        from data_pipelines.storage import beam

        beam.write(todo, runner=beam_runner, options=beam_options, workers=workers)
    elif todo:
        with tqdm.tqdm(
            total=clips, initial=done, desc=f"{dataset} {variant}", unit="clip"
        ) as progress:
            _write_here(todo, recipe, workers, strict, progress)

    sidecars.announce("index and metadata", str(directory))
    found_notes = [shards.note_if_done(*pair) for pair in zip(all_shards, prints, strict=True)]
    all_notes = [note for note in found_notes if note is not None]
    if len(all_notes) < len(all_shards):
        raise UserError(
            f"{work}: expected all {len(all_shards)} shards there, found "
            f"{len(all_shards) - len(all_notes)} absent or changed meanwhile. Run the same command "
            "again to make them."
        )
    # A file's faulty sound may have been reported twice, by Whisper and by its filterbank.
    problems = [*found.problems, *(problem for note in all_notes for problem in note.problems)]
    problems = list(dict.fromkeys(problems))
    sidecars.check(dataset, problems, strict)  # some shards may have been written without it
    by_split = {
        split: [n for s, n in zip(all_shards, all_notes, strict=True) if s.split == split]
        for split in found.splits
    }
    _check_usable(work, dataset, found, by_split, problems)
    _describe(work, directory.name, dataset, variant, recipe, found, by_split, problems)
    if work != directory:
        files.rename(work, directory)
    prepared.clean_up(directory)
    if problems:
        _log.warning(
            "%s %s: %s, listed in %s. The first: %s: %s",
            dataset,
            variant,
            counted(len(problems), "problem"),
            directory / "problems.csv",
            *problems[0][1:],
        )


def _write_here(
    todo: Sequence[tuple[Shard, str]],
    recipe: Recipe,
    workers: int,
    strict: bool,
    progress: tqdm.tqdm,
) -> None:
    """Reads the media of shards and writes their records on this machine."""
    # One stream of records for all shards, so that the workers are not idle at the end of each.
    clips = itertools.chain.from_iterable(shard.clips for shard, _ in todo)
    records = read_records(clips, recipe, workers)

    def counted() -> Iterator[Record]:
        for record in records:
            progress.update()
            yield record

    with contextlib.closing(records):
        stream = counted()
        for shard, its_print in todo:
            its_records = itertools.islice(stream, len(shard.clips))
            shards.write(shard, its_print, its_records, strict=strict)


def _check_usable(
    work: epath.Path,
    dataset: str,
    found: Sources,
    notes: dict[str, list[Note]],
    problems: list[Problem],
) -> None:
    """Raises UserError naming the splits without a usable clip, once all problems are written."""
    empty = [split for split in found.splits if not any(note.index for note in notes[split])]
    if not empty:
        return
    path = work / _PROBLEMS
    with tfds_format.writing(str(work)):
        tfds_format.write_file(str(path), _as_csv(problems))
    message = ""
    for split in empty:
        listed = len(found.splits[split])
        message += f"{dataset}, split {split!r}: expected usable clips, found none among {listed}\n"
        lines = [f"  {name}: {words}\n" for home, name, words in problems if home == split]
        message += "".join(lines[:_EXAMPLES])
        if len(lines) > _EXAMPLES:
            message += f"  and {len(lines) - _EXAMPLES} more\n"
    raise UserError(
        f"{message}All problems are listed in {path}. Repair these files, or put them where the "
        "data set's layout has them, and run the same command again: it keeps what is finished."
    )


def _as_csv(problems: list[Problem]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("split", "video_id", "problem"), *problems])
    return text.getvalue().encode("utf-8", "surrogateescape")  # names of files


def _describe(
    work: epath.Path,
    version: str,
    dataset: str,
    variant: str,
    recipe: Recipe,
    found: Sources,
    notes: dict[str, list[Note]],
    problems: list[Problem],
) -> None:
    """Writes the index of the records, the problems and, last, the metadata."""
    counts, sizes, content = {}, {}, {}
    with outages.temporary(), tempfile.TemporaryDirectory() as scratch:
        for split, clips in found.splits.items():
            index = [entry for note in notes[split] for entry in note.index]
            its_problems = [problem for problem in problems if problem[0] == split]
            with open(os.path.join(scratch, f"index-{split}.json"), "w") as file:
                json.dump(index, file)
            sizes[split] = tfds_format.SplitSize(
                [len(note.index) for note in notes[split]],
                sum(note.num_bytes for note in notes[split]),
            )
            digests = "".join(note.digest for note in notes[split])
            content[split] = hashlib.sha256(digests.encode()).hexdigest()
            counts[split] = {
                "listed": len(clips),
                "prepared": len(index),
                "left out": len(clips) - len(index),
                "captions": sum(len(entry["captions"]) for entry in index),
                "without audio": sum(not entry["has_audio"] for entry in index),
                "without transcript": sum(not entry["transcript"] for entry in index),
                "not transcribed": found.unheard[split],
                "without teacher": sum(not entry["has_teacher"] for entry in index),
                "problems": len(its_problems),
            }
        with open(os.path.join(scratch, _PROBLEMS), "wb") as file:
            file.write(_as_csv(problems))
        tfds_format.write_metadata(
            scratch,
            dataset=dataset,
            variant=variant,
            version=version,
            recipe=recipe,
            splits=sizes,
            metadata={
                "recipe": json.loads(recipe.to_json()),
                "transcripts": str(found.speech),
                "counts": counts,
                "content": content,  # a digest of each split's records
                "problems": len(problems),
            },
        )
        with tfds_format.writing(str(work)):
            # To readers, a directory with metadata.json is complete.
            for name in sorted(os.listdir(scratch), key=lambda name: name == "metadata.json"):
                tfds_format.copy_file(os.path.join(scratch, name), str(work / name))
