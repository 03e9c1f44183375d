"""MSR-VTT, in the layout the reference's users already have (spec section 10)."""

import os
from collections.abc import Mapping, Sequence

from data_pipelines.datasets import annotations, layout
from data_pipelines.datasets.types import Annotations, Problem
from save_jax.errors import UserError

# 9k: 9,000 training clips, tested on the 1,000 of JSFusion. 7k: the official split. 7k-1ka: 7,010
# training clips, tested on JSFusion's, as the released script does.
VARIANTS = ("9k", "7k", "7k-1ka")
RECIPE: dict[str, int] = {}

_DATA = os.path.join("Annotations", "MSRVTT_data.json")
_TEST = os.path.join("Annotations", "MSRVTT_JSFUSION_test.csv")
_TRAIN = {
    "9k": os.path.join("Annotations", "MSRVTT_train.9k.csv"),
    "7k-1ka": os.path.join("Annotations", "MSRVTT_train.7k.csv"),
}
_OFFICIAL_SPLITS = {"train": "train", "val": "validate", "test": "test"}


def asr_file(root: str) -> str:
    """Returns the path of the layout's file of transcripts, which need not exist."""
    return os.path.join(root, "msrvtt10k_asr_text.json")


def read_annotations(root: str, variant: str) -> Annotations:
    """Reads the clips and their captions.

    Args:
        root: the folder with Annotations/, VideoData/, AudioData/ and FeatureData/.
        variant: one of VARIANTS.

    Returns:
        The clips of each split, in the order of the annotations: "train" and "test", and for 7k
        "val" too.

    Raises:
        UserError: a file is absent (every absent one is named) or malformed.
    """
    splits_by_csv = variant in _TRAIN
    files = [_DATA, *([_TRAIN[variant], _TEST] if splits_by_csv else [])]
    annotations.require(root, files, "MSR-VTT's")
    problems: list[Problem] = []
    data_path = os.path.join(root, _DATA)
    data = _read_data(data_path)
    captions: dict[str, list[str]] = {}
    for sentence in data["sentences"]:
        captions.setdefault(sentence["video_id"], []).append(sentence["caption"])

    splits: dict[str, Mapping[str, Sequence[str]]] = {}
    if splits_by_csv:
        train_path = os.path.join(root, _TRAIN[variant])
        rows = annotations.read_csv(train_path, ("video_id",), problems)
        ids = [row["video_id"] for _, row in rows]
        splits["train"] = layout.captions_of(
            "train", ids, captions, train_path, data_path, problems
        )
        rows = annotations.read_csv(os.path.join(root, _TEST), ("video_id", "sentence"), problems)
        splits["test"] = annotations.grouped(rows, "video_id", "sentence")
    else:
        for split, official in _OFFICIAL_SPLITS.items():
            ids = [video["video_id"] for video in data["videos"] if video["split"] == official]
            if not ids:
                raise UserError(
                    f"{data_path}: expected videos whose split is {official!r}, found none. Is it "
                    "the complete file of the official release?"
                )
            splits[split] = layout.captions_of(split, ids, captions, data_path, data_path, problems)
    known = {video["video_id"] for video in data["videos"]} | captions.keys()
    return layout.annotate(root, splits, problems, known=known)


def _read_data(path: str) -> dict[str, list[dict[str, str]]]:
    """Reads MSRVTT_data.json and checks that the fields used here are there."""
    expected = {"videos": ("video_id", "split"), "sentences": ("video_id", "caption")}
    data = annotations.read_json(path, "MSR-VTT's annotations")
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
                    f"{path}: expected the texts {' and '.join(map(repr, fields))} in each entry "
                    f"of {part!r}, found entry {position} (from 0) without them."
                )
    return data
