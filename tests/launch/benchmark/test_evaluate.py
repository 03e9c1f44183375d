"""The benchmark of ranking, at a size that says nothing about speed."""

import json

import pytest

from launch.benchmark import __main__ as benchmark

SMALL = ["evaluate", "--captions=900", "--videos=300", "--frames=2", "--dim=16"]


def test_both_ways_are_measured_and_agree(capsys):
    assert benchmark.main([*SMALL, "--matrix", "600", "200"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert result["matrix"]["difference"] < 0.05 and "both ways differ by up to" in out
    assert 1 < result["by_tiles"]["metrics"]["t2v"]["R1"] < 99  # neither chance nor trivial
    for way in (result["matrix"]["whole_matrix"], result["matrix"]["by_tiles"], result["by_tiles"]):
        assert way["seconds"] > 0 and way["memory_peak"] >= way["memory_before"] > 100
    assert "900 × 300" in out and "600 × 200" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--videos=0"], "--videos=0: expected --videos of at least 1"),
        (["--matrix", "3", "0"], "--matrix=0: expected --matrix of at least 1"),
        (["--local_weight=2"], "--local_weight=2.0: expected 0 to 1"),
    ],
)
def test_mistakes_are_named(capsys, flags, message):
    assert benchmark.main([*SMALL, *flags]) == 2
    assert message in capsys.readouterr().err
