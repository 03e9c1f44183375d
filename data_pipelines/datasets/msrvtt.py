"""MSR-VTT, in the layout the reference's users already have (spec section 10)."""

import csv
import json
import os
from collections.abc import Iterable, Sequence

from data_pipelines.datasets.clip import Clip
from data_pipelines.transcripts import read_asr
from save_jax.errors import UserError

# 9k: 9,000 training clips, tested on the 1,000 of JSFusion. 7k: the official split. 7k-1ka: 7,010
# training clips, tested on JSFusion's, as the released script does.
VARIANTS = ("9k", "7k", "7k-1ka")

_DATA = os.path.join("Annotations", "MSRVTT_data.json")
_TEST = os.path.join("Annotations", "MSRVTT_JSFUSION_test.csv")
_TRAIN = {
    "9k": os.path.join("Annotations", "MSRVTT_train.9k.csv"),
    "7k-1ka": os.path.join("Annotations", "MSRVTT_train.7k.csv"),
}
_ASR = "msrvtt10k_asr_text.json"
_OFFICIAL_SPLITS = {"train": "train", "val": "validate", "test": "test"}
_VIDEO_ENDINGS = (".mp4", ".webm")


def read_annotations(root: str, variant: str) -> dict[str, list[Clip]]:
    """Reads which clips there are and what is said about them and in them.

    Args:
        root: the folder with Annotations/, VideoData/, AudioData/ and FeatureData/.
        variant: one of VARIANTS.

    Returns:
        The clips of each split, in the order of the annotations: "train" and "test", and for 7k
        "val" too.

    Raises:
        UserError: a file is absent (every absent one is named) or is not what it should be.
    """
    splits_by_csv = variant in _TRAIN
    _require(root, [_DATA, _ASR, *([_TRAIN[variant], _TEST] if splits_by_csv else [])])
    data_path = os.path.join(root, _DATA)
    data = _read_data(data_path)
    captions: dict[str, list[str]] = {}
    for sentence in data["sentences"]:
        captions.setdefault(sentence["video_id"], []).append(sentence["caption"])

    if splits_by_csv:
        train_path = os.path.join(root, _TRAIN[variant])
        train_ids = [row["video_id"] for row in _read_csv(train_path, ("video_id",))]
        test: dict[str, list[str]] = {}
        for row in _read_csv(os.path.join(root, _TEST), ("video_id", "sentence")):
            test.setdefault(row["video_id"], []).append(row["sentence"])
        splits = {"train": _captions_of(train_ids, captions, train_path, data_path), "test": test}
    else:
        splits = {}
        for name, official in _OFFICIAL_SPLITS.items():
            ids = [video["video_id"] for video in data["videos"] if video["split"] == official]
            if not ids:
                raise UserError(
                    f"{data_path}: expected videos whose split is {official!r}, found none. Is it "
                    "the complete file of the official release?"
                )
            splits[name] = _captions_of(ids, captions, data_path, data_path)

    transcripts = read_asr(os.path.join(root, _ASR))
    return {
        name: [
            _clip(root, video_id, its_captions, transcripts.get(video_id, ""))
            for video_id, its_captions in clips.items()
        ]
        for name, clips in splits.items()
    }


def _clip(root: str, video_id: str, captions: Sequence[str], transcript: str) -> Clip:
    videos = [os.path.join(root, "VideoData", video_id + ending) for ending in _VIDEO_ENDINGS]
    features = os.path.join(root, "FeatureData", "ImageBind")
    return Clip(
        video_id=video_id,
        video=next(filter(os.path.exists, videos), videos[0]),
        audio=_if_there(os.path.join(root, "AudioData", f"{video_id}.wav")),
        transcript=transcript,
        captions=tuple(captions),
        groups=("",) * len(captions),
        teacher_video=_if_there(os.path.join(features, "VideoFeature", f"{video_id}.pt")),
        teacher_audio=_if_there(os.path.join(features, "AudioFeature", f"{video_id}.pt")),
    )


def _if_there(path: str) -> str | None:
    return path if os.path.exists(path) else None


def _require(root: str, files: Sequence[str]) -> None:
    absent = [file for file in files if not os.path.isfile(os.path.join(root, file))]
    if absent:
        raise UserError(
            f"{root}: expected MSR-VTT's annotation files there, did not find\n"
            + "\n".join(f"  {os.path.join(root, file)}" for file in absent)
            + "\nPut them there or give another --root. (Without speech recognition, let "
            f"{_ASR} hold an empty list, [].)"
        )


def _captions_of(
    ids: Iterable[str], captions: dict[str, list[str]], ids_path: str, captions_path: str
) -> dict[str, list[str]]:
    """The captions of each id; UserError when an id has none."""
    ids = list(dict.fromkeys(ids))
    bare = [video_id for video_id in ids if video_id not in captions]
    if bare:
        raise UserError(
            f"{captions_path}: expected captions of all {len(ids)} videos of {ids_path}, found "
            f"none of {len(bare)}: {', '.join(bare[:10])}{', …' if len(bare) > 10 else ''}. "
            "Do the two files belong together?"
        )
    return {video_id: captions[video_id] for video_id in ids}


def _read_csv(path: str, columns: Sequence[str]) -> list[dict[str, str]]:
    """Reads the rows of a CSV file that must have `columns` and a value in each of them."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            absent = [column for column in columns if column not in (reader.fieldnames or ())]
            if absent:
                raise UserError(
                    f"{path}: expected the columns {', '.join(columns)} in its first line, found "
                    f"{', '.join(reader.fieldnames or ()) or 'nothing'}."
                )
            rows = []
            for row in reader:
                empty = [column for column in columns if not row[column]]
                if empty:
                    raise UserError(
                        f"{path}: expected a {empty[0]} in every row, found none in line "
                        f"{reader.line_num}."
                    )
                rows.append(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: expected a CSV file in UTF-8, found: {error}.") from error
    if not rows:
        raise UserError(f"{path}: expected one row a clip, found only the first line.")
    return rows


def _read_data(path: str) -> dict[str, list[dict[str, str]]]:
    """Reads MSRVTT_data.json and checks that the fields used here are there."""
    expected = {"videos": ("video_id", "split"), "sentences": ("video_id", "caption")}
    try:
        with open(path, encoding="utf-8-sig") as file:
            data = json.load(file)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: expected MSR-VTT's annotations, found malformed JSON at line {error.lineno}, "
            f"column {error.colno} ({error.msg}). Is the file complete?"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text, found: {error}.") from error
    for part, fields in expected.items():
        entries = data.get(part) if isinstance(data, dict) else None
        if not isinstance(entries, list):
            raise UserError(
                f"{path}: expected a JSON object with the lists {' and '.join(map(repr, expected))}"
                f", found no list {part!r}."
            )
        for position, entry in enumerate(entries):
            if not isinstance(entry, dict) or not all(
                isinstance(entry.get(field), str) for field in fields
            ):
                raise UserError(
                    f"{path}: expected the texts {' and '.join(map(repr, fields))} in each of "
                    f"{part!r}, found entry {position} (from 0) without."
                )
    return data
