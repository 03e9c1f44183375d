"""Your own videos: every video below a folder, with or without captions.

A clip's id is the path of its file from the folder, without the ending, with "/" between folders.
`captions.csv` in the folder, if there is one, has the header `video_id,caption` and optionally the
columns `group` (under which results are also reported) and `split` (train, val or test).
"""

import os
import unicodedata

from data_pipelines import outages
from data_pipelines.datasets import annotations, layout
from data_pipelines.datasets.types import Annotations, Problem
from save_jax.errors import UserError
from save_jax.messages import did_you_mean

VARIANTS = ("default",)
RECIPE: dict[str, int] = {}

CAPTIONS = "captions.csv"
# The split of clips for which captions.csv names none: they can be embedded and searched.
DEFAULT_SPLIT = "test"
# No others: a misspelt one would take its clips out of training without a word.
_SPLITS = ("train", "val", "test")

# split -> id -> its captions, each with its group
_Captions = dict[str, dict[str, list[tuple[str, str]]]]


def asr_file(root: str) -> str:
    """Returns the path of the file of transcripts, which need not exist."""
    return os.path.join(root, "asr.json")


def read_annotations(root: str, variant: str) -> Annotations:
    """Reads the clips and their captions.

    Args:
        root: the folder. Sound may be in separate files, AudioData/ID.wav, and the teacher's
            vectors in FeatureData/ImageBind/.
        variant: "default".

    Returns:
        The clips of each split, in the order of their ids. Without splits in captions.csv, all are
        in "test". A row without a caption only says which split its clip is in.

    Raises:
        UserError: there is no video, or captions.csv is malformed.
    """
    problems: list[Problem] = []
    files = layout.find(root, root, problems, paths_are_ids=True)
    if not files.videos:
        raise UserError(
            f"{root}: expected videos ({' '.join(layout.VIDEO_ENDINGS)}) in this folder or below "
            "it, found none. Give another --root."
        )
    captions = _read_captions(os.path.join(root, CAPTIONS), list(files.videos), problems)
    placed = {video_id for clips in captions.values() for video_id in clips}
    for video_id in files.videos:
        if video_id not in placed:
            captions.setdefault(DEFAULT_SPLIT, {})[video_id] = []
    problems += layout.repeated(captions)
    splits = {
        split: [
            layout.clip_of(
                files,
                video_id,
                [caption for caption, _ in clips[video_id]],
                [group for _, group in clips[video_id]],
            )
            for video_id in sorted(clips)
        ]
        for split, clips in sorted(captions.items())
    }
    return Annotations(splits, tuple(problems))


def _read_captions(path: str, ids: list[str], problems: list[Problem]) -> _Captions:
    """Reads the captions of existing clips, by split; those of others go to `problems`."""
    captions: _Captions = {}
    if not outages.exists(path):
        return captions
    # The same letters can be spelt in several ways, and file systems differ in theirs.
    normal = {unicodedata.normalize("NFC", video_id): video_id for video_id in reversed(ids)}
    spelt = {**normal, **{video_id: video_id for video_id in ids}}
    absent: dict[str, list[int]] = {}
    rows = annotations.read_csv(
        path, ("video_id", "caption"), problems, blank=("caption",), optional=("group", "split")
    )
    for line, row in rows:
        caption, split = row["caption"].strip(), row.get("split", "").strip()
        if not caption and not split:
            problems.append(("", path, f"line {line} left out: it has no caption and no split"))
            continue
        split = split or DEFAULT_SPLIT
        if split not in _SPLITS:
            raise UserError(
                f"{path}: expected a split out of {', '.join(_SPLITS)}, found {split!r} in line "
                f"{line}.{did_you_mean(split, _SPLITS)}"
            )
        named = row["video_id"]
        video_id = spelt.get(named) or spelt.get(unicodedata.normalize("NFC", named))
        if video_id is None:
            absent.setdefault(named, []).append(line)
            continue
        its_captions = captions.setdefault(split, {}).setdefault(video_id, [])
        if caption:
            its_captions.append((row["caption"], row.get("group", "").strip()))
    for named, lines in absent.items():
        stem, ending = os.path.splitext(named)
        hint = f"; an id has no ending: {stem}" if ending.lower() in layout.VIDEO_ENDINGS else ""
        where = ", ".join(map(str, lines[:5])) + (", …" if len(lines) > 5 else "")
        problems.append(("", named, f"no such video, listed in {CAPTIONS}, line {where}{hint}"))
    return captions
