"""What tests need of the machine beyond Python packages."""

import os
import pathlib
import shutil

import jax
import pytest

from launch.compile.program import LIBTPU

PACKAGES = pathlib.Path(__file__).parents[1] / "debian.txt"


def debian_packages() -> list[str]:
    """Returns the names that tests/debian.txt lists."""
    lines = (line.partition("#")[0].strip() for line in PACKAGES.read_text().splitlines())
    return [line for line in lines if line]


def need(program: str, package: str) -> None:
    """Skips the test where a program is missing; with CI=true, fails it.

    Args:
        program: what the test calls.
        package: the Debian package that has it, one of tests/debian.txt.
    """
    assert package in debian_packages(), f"{package}: expected it in {PACKAGES}"
    if shutil.which(program):
        return
    message = f"{program} is not installed: apt-get install {package}"
    if os.environ.get("CI") == "true":
        pytest.fail(f"{message} ({PACKAGES} names it)")
    pytest.skip(message)


def use_libtpu(monkeypatch) -> None:
    """Sets libtpu's environment for one test: it must not reach what other tests start."""
    jax.devices()  # the CPU's compiler has read its flags, some of which libtpu does not know
    monkeypatch.setenv("XLA_FLAGS", "")
    for key, value in LIBTPU.items():
        monkeypatch.setenv(key, value)
