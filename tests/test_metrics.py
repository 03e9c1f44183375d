"""Ranks and recalls by hand (spec section 9), and against a definition written out in loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from save_jax import metrics


def test_ranks_by_hand():
    similarity = np.array([[0.9, 0.1, 0.5], [0.2, 0.1, 0.5], [0.3, 0.4, 0.35]])
    np.testing.assert_array_equal(metrics.ranks(similarity, np.array([0, 1, 2])), [0, 2, 1])


def test_ties_count_against_the_model():
    similarity = np.array([[0.5, 0.5, 0.5, 0.1], [0.5, 0.9, 0.5, 0.5]])
    np.testing.assert_array_equal(metrics.ranks(similarity, np.array([1, 1])), [2, 0])


def test_a_constant_similarity_has_the_worst_ranks():
    similarity = np.zeros((20, 20), np.float32)
    result = metrics.retrieval_metrics(similarity, np.arange(20), [""] * 20)
    worst = {"R1": 0, "R5": 0, "R10": 0, "MdR": 20, "MnR": 20, "SumR": 0}
    assert result["t2v"] == worst
    assert result["v2t"] == worst


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(value):
    similarity = np.eye(3)
    similarity[1, 2] = value
    with pytest.raises(ValueError, match="1 of 9 similarities are not finite"):
        metrics.retrieval_metrics(similarity, np.arange(3), [""] * 3)


@pytest.mark.parametrize("target", [-1, 3])
def test_targets_outside_the_gallery_are_refused(target):
    with pytest.raises(ValueError, match=f"column {target} of 3"):
        metrics.ranks(np.eye(3), np.array([0, target, 2]))


def test_summary_by_hand():
    # Ranks 0, 0, 3, 9, 10, 49: from 1, so the median is between 4 and 10.
    summary = metrics.summarise(np.array([0, 3, 9, 0, 10, 49]))
    expected = {"R1": 100 / 3, "R5": 50.0, "R10": 400 / 6, "MdR": 7.0, "MnR": 77 / 6, "SumR": 150.0}
    assert summary == pytest.approx(expected)
    assert all(type(value) is float for value in summary.values())  # JSON takes no NumPy numbers


def test_several_captions_a_video():
    """Captions 0 and 1 are video 0's, 2 and 3 video 1's; a video takes its best caption."""
    similarity = np.array([[0.1, 0.6], [0.9, 0.2], [0.7, 0.3], [0.0, 0.4]])
    target = np.array([0, 0, 1, 1])
    np.testing.assert_array_equal(metrics.text_to_video(similarity, target), [1, 0, 1, 0])
    # Video 0: own best 0.9 against 0.7. Video 1: own best 0.4 against 0.6.
    np.testing.assert_array_equal(metrics.video_to_text(similarity, target), [0, 1])


def test_videos_without_captions_are_candidates_but_no_queries():
    similarity = np.array([[0.5, 0.9, 0.1], [0.2, 0.8, 0.3]])
    target = np.array([0, 2])  # nobody describes video 1
    np.testing.assert_array_equal(metrics.text_to_video(similarity, target), [1, 1])
    np.testing.assert_array_equal(metrics.video_to_text(similarity, target), [0, 0])


def test_groups():
    similarity = np.array([[0.9, 0.1, 0.2], [0.8, 0.1, 0.2], [0.1, 0.2, 0.9], [0.9, 0.3, 0.2]])
    result = metrics.retrieval_metrics(
        similarity, np.array([0, 1, 2, 1]), ["speech", "sound", "", "speech"]
    )
    assert list(result["groups"]) == ["speech", "sound"]
    assert result["groups"]["speech"]["queries"] == 2
    assert result["groups"]["speech"]["t2v"]["R1"] == 50
    assert result["groups"]["speech"]["t2v"]["MnR"] == 1.5
    assert result["groups"]["sound"] == {"queries": 1, "t2v": metrics.summarise(np.array([2]))}
    assert result["t2v"]["R1"] == 50
    table = metrics.table(result)
    assert "speech (2 queries)" in table and "sound (1 query)" in table


def test_without_groups():
    assert metrics.retrieval_metrics(np.eye(2), np.arange(2), ["", ""])["groups"] == {}


@st.composite
def galleries(draw):
    captions, videos = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    scores = st.integers(-3, 3)  # few values: many ties
    similarity = draw(st_numpy.arrays(np.float32, (captions, videos), elements=scores))
    target = draw(st_numpy.arrays(np.int64, captions, elements=st.integers(0, videos - 1)))
    return similarity, target


@settings(max_examples=100, deadline=None)
@given(galleries(), st.randoms())
def test_ranks_follow_their_definition_in_any_order(gallery, random):
    similarity, target = gallery
    captions, videos = similarity.shape
    expected = [
        sum(row[v] > row[t] or (row[v] == row[t] and v != t) for v in range(videos))
        for row, t in zip(similarity, target, strict=True)
    ]
    np.testing.assert_array_equal(metrics.text_to_video(similarity, target), expected)

    described = sorted(set(target.tolist()))
    best = {v: similarity[target == v].max(axis=0) for v in described}
    expected_v2t = [sum(best[w][v] >= best[v][v] for w in described if w != v) for v in described]
    np.testing.assert_array_equal(metrics.video_to_text(similarity, target), expected_v2t)

    order = random.sample(range(captions), captions)
    permuted = metrics.text_to_video(similarity[order], target[order])
    np.testing.assert_array_equal(permuted, np.array(expected)[order])
    columns = np.array(random.sample(range(videos), videos))
    moved = metrics.text_to_video(similarity[:, columns], np.argsort(columns)[target])
    np.testing.assert_array_equal(moved, expected)
