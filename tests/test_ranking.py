"""Ranks counted tile by tile equal those of the whole matrix (spec section 9)."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from save_jax import metrics, progress, ranking, similarity
from tests.support.training import mesh_of

CAPTIONS, VIDEOS = 21, 13
# Of 21 captions and 13 videos: five tiles by four, three by two, and one that is mostly padding.
TILES = {
    1: {"captions_at_once": 5, "videos_at_once": 4, "multiple": 1},
    8: {"captions_at_once": 8, "videos_at_once": 1, "multiple": 1},
    0: {},
}


@functools.cache
def integers(tiles: int) -> ranking.Ranker:
    """Scores of small whole numbers, which are exact: many tie."""

    def score(weight, captions, videos):
        return weight * captions @ videos["vectors"].T

    return ranking.Ranker(score, mesh_of(tiles or 8), **TILES[tiles])


def ranked(ranker, weight, captions, videos, target) -> tuple[ranking.Ranks, np.ndarray]:
    """The ranks, and the matrix that the tiles make."""
    matrix = np.full((len(captions), len(jax.tree.leaves(videos)[0])), np.nan, np.float32)

    def keep(rows, first, scores):
        tile = np.asarray(scores)[: len(rows), : matrix.shape[1] - first]
        matrix[rows, first : first + tile.shape[1]] = tile

    return ranker.rank(weight, captions, videos, target, keep), matrix


def check(found: ranking.Ranks, matrix: np.ndarray, target: np.ndarray) -> None:
    """All that is counted, against the whole matrix."""
    captioned = np.unique(target)
    v2t = np.full(matrix.shape[1], -1)
    v2t[captioned] = metrics.video_to_text(matrix, target)
    np.testing.assert_array_equal(found.t2v, metrics.text_to_video(matrix, target))
    np.testing.assert_array_equal(found.v2t, v2t)
    np.testing.assert_array_equal(found.own, matrix[np.arange(len(target)), target])
    best = np.argsort(-matrix, axis=1, kind="stable")[:, : ranking.BEST]
    np.testing.assert_array_equal(found.best, best)
    np.testing.assert_array_equal(found.best_scores, np.take_along_axis(matrix, best, axis=1))


@pytest.mark.parametrize("tiles", TILES)
def test_progress_counts_pairs_and_ends_at_all_of_them(monkeypatch, tiles):
    said = []
    monkeypatch.setattr(progress.Progress, "EVERY", -1.0)
    monkeypatch.setattr(progress, "say", said.append)
    text, video = np.ones((CAPTIONS, 3), np.float32), {"vectors": np.ones((VIDEOS, 3), np.float32)}
    integers(tiles).rank(np.float32(1), text, video, np.arange(CAPTIONS) % VIDEOS)
    *between, end = said
    counts = [int(re.search(r"captions × videos: (\d+)/273, ", line)[1]) for line in between]
    assert counts == sorted(set(counts)) and counts[-1] == 273
    assert end.startswith("  ranking, captions × videos: 273 in ")


@pytest.mark.parametrize("tiles", TILES)
def test_ranks_are_those_of_the_whole_matrix(tiles):
    """Ties everywhere; videos without captions, and with more of them than a tile holds."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        described = rng.integers(0, VIDEOS, rng.integers(1, VIDEOS))
        target = rng.choice(described, CAPTIONS)
        captions = rng.integers(-1, 2, (CAPTIONS, 3)).astype(np.float32)
        videos = {"vectors": rng.integers(-1, 2, (VIDEOS, 3)).astype(np.float32)}
        found, matrix = ranked(integers(tiles), np.float32(2), captions, videos, target)
        np.testing.assert_array_equal(matrix, 2 * captions @ videos["vectors"].T)
        check(found, matrix, target)


def test_all_alike_is_the_worst_rank():
    captions, videos = np.ones((CAPTIONS, 3), np.float32), {"vectors": np.ones((VIDEOS, 3), "f4")}
    target = np.arange(CAPTIONS) % VIDEOS
    found, _ = ranked(integers(8), np.float32(1), captions, videos, target)
    assert (found.t2v == VIDEOS - 1).all() and (found.v2t == VIDEOS - 1).all()
    np.testing.assert_array_equal(found.best, np.tile(np.arange(10), (CAPTIONS, 1)))


@pytest.mark.parametrize("tiles", TILES)
def test_duplicates_tie_wherever_they_are(tiles):
    """Equal videos in other tiles, and on other devices: rounding decides nothing."""
    rng = np.random.default_rng(0)
    originals = rng.normal(size=(5, 4, 24)).astype(np.float32)
    copies = np.array([0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 0, 4, 0])  # of 13 videos
    frames, mask = originals[copies], np.arange(4) < (1 + copies % 4)[:, None]
    target = np.arange(CAPTIONS) % VIDEOS
    text = originals[copies[target], 0] + np.float32(0.01)  # each caption's own video is the best

    def score(scale, captions, videos):
        return similarity.similarity(captions, *videos, scale)

    ranker = ranking.Ranker(score, mesh_of(tiles or 8), **TILES[tiles])
    found, matrix = ranked(ranker, np.float32(100), text, (frames, mask), target)
    whole = jax.jit(similarity.similarity)(*map(jnp.asarray, (text, frames, mask)), 100.0)
    np.testing.assert_allclose(matrix, whole, atol=2e-5)
    times = np.bincount(copies)[copies]  # how often a video is there
    np.testing.assert_array_equal(found.t2v, times[target] - 1)
    np.testing.assert_array_equal(found.v2t, times - 1)
    check(found, matrix, target)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(value):
    captions, videos = np.zeros((CAPTIONS, 3), np.float32), np.zeros((VIDEOS, 3), np.float32)
    captions[4, 1], videos[7, 1] = 1, value
    with np.errstate(invalid="ignore"):
        broken = np.count_nonzero(~np.isfinite(captions @ videos.T))
    target = np.arange(CAPTIONS) % VIDEOS
    with pytest.raises(ValueError, match=f"{broken} of 273 similarities are not finite"):
        ranked(integers(8), np.float32(1), captions, {"vectors": videos}, target)


@pytest.mark.parametrize("target", [-1, VIDEOS])
def test_targets_outside_the_gallery_are_refused(target):
    captions, videos = np.zeros((1, 3), np.float32), {"vectors": np.zeros((VIDEOS, 3), np.float32)}
    with pytest.raises(ValueError, match=f"column {target} of {VIDEOS}"):
        ranked(integers(8), np.float32(1), captions, videos, np.array([target]))
