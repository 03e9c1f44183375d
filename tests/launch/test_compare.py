"""The table of several runs."""

import json

from launch import compare
from tests.support import object_store


def evaluation(workdir, step: int, total: float, groups: dict[str, float], **protocol) -> None:
    folder = workdir / "evaluation" / str(step)
    folder.mkdir(parents=True)
    result = {
        "t2v": {"SumR": total, "R1": 1.5},
        "protocol": {"captions": 395, **protocol},
        "groups": {name: {"queries": 87, "t2v": {"R1": r1}} for name, r1 in groups.items()},
    }
    (folder / "metrics.json").write_text(json.dumps(result))


def test_the_last_evaluation_of_each_run_in_the_order_given(tmp_path, capsys):
    evaluation(tmp_path / "b", 9, 10.0, {"speech": 1.0})
    evaluation(tmp_path / "b", 10, 20.0, {"speech": 2.0})
    evaluation(tmp_path / "a", 10, 30.0, {"speech": 40.2, "sound": 5.7})
    assert compare.main([str(tmp_path / "b"), str(tmp_path / "a")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    assert rows == [["b", "20.0", "1.5", "2.0"], ["a", "30.0", "1.5", "40.2", "5.7"]]


def test_answers_to_different_questions_are_told_apart(tmp_path, capsys):
    for name in "abcde":
        evaluation(tmp_path / name, 1, 1.0, {}, split="test", model={"sound_weight": 0.5})
    evaluation(tmp_path / "old", 1, 1.0, {})  # says nothing of its split
    names = [str(tmp_path / name) for name in ("a", "b", "c", "d", "e", "old")]
    assert compare.main(names) == 0
    assert capsys.readouterr().err == ""
    # Of another model: that is what comparing is for. Of another split: not.
    evaluation(tmp_path / "f", 1, 1.0, {}, split="val", model={"sound_weight": 0}, dtype="bfloat16")
    assert compare.main([*names, str(tmp_path / "f")]) == 0
    assert capsys.readouterr().err == (
        "warning: these evaluations differ in protocol: split is 'test' in a, b, c and 2 more; "
        "'val' in f\n"
    )


def test_a_run_without_an_evaluation_is_named(tmp_path, capsys):
    assert compare.main([str(tmp_path)]) == 2
    assert f"error: {tmp_path} holds no evaluation" in capsys.readouterr().err


def test_a_path_that_leads_nowhere_is_not_a_run_without_an_evaluation(tmp_path, capsys):
    assert compare.main([str(tmp_path / "nosuch")]) == 2
    assert f"error: {tmp_path / 'nosuch'} does not exist" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert compare.main([str(tmp_path / "file")]) == 2
    assert f"error: {tmp_path / 'file'} is not a directory" in capsys.readouterr().err


def test_runs_in_a_bucket(tmp_path, capsys):
    evaluation(tmp_path / "a", 10, 30.0, {})
    object_store.register().put(str(tmp_path), "gs://bucket/runs", recursive=True)
    assert compare.main(["gs://bucket/runs/a"]) == 0
    assert capsys.readouterr().out.splitlines()[3].split() == ["a", "30.0", "1.5"]
