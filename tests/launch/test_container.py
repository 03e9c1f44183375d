"""The container file, without building it."""

import re
import subprocess

import pytest

from tests.launch import conftest

DOCKERFILE = (conftest.ROOT / "launch/Dockerfile").read_text()


def container(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "launch/container.sh", *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=conftest.ROOT,
    )


def test_a_dry_run():
    assert subprocess.run(["bash", "-n", "launch/container.sh"], cwd=conftest.ROOT).returncode == 0
    done = container("--image=registry/save_jax:1", "--extra=tpu", "--push", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert [line.strip() for line in done.stdout.splitlines()] == [
        "docker build --file=launch/Dockerfile --build-arg=EXTRA=tpu --tag=registry/save_jax:1 .",
        "docker push registry/save_jax:1",
    ]


@pytest.mark.parametrize("arguments", [["--dry_run"], ["--image=a", "--extra=rocm"], ["stray"]])
def test_a_mistake_is_one_message_and_exit_code_2(arguments):
    done = container(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ")


def test_help():
    said = container("--help")
    assert said.returncode == 0 and "Exit codes: 0 done" in said.stdout


def test_what_it_copies_exists_and_is_not_ignored():
    copied = {
        name
        for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE)
        for name in line.split()[:-1]
    }
    ignore = (conftest.ROOT / "launch/Dockerfile.dockerignore").read_text().splitlines()
    assert copied == {line.removeprefix("!") for line in ignore if line.startswith("!")}
    assert all((conftest.ROOT / name).exists() for name in copied)
    # Every package that setup.py installs is there.
    packages = {path.parent.name for path in conftest.ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages <= copied


def test_its_extras_exist():
    setup = (conftest.ROOT / "setup.py").read_text()
    extras = set(re.findall(r'^        "(\w+)": ', setup, re.MULTILINE))
    assert {"data", "cuda", "tpu"} <= extras
    assert "ARG EXTRA=cuda" in DOCKERFILE and ".[data,${EXTRA}]" in DOCKERFILE
