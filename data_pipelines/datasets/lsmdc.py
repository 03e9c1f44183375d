"""LSMDC, the 2016 release, in a layout like those of the other data sets (spec section 10).

The reference names the data set but has no loader for it that works; where its ASR file lies is
our choice.
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
# Tab-separated, in spite of the name, and without a line of names.
_COLUMNS = ("clip id", "start", "end", "start as cut", "end as cut", "sentence")


def asr_file(root: str) -> str:
    """Where what is said in the clips is looked for; it need not exist."""
    return os.path.join(root, "lsmdc_asr_text.json")


def read_annotations(root: str, variant: str) -> Annotations:
    """Reads which clips there are and what is said about them.

    A clip id that is listed more than once in a split has several captions. Videos may be in
    sub-folders of VideoData/, as they come, a folder a film.

    Args:
        root: the folder with Annotations/, VideoData/, AudioData/ and FeatureData/.
        variant: "default".

    Returns:
        The clips of "train", "val" and "test".

    Raises:
        UserError: a file is absent (every absent one is named) or is not what it should be.
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
