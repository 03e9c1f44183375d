"""A test that needs a Debian package which is missing is skipped, and fails with CI=true."""

import pytest

from tests.support import system


@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip), ("true", pytest.fail)])
def test_a_missing_program(monkeypatch, ci, outcome):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(outcome.Exception, match="apt-get install gcc"):
        system.need("gcc", "gcc")


def test_a_package_that_is_not_listed():
    with pytest.raises(AssertionError, match=r"debian\.txt"):
        system.need("true", "not-listed")
