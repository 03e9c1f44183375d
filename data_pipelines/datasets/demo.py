"""The demo corpus, as data_pipelines.demo_corpus makes it."""

import os

from data_pipelines.datasets import annotations
from data_pipelines.datasets.types import Annotations, Clip, Problem
from data_pipelines.demo_corpus import corpus
from save_jax.errors import UserError

VARIANTS = ("default",)
RECIPE: dict[str, int] = {}

_REMEDY = "Make or complete the corpus: python -m data_pipelines.prepare demo --root=%s"


def asr_file(root: str) -> str:
    """Returns the path of the corpus's file of transcripts."""
    return os.path.join(root, corpus.ASR)


def read_annotations(root: str, variant: str) -> Annotations:
    """Reads the clips and their captions.

    Args:
        root: the folder that the corpus was made in.
        variant: "default".

    Returns:
        The clips of "train" and "test". Each caption belongs to a group: "vision", "sound",
        "speech" or "sound+speech".

    Raises:
        UserError: a file is absent (every absent one is named) or malformed.
    """
    if variant not in VARIANTS:
        raise UserError(
            f"expected a variant of demo out of {', '.join(VARIANTS)}, found {variant!r}"
        )
    files = (corpus.MANIFEST, corpus.CAPTIONS, corpus.ASR)
    _require(root, [os.path.join(root, name) for name in files])
    captions = _read_captions(os.path.join(root, corpus.CAPTIONS))
    ids = [video_id for clips in captions.values() for video_id in clips]
    _require(root, corpus.absent_files(root, ids), clips=len(ids))
    splits = {
        split: [
            Clip(
                video_id=video_id,
                video=os.path.join(root, corpus.VIDEOS, f"{video_id}.mp4"),
                audio=None,
                captions=tuple(text for text, _ in its_captions),
                groups=tuple(group for _, group in its_captions),
                teacher_video=os.path.join(root, corpus.VIDEO_FEATURES, f"{video_id}.npy"),
                teacher_audio=os.path.join(root, corpus.AUDIO_FEATURES, f"{video_id}.npy"),
            )
            for video_id, its_captions in clips.items()
        ]
        for split, clips in captions.items()
    }
    return Annotations(splits)


def _require(root: str, absent: list[str], clips: int = 0) -> None:
    """Raises UserError naming the paths that do not exist."""
    absent = [path for path in absent if not os.path.isfile(path) or not os.path.getsize(path)]
    if absent:
        of = f" of {clips} clips" if clips else ""
        raise UserError(
            f"{root}: expected the files{of} of a demo corpus there, did not find\n"
            + "\n".join(f"  {path}" for path in absent)
            + f"\n{_REMEDY % root}"
        )


def _read_captions(path: str) -> dict[str, dict[str, list[tuple[str, str]]]]:
    """Reads the (caption, group) pairs of each clip of each split, in the file's order."""
    splits: dict[str, dict[str, list[tuple[str, str]]]] = {"train": {}, "test": {}}
    problems: list[Problem] = []
    for line, row in annotations.read_csv(path, corpus.CAPTION_COLUMNS, problems):
        if row["split"] not in splits:
            problems.append(("", path, f"line {line}: no split {row['split']!r}"))
            continue
        clips = splits[row["split"]]
        clips.setdefault(row["video_id"], []).append((row["caption"], row["group"]))
    if problems:
        raise UserError(
            f"{path}: expected the file that the demo's generator wrote, found {problems[0][2]}. "
            "Remove the corpus and make it again (python -m data_pipelines.prepare demo)."
        )
    return splits
