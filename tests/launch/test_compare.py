"""The table of several runs."""

import json

from launch import compare


def evaluation(workdir, step: int, total: float, groups: dict[str, float]) -> None:
    folder = workdir / "evaluation" / str(step)
    folder.mkdir(parents=True)
    result = {
        "t2v": {"SumR": total, "R1": 1.5},
        "protocol": {"captions": 395},
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


def test_a_run_without_an_evaluation_is_named(tmp_path, capsys):
    assert compare.main([str(tmp_path)]) == 2
    assert f"error: {tmp_path} holds no evaluation" in capsys.readouterr().err
