"""The demo corpus, as data_pipelines.demo_corpus makes it."""

import csv
import os

from data_pipelines.datasets.clip import Clip
from data_pipelines.demo_corpus import corpus
from data_pipelines.transcripts import read_asr
from save_jax.errors import UserError

VARIANTS = ("default",)

_REMEDY = "Make or complete the corpus: python -m data_pipelines.prepare demo"


def read_annotations(root: str, variant: str) -> dict[str, list[Clip]]:
    """Reads which clips there are and what is said about them and in them.

    Args:
        root: the folder that the corpus was made in.
        variant: "default".

    Returns:
        The clips of "train" and "test". Each caption belongs to a group: "vision", "sound",
        "speech" or "sound+speech".

    Raises:
        UserError: a file is absent (every absent one is named) or is not what it should be.
    """
    if variant not in VARIANTS:
        raise UserError(f"expected a variant of demo out of {list(VARIANTS)}, found {variant!r}")
    annotations = (corpus.MANIFEST, corpus.CAPTIONS, corpus.ASR)
    _require(root, [os.path.join(root, name) for name in annotations])
    captions = _read_captions(os.path.join(root, corpus.CAPTIONS))
    transcripts = read_asr(os.path.join(root, corpus.ASR))
    ids = [video_id for clips in captions.values() for video_id in clips]
    _require(root, corpus.absent_files(root, ids), clips=len(ids))
    return {
        split: [
            Clip(
                video_id=video_id,
                video=os.path.join(root, corpus.VIDEOS, f"{video_id}.mp4"),
                audio=None,
                transcript=transcripts.get(video_id, ""),
                captions=tuple(text for text, _ in its_captions),
                groups=tuple(group for _, group in its_captions),
                teacher_video=os.path.join(root, corpus.VIDEO_FEATURES, f"{video_id}.npy"),
                teacher_audio=os.path.join(root, corpus.AUDIO_FEATURES, f"{video_id}.npy"),
            )
            for video_id, its_captions in clips.items()
        ]
        for split, clips in captions.items()
    }


def _require(root: str, absent: list[str], clips: int = 0) -> None:
    """Raises UserError naming those of the paths that do not exist."""
    absent = [path for path in absent if not os.path.isfile(path) or not os.path.getsize(path)]
    if absent:
        of = f" of {clips} clips" if clips else ""
        raise UserError(
            f"{root}: expected the files{of} of a demo corpus there, did not find\n"
            + "\n".join(f"  {path}" for path in absent)
            + f"\n{_REMEDY}"
        )


def _read_captions(path: str) -> dict[str, dict[str, list[tuple[str, str]]]]:
    """The (caption, group) pairs of each clip of each split, in the file's order."""
    splits: dict[str, dict[str, list[tuple[str, str]]]] = {"train": {}, "test": {}}
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != corpus.CAPTION_COLUMNS:
            raise UserError(
                f"{path}: expected the columns {', '.join(corpus.CAPTION_COLUMNS)} in its first"
                f" line, found {', '.join(reader.fieldnames or ()) or 'nothing'}. {_REMEDY}"
            )
        for row in reader:
            if row["split"] not in splits or not row["caption"]:
                raise UserError(
                    f"{path}: expected a caption and a split out of {list(splits)}, found"
                    f" {list(row.values())} in line {reader.line_num}. {_REMEDY}"
                )
            clips = splits[row["split"]]
            clips.setdefault(row["video_id"], []).append((row["caption"], row["group"]))
    return splits
