"""Prepared data that several test files read."""

import pytest

from tests import msrvtt_miniature

SMALL = {"image_size": 32, "fbank_frames": 64, "max_frames": 4}


@pytest.fixture(scope="session")
def miniature(tmp_path_factory):
    """The root of a miniature MSR-VTT: 7 clips to train on, 5 to test on. Not to be written to."""
    root = tmp_path_factory.mktemp("msrvtt")
    msrvtt_miniature.make(root, n_train=7, n_test=5)
    return root


@pytest.fixture(scope="session")
def prepared(miniature, tmp_path_factory):
    """The miniature's 9k variant, prepared losslessly. Not to be written to."""
    from data_pipelines.prepare import prepare
    from data_pipelines.recipe import Recipe

    out = tmp_path_factory.mktemp("prepared")
    recipe = Recipe(encoding="png", **SMALL)
    prepare("msrvtt", root=str(miniature), out=str(out), recipe=recipe, workers=1)
    return out
