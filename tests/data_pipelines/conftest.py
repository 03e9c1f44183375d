"""Prepared data that several test files read."""

import functools
import pathlib
from collections.abc import Callable

import pytest

from tests.support import miniatures

SMALL = {"image_size": 32, "fbank_frames": 64, "max_frames": 4}


@pytest.fixture(scope="session")
def miniature_of(tmp_path_factory) -> Callable[[str], pathlib.Path]:
    """Gives the root of a data set's miniature, by name. Not to be written to."""

    @functools.cache
    def make(dataset: str) -> pathlib.Path:
        root = tmp_path_factory.mktemp(dataset)
        options = {"n_train": 7, "n_test": 5} if dataset == "msrvtt" else {}
        getattr(miniatures, dataset)(root, **options)
        return root

    return make


@pytest.fixture(scope="session")
def miniature(miniature_of):
    """The root of a miniature MSR-VTT: 7 clips to train on, 5 to test on. Not to be written to."""
    return miniature_of("msrvtt")


@pytest.fixture(scope="session")
def prepared(miniature, tmp_path_factory):
    """The miniature's 9k variant, prepared without loss. Not to be written to."""
    from data_pipelines.preparation import prepare
    from data_pipelines.recipe import Recipe

    out = tmp_path_factory.mktemp("prepared")
    recipe = Recipe(encoding="raw", **SMALL)
    prepare("msrvtt", root=str(miniature), out=str(out), recipe=recipe, workers=1)
    return out
