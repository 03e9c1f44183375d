"""The revision that is recorded is that of the code, or none."""

import json
import pathlib
import platform
import subprocess

import jax
import pytest

import save_jax
from save_jax import provenance


def git(root: pathlib.Path, *arguments: str) -> str:
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    command = ["git", "-C", str(root), *author, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def clone(tmp_path):
    """A repository with the code in it, committed."""
    (tmp_path / "save_jax").mkdir()
    (tmp_path / "save_jax/__init__.py").touch()
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message=a")
    return tmp_path


def test_a_clone_has_its_revision(clone):
    commit = git(clone, "rev-parse", "HEAD")
    (clone / "runs").mkdir()
    (clone / "runs/notes").touch()  # no code
    assert provenance.revision.__wrapped__(clone) == commit and len(commit) == 40


@pytest.mark.parametrize("changed", ["save_jax/__init__.py", "configs/mine.py"])
def test_a_change_is_marked(clone, changed):
    (clone / changed).parent.mkdir(exist_ok=True)
    (clone / changed).write_text("changed = True\n")
    assert provenance.revision.__wrapped__(clone) == git(clone, "rev-parse", "HEAD") + "-dirty"


def test_the_revision_of_another_project_is_not_taken_for_ours(clone, tmp_path):
    site_packages = clone / "venv/site-packages"
    (site_packages / "save_jax").mkdir(parents=True)
    (site_packages / "save_jax/__init__.py").touch()
    assert provenance.revision.__wrapped__(site_packages) is None


def test_without_git_there_is_none(clone, monkeypatch):
    monkeypatch.setenv("PATH", str(clone))
    assert provenance.revision.__wrapped__(clone) is None


def test_code_and_devices_are_described():
    found = json.loads(json.dumps(provenance.environment()))
    assert found["versions"]["save_jax"] == save_jax.__version__
    assert found["versions"]["jax"] == jax.__version__
    assert found["versions"]["python"] == platform.python_version()
    assert {"flax", "jaxlib", "optax"} < set(found["versions"])
    assert found["devices"] == {
        "platform": "cpu",
        "kinds": ["cpu"],
        "count": jax.device_count(),
        "processes": 1,
    }
    assert "git" in found
