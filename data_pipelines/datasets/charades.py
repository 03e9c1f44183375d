"""Charades, in the layout the reference's users already have (spec section 10)."""

import os

from data_pipelines.datasets import annotations, layout
from data_pipelines.datasets.types import Annotations, Problem

VARIANTS = ("default",)
# Half-minute clips: the reference first extracts 2 frames a second as images, and keeps up to 32.
RECIPE = {"max_frames": 32, "frames_per_second": 2}

_SPLITS = {
    split: os.path.join("Annotations", f"Charades_v1_{split}.csv") for split in ("train", "test")
}


def asr_file(root: str) -> str:
    """Returns the path of the layout's file of transcripts, which need not exist."""
    return os.path.join(root, "charades_vad_text.json")


def read_annotations(root: str, variant: str) -> Annotations:
    """Reads the clips and their captions.

    A clip's frames are all images in the folder ROOT/ImageData/ID/ if there is one, otherwise they
    come from its video.

    Args:
        root: the folder with Annotations/, ImageData/ or VideoData/, AudioData/ and FeatureData/.
        variant: "default".

    Returns:
        The clips of "train" and "test", each with its script as its caption.

    Raises:
        UserError: a file is absent (every absent one is named) or malformed.
    """
    annotations.require(root, list(_SPLITS.values()), "Charades'")
    problems: list[Problem] = []
    splits = {
        split: annotations.grouped(
            annotations.read_csv(os.path.join(root, file), ("id", "script"), problems),
            "id",
            "script",
        )
        for split, file in _SPLITS.items()
    }
    return layout.annotate(root, splits, problems, images=True)
