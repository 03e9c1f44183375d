"""Sweeps whose points are stand-ins for training."""

import pathlib
import sys

import pytest

from launch.sweep import local

ROOT = pathlib.Path(__file__).parents[2]

CONFIG = """
from configs import demo

get_config = demo.get_config


def sweep():
    {body}
"""


@pytest.fixture
def write_config(tmp_path):
    """Writes a config file with the given body of sweep()."""

    def write(body: str) -> str:
        path = tmp_path / "swept.py"
        path.write_text(CONFIG.format(body=body))
        return str(path)

    return write


@pytest.fixture
def stand_in(monkeypatch):
    """Points run the stand-in instead of save_jax.main."""
    monkeypatch.setattr(
        local,
        "command",
        lambda sweep, name: [
            sys.executable,
            str(ROOT / "tests/support/stand_in.py"),
            *sweep.arguments(name),
        ],
    )


@pytest.fixture
def fake_program(tmp_path, monkeypatch):
    """Puts a shell script of a name first on PATH."""

    def make(name: str, script: str) -> pathlib.Path:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        path = folder / name
        path.write_text("#!/bin/bash\n" + script)
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=":")
        return path

    return make
