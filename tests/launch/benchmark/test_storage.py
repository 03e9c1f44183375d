"""The benchmark of a cache's storage, at a size that says nothing about speed."""

import json

import pytest

from launch.benchmark import __main__ as benchmark

SMALL = ["storage", "--rows=3", "--batch=2", "--turns=1"]


def test_both_ways_are_measured(capsys, tmp_path):
    assert benchmark.main([*SMALL, f"--out={tmp_path}"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert result["bytes"] == 3 * 1213 * 768 * 2
    for key in ("gigabytes_per_second", "processor_seconds_per_gigabyte"):
        for way in ("shards", "memory_map"):
            found = result[key][way]
            assert list(found) == ["write", "read_cold", "read_warm"] and min(found.values()) > 0
            assert way in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--rows=0", "--batch=0", "--turns=0"])
def test_mistakes_are_named(capsys, flag):
    assert benchmark.main([*SMALL, flag]) == 2
    assert f"{flag}: expected {flag[:-2]} of at least 1" in capsys.readouterr().err
