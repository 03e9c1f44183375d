"""VATEX, in the layout the reference's users already have (spec section 10)."""

import os

from data_pipelines.datasets import annotations, layout
from data_pipelines.datasets.types import Annotations, Problem
from save_jax.errors import UserError

VARIANTS = ("default",)
RECIPE: dict[str, int] = {}

_CAPTIONS = os.path.join("Annotations", "ref_captions.json")
_SPLITS = {
    split: os.path.join("Annotations", f"{split}_list.txt") for split in ("train", "val", "test")
}


def asr_file(root: str) -> str:
    """Returns the path of the layout's file of transcripts, which need not exist."""
    return os.path.join(root, "Annotations", "vatex_asr_text.json")


def read_annotations(root: str, variant: str) -> Annotations:
    """Reads the clips and their captions.

    Args:
        root: the folder with Annotations/, VideoData/, AudioData/ and FeatureData/.
        variant: "default".

    Returns:
        The clips of "train", "val" and "test", in the order of their lists, with all captions.

    Raises:
        UserError: a file is absent (every absent one is named) or malformed.
    """
    annotations.require(root, [_CAPTIONS, *_SPLITS.values()], "VATEX's")
    problems: list[Problem] = []
    captions_path = os.path.join(root, _CAPTIONS)
    captions = _read_captions(captions_path)
    splits = {}
    for split, file in _SPLITS.items():
        path = os.path.join(root, file)
        ids = annotations.read_list(path, problems)
        splits[split] = layout.captions_of(split, ids, captions, path, captions_path, problems)
    return layout.annotate(root, splits, problems, known=captions)


def _read_captions(path: str) -> dict[str, list[str]]:
    """Reads the captions of each clip, and checks their form."""
    captions = annotations.read_json(path, "a JSON object of lists of captions by id")
    if not isinstance(captions, dict):
        raise UserError(
            f"{path}: expected a JSON object of lists of captions by id, found a "
            f"{type(captions).__name__}."
        )
    for video_id, its_captions in captions.items():
        if not isinstance(its_captions, list) or not all(
            isinstance(caption, str) for caption in its_captions
        ):
            raise UserError(
                f"{path}: expected a list of captions for each id, found something else for "
                f"{video_id!r}."
            )
    return captions
