"""What evaluations leave in a workdir, and what follows: the best checkpoint, the summary."""

import json

import pytest

from save_jax import results


def evaluation(workdir, step: int, total: float, subset: str = "", **protocol) -> None:
    """Writes the metrics of a run's own checkpoint; `protocol` says what is otherwise."""
    scores = {"R1": 1.0, "R5": 2.0, "R10": 3.0, "MdR": 4.0, "MnR": 5.0, "SumR": total}
    said = {"checkpoint": f"checkpoints/{step}", "split": "val", "selection": "now", **protocol}
    folder = results.results_at(workdir, step, subset)
    folder.mkdir(parents=True, exist_ok=True)
    result = {"step": step, "t2v": scores, "v2t": scores, "groups": {}, "protocol": said}
    (folder / "metrics.json").write_text(json.dumps(result))


def best(workdir) -> dict:
    return json.loads((workdir / results.BEST).read_text())


def test_the_best_is_of_those_that_are_there_and_of_equal_ones_the_later(tmp_path):
    for step, total in ((5, 90.0), (10, 60.0), (15, 60.0), (20, 50.0)):
        evaluation(tmp_path, step, total)
    assert results.best(tmp_path, [10, 15, 20, 25], "val") == (60.0, 15)
    assert results.best(tmp_path, [25], "val") is None
    results.write_best(tmp_path, [10, 15, 20, 25], "val")
    assert best(tmp_path) == {
        "step": 15,
        "metric": "SumR",
        "value": 60.0,
        "split": "val",
        "selection": "now",
    }
    assert results.read_best(tmp_path) == 15


@pytest.mark.parametrize("other", [{"checkpoint": "/elsewhere/a.pt"}, {"split": "test"}])
def test_evaluations_of_something_else_choose_nothing(tmp_path, other):
    evaluation(tmp_path, 5, 90.0, **other)
    results.write_best(tmp_path, [5], "val")
    assert not (tmp_path / results.BEST).exists()
    assert results.read_best(tmp_path) is None
    evaluation(tmp_path, 10, 10.0)
    results.write_best(tmp_path, [5, 10], "val")
    assert best(tmp_path)["step"] == 10


def test_other_data_of_the_same_name_choose_nothing(tmp_path):
    """The same split of another data directory: fewer captions, and so higher scores."""
    digests = {"val": "a" * 32}
    run = {"provenance": {"data": {"digests": digests}}, "data": {"eval_split": "val"}}
    (tmp_path / "config.json").write_text(json.dumps(run))
    evaluation(tmp_path, 5, 90.0, data={"digest": "b" * 32})
    evaluation(tmp_path, 10, 60.0, data={"digest": "a" * 32})
    assert results.best(tmp_path, [5, 10], "val") == (60.0, 10)
    config = {"data": {"dataset": None, "variant": None, "eval_split": "val"}}
    assert results.subset(config, tmp_path, "a" * 32) == ""
    assert results.subset(config, tmp_path, "b" * 32) == "val-bbbbbbbb"


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"step": 5}', '{"step": 5, "t2v": {}}', "null"])
def test_damaged_files_are_none(tmp_path, text):
    evaluation(tmp_path, 10, 60.0)
    (tmp_path / "evaluation/5").mkdir()
    (tmp_path / "evaluation/5/metrics.json").write_text(text)
    assert results.own(tmp_path, 5, "val") is None
    (tmp_path / results.BEST).write_text(text)
    assert results.read_best(tmp_path) in (None, 5)
    results.summarise(tmp_path, "val")


def test_an_evaluation_that_was_cut_short_counts_as_none(tmp_path):
    evaluation(tmp_path, 5, 90.0)
    (tmp_path / "evaluation/5/metrics.json").write_text('{"step": 5, "t2v": {')
    assert results.own(tmp_path, 5, "val") is None
    (tmp_path / "evaluation/5/metrics.json").unlink()
    assert results.value(tmp_path, 5, "val") is None


def test_the_value_of_a_checkpoint_of_an_earlier_version_lies_beside_it(tmp_path):
    (tmp_path / "checkpoints/5/metrics").mkdir(parents=True)
    (tmp_path / "checkpoints/5/metrics/metrics").write_text('{"SumR": 70.0, "R1": 1.0}')
    assert results.value(tmp_path, 5, "val") == 70.0
    evaluation(tmp_path, 5, 71.0)
    assert results.value(tmp_path, 5, "val") == 71.0


def test_what_lies_beyond_the_step_of_a_restart_is_evaluated_again(tmp_path):
    for step in (5, 10, 15):
        evaluation(tmp_path, step, 50.0)
    evaluation(tmp_path, 15, 50.0, results.TEST, split="test")
    evaluation(tmp_path, 15, 50.0, "ema")
    evaluation(tmp_path, 20, 50.0, checkpoint="/elsewhere/a.pt")
    evaluation(tmp_path, 20, 50.0, "ema", checkpoint="/elsewhere/a.pt")
    results.drop_beyond(tmp_path, 10, "val")
    own = [step for step in (5, 10, 15) if results.own(tmp_path, step, "val")]
    assert own == [5, 10]
    assert results.own(tmp_path, 15, "test", results.TEST) is None
    assert results.own(tmp_path, 15, "val", "ema") is None
    for subset in ("", "ema"):
        path = results.results_at(tmp_path, 20, subset) / results.METRICS
        assert path.exists(), "it is of other weights"


def test_a_summary_reports_on_the_test_split_what_the_other_chose(tmp_path, capsys):
    for step, total in ((5, 61.0), (10, 51.0)):
        evaluation(tmp_path, step, total)
    evaluation(tmp_path, 5, 33.0, results.TEST, split="test")
    results.write_best(tmp_path, [5, 10], "val")
    results.summarise(tmp_path, "val", "test")
    said = capsys.readouterr().out
    assert "optimistic" not in said
    last, chosen = said.index("last step (10), val split"), said.index("best of 2 evaluations on")
    tested = said.index("test split, step 5 (chosen on val):")
    assert last < said.index("51.0") < chosen < said.index("61.0") < tested < said.index("33.0")
    assert "test split, step 10 (the last step): not evaluated" in said
