"""The same shards by Apache Beam."""

import sys

import pytest

from data_pipelines.prepare import main
from data_pipelines.storage import shards
from save_jax.errors import UserError
from tests.data_pipelines.conftest import SMALL
from tests.support import preparing

FLAGS = [f"--{key}={value}" for key, value in SMALL.items()]


def test_beam_without_beam(miniature, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    command = ["msrvtt", f"--root={miniature}", f"--out={tmp_path}", "--beam_runner=DirectRunner"]
    assert main([*command, *FLAGS]) == 2
    assert "pip install -e '.[beam]'" in capsys.readouterr().err


def test_the_direct_runner_and_the_local_path_give_identical_files(miniature, tmp_path):
    local = preparing.run(str(miniature), str(tmp_path / "local"))
    beam_options = "--direct_num_workers=1"
    found = preparing.run(
        str(miniature),
        str(tmp_path / "beam"),
        beam_runner="DirectRunner",
        beam_options=beam_options,
    )
    names = sorted(path.name for path in local.iterdir())
    assert sorted(path.name for path in found.iterdir()) == names and len(names) == 11
    for name in names:
        assert (found / name).read_bytes() == (local / name).read_bytes(), name
    assert [path.name for path in found.parent.iterdir()] == ["1.0.0"]


def test_a_failure_in_the_pipeline_is_one_message(miniature, tmp_path, monkeypatch):
    out = str(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(shards, "write_plan", lambda *_: None)  # so that no worker finds its plan
        with pytest.raises(UserError, match=r"--beam_runner=DirectRunner: .*same command again"):
            preparing.run(str(miniature), out, beam_runner="DirectRunner")
    assert not list(tmp_path.rglob("dataset_info.json")), "what failed looks complete"
    found = preparing.run(str(miniature), out, beam_runner="DirectRunner")
    assert (found / "dataset_info.json").exists()
