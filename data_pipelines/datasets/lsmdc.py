"""LSMDC, the 2016 release, in a layout like those of the other data sets (spec section 10).

The reference names the data set but has no working loader for it; the name of its ASR file is our
choice.
"""

import os

from data_pipelines.datasets import annotations, layout
from data_pipelines.datasets.types import Annotations, Problem

VARIANTS = ("default",)
RECIPE: dict[str, int] = {}

# Results are reported on "test", the 1,000 clips of the retrieval challenge. "val" has 7,408, so
# the same model scores much lower there: the two are easily confused.
_SPLITS = {
    "train": os.path.join("Annotations", "LSMDC16_annos_training.csv"),
    "val": os.path.join("Annotations", "LSMDC16_annos_val.csv"),
    "test": os.path.join("Annotations", "LSMDC16_challenge_1000_publictect.csv"),
}
# Tab-separated, despite the file names, and without a header.
_COLUMNS = ("clip id", "start", "end", "start as cut", "end as cut", "sentence")


def asr_file(root: str) -> str:
    """Returns the path of the file of transcripts, which need not exist."""
    return os.path.join(root, "lsmdc_asr_text.json")


def read_annotations(root: str, variant: str) -> Annotations:
    """Reads the clips and their captions.

    A clip id that is listed more than once in a split has several captions. Videos may be in
    sub-folders of VideoData/, as they are distributed, one per film.

    Args:
        root: the folder with Annotations/, VideoData/, AudioData/ and FeatureData/.
        variant: "default".

    Returns:
        The clips of "train", "val" and "test".

    Raises:
        UserError: a file is absent (every absent one is named) or malformed.
    """
    annotations.require(root, list(_SPLITS.values()), "LSMDC's")
    problems: list[Problem] = []
    splits = {
        split: annotations.grouped(
            annotations.read_tsv(os.path.join(root, file), _COLUMNS, problems),
            "clip id",
            "sentence",
        )
        for split, file in _SPLITS.items()
    }
    return layout.annotate(root, splits, problems)
