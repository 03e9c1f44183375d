"""A data set's annotations, transcripts and teacher vectors: all that precedes frames and sound.

Missing transcripts and vectors are made here, by Whisper and by ImageBind, and stored beside the
prepared data so that they can be reused.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from etils import epath

from data_pipelines import datasets, outages
from data_pipelines.datasets.types import Clip, Problem
from data_pipelines.modalities.transcripts import read_asr
from save_jax import locks
from save_jax.errors import UserError
from save_jax.messages import counted


class Speech(NamedTuple):
    """The source of transcripts.

    Attributes:
        source: "file", "whisper" or "none"; "" = the data set's file if there is one, otherwise
            Whisper.
        model: Whisper's model, an id or a local directory.
        translate: whether Whisper translates other languages to English.
    """

    source: str = ""
    model: str = "large-v3"
    translate: bool = False

    def __str__(self) -> str:
        if self.source != "whisper":
            return self.source
        return f"whisper {self.model_name}{', translated' if self.translate else ''}"

    @property
    def model_name(self) -> str:
        """The model's name, in a form that can be part of a file name."""
        if os.path.isdir(self.model):
            return os.path.basename(os.path.abspath(self.model))
        return self.model.replace("/", "--")


class Sources(NamedTuple):
    """A data set before its media are read.

    Attributes:
        splits: the clips of each split.
        problems: the faults found so far.
        unheard: how many clips of each split have no entry among the transcripts.
        speech: the source of the transcripts.
    """

    splits: dict[str, list[Clip]]
    problems: list[Problem]
    unheard: dict[str, int]
    speech: Speech


def read(
    dataset: str,
    variant: str,
    *,
    root: str,
    out: str,
    speech: Speech,
    imagebind: str,
    workers: int,
    strict: bool,
) -> Sources:
    """Reads the annotations, reads or makes transcripts, finds or makes the teacher's vectors.

    Args:
        dataset: the data set's name.
        variant: one of its variants.
        root: the folder of its files.
        out: the folder for prepared data; what is made here goes to OUT/DATASET/.
        speech: the source of transcripts.
        imagebind: path of imagebind_huge.pth; "" = no vectors are made.
        workers: number of processes; 0 = one per processor.
        strict: raise UserError on the first problem.

    Raises:
        UserError: a file that is needed is absent or malformed, or with `strict`, any is faulty.
        OutageError: the machine, its network or a store fails.
    """
    module = datasets.load_dataset(dataset)
    annotations = module.read_annotations(root, variant)
    splits, problems = annotations.splits, list(annotations.problems)
    check(dataset, problems, strict)

    folder = os.path.join(out, dataset)
    speech, texts, found = _read_speech(
        module.asr_file(root), _unique(splits), folder, speech, workers, strict
    )
    problems += _in_splits(found, splits)
    unheard = {
        split: sum(clip.video_id not in texts for clip in clips) for split, clips in splits.items()
    }
    splits = {
        split: [
            dataclasses.replace(clip, transcript=texts.get(clip.video_id, "")) for clip in clips
        ]
        for split, clips in splits.items()
    }
    vectors, found = _find_vectors(_unique(splits), folder, imagebind, workers, strict)
    problems += _in_splits(found, splits)
    splits = {
        split: [_with_vectors(clip, vectors[clip.video_id]) for clip in clips]
        for split, clips in splits.items()
    }
    check(dataset, problems, strict)
    return Sources(splits, problems, unheard, speech)


def check(dataset: str, problems: list[Problem], strict: bool) -> None:
    """Raises UserError for the first problem, if there is one and `strict` is set."""
    if strict and problems:
        split, name, words = problems[0]
        where = f"{dataset}, split {split!r}, clip {name}" if split else f"{dataset}, {name}"
        raise UserError(
            f"{where}: expected usable files, found: {words}. Repair or remove the file, or "
            "prepare without --strict."
        )


def announce(stage: str, words: str) -> None:
    """Tells the user that a stage begins."""
    print(f"{stage}: {words}", flush=True)


def _read_speech(
    asr_file: str, clips: list[Clip], folder: str, speech: Speech, workers: int, strict: bool
) -> tuple[Speech, dict[str, str], Sequence[Problem]]:
    """Returns the source of the transcripts, the text of each clip that has one, and problems."""
    if not speech.source:
        there = outages.exists(asr_file)
        speech = speech._replace(source="file" if there else "whisper")
    if speech.source == "none":
        announce("transcripts", "none")
        return speech, {}, ()
    if speech.source == "file":
        texts = read_asr(asr_file)
        announce("transcripts", f"{len(texts)} from {asr_file}")
        return speech, texts, ()

    from data_pipelines.modalities import whisper

    name = f"whisper-{speech.model_name}{'-translated' if speech.translate else ''}.json"
    path = os.path.join(folder, name)
    whisper.check_model(speech.model)
    announce(
        "transcripts",
        f"Whisper {speech.model} makes them, into {path}; copy it to {asr_file} to reuse it. "
        f"Whisper is avoided by --transcripts=none, or by a file of transcripts at {asr_file}",
    )
    summary = whisper.transcribe(
        clips,
        path,
        model=speech.model,
        translate=speech.translate,
        strict=strict,
        workers=workers,
    )
    print("  " + ", ".join(f"{number} {kind}" for kind, number in summary.counts.items()))
    return speech, read_asr(path), summary.problems


def _find_vectors(
    clips: list[Clip], folder: str, imagebind: str, workers: int, strict: bool
) -> tuple[dict[str, Clip], Sequence[Problem]]:
    """Returns the clips by id, with the vectors that exist or can be made, and problems."""
    given = {clip.video_id: clip for clip in clips}
    lacking = sum(not (clip.teacher_video and clip.teacher_audio) for clip in clips)
    if not imagebind:
        announce(
            "teacher vectors",
            f"missing for {lacking} of {counted(len(clips), 'clip')}"
            + ("; --imagebind=imagebind_huge.pth would compute them" if lacking else ""),
        )
        return given, ()

    # Only this part of preparation needs the model: JAX, and a reader of PyTorch's files.
    from data_pipelines.modalities import teacher
    from save_jax.models.imagebind import VARIANTS, make_embed
    from save_jax.weights.names.imagebind import loader

    folder = os.path.join(folder, "ImageBind")
    announce("teacher vectors", f"made by ImageBind for {counted(lacking, 'clip')}, into {folder}")
    embed = make_embed(VARIANTS["huge"], loader(imagebind))
    # The variants of a data set share the vectors: what another process computes is waited for.
    with locks.hold(epath.Path(folder), beside=epath.Path(f"{folder}.lock"), wait=True):
        computed, problems = teacher.compute(clips, folder, embed, workers=workers, strict=strict)
    return given | {clip.video_id: clip for clip in computed}, problems


def _in_splits(problems: Sequence[Problem], splits: dict[str, list[Clip]]) -> Iterator[Problem]:
    """Yields the problems of clips, once for each split that the clip is in."""
    homes: dict[str, list[str]] = {}
    for split, clips in splits.items():
        for clip in clips:
            homes.setdefault(clip.video_id, []).append(split)
    for split, name, words in problems:
        for home in [split] if split else homes.get(name, [""]):
            yield home, name, words


def _unique(splits: dict[str, list[Clip]]) -> list[Clip]:
    """Returns the clips of all splits in order, each id once."""
    clips: dict[str, Clip] = {}
    for its_clips in splits.values():
        for clip in its_clips:
            clips.setdefault(clip.video_id, clip)
    return list(clips.values())


def _with_vectors(clip: Clip, found: Clip) -> Clip:
    return dataclasses.replace(
        clip, teacher_video=found.teacher_video, teacher_audio=found.teacher_audio
    )
