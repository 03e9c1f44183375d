"""Which checkpoints are kept: the latest, the best, and those still to be evaluated."""

import pathlib

import pytest

from save_jax import locks, results, retention
from save_jax.retention import decide
from tests.test_results import evaluation


@pytest.mark.parametrize(
    ("steps", "due", "evaluated", "best", "kept", "lost"),
    [
        # Nothing is to be evaluated: the latest two.
        ([10, 20, 30, 40], [], [], [], {30, 40}, ()),
        # The best stays, however old it is; one that is no longer there does not matter.
        ([10, 20, 30, 40], [10, 20, 30, 40], [10, 20, 30, 40], [10], {10, 30, 40}, ()),
        ([20, 30, 40], [20, 30, 40], [20, 30, 40], [10], {30, 40}, ()),
        # What is best by best.json stays beside what the metrics say: one is about to be the other.
        ([10, 20, 30, 40], [], [], [10, 20], {10, 20, 30, 40}, ()),
        # Three wait for the follower: as many as may.
        ([10, 20, 30, 40], [10, 20, 30, 40], [10], [10], {10, 20, 30, 40}, ()),
        # One more, and the oldest of them is lost.
        ([10, 20, 30, 40, 50], [10, 20, 30, 40, 50], [10], [10], {10, 30, 40, 50}, (20,)),
        # Checkpoints between evaluations are kept as the latest only.
        ([10, 15, 20, 25, 30], [10, 20, 30], [], [], {10, 20, 25, 30}, ()),
    ],
)
def test_what_is_kept(steps, due, evaluated, best, kept, lost):
    assert decide(steps, due, evaluated, best, most=3) == (kept, lost)


def test_what_the_workdir_says_decides(tmp_path, capsys):
    kept = retention.Retention(pathlib.Path(tmp_path), "val", lambda step: step % 10 == 0, most=2)
    assert kept([10, 15, 20]) == {10, 15, 20}
    evaluation(tmp_path, 10, 80.0)
    evaluation(tmp_path, 20, 70.0)
    assert kept([10, 15, 20, 25, 30, 35]) == {10, 30, 35}
    assert capsys.readouterr().out == ""
    assert kept([10, 30, 40, 50, 60]) == {10, 50, 60}
    said = capsys.readouterr().out
    assert "checkpoint 30 is dropped before it was evaluated: 2 later ones" in said
    assert "checkpoint 40 is dropped" in said
    # Between the metrics and best.json, both the old and the new best stay.
    results.write_best(tmp_path, [10, 50, 60], "val")
    evaluation(tmp_path, 50, 90.0)
    assert kept([10, 50, 60, 70, 80]) >= {10, 50}


def test_a_checkpoint_that_is_being_evaluated_stays(tmp_path, capsys):
    kept = retention.Retention(tmp_path, "val", lambda step: True, most=2)
    with locks.hold(results.results_at(tmp_path, 10)):
        assert kept([10, 20, 30, 40]) == {10, 30, 40}
        said = capsys.readouterr().out
        assert "checkpoint 20 is dropped" in said and "checkpoint 10" not in said
    assert kept([10, 30, 40]) == {30, 40}
