"""Writes a cache of the Hugging Face Hub, as its client lays it out on a disk."""

import pathlib

import pytest


def commit(number: int) -> str:
    """A commit's name."""
    return f"{number:040x}"


def revision(cache: pathlib.Path, model: str, number: int) -> pathlib.Path:
    """The folder of a model's files at a commit, made and empty."""
    folder = _model(cache, model) / "snapshots" / commit(number)
    folder.mkdir(parents=True)
    return folder


def name(cache: pathlib.Path, model: str, **commits: int) -> None:
    """Notes which commits branches and tags are at."""
    for ref, number in commits.items():
        path = _model(cache, model) / "refs" / ref
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit(number))


def use(monkeypatch: pytest.MonkeyPatch, cache: pathlib.Path) -> None:
    """Makes it the cache that the client reads, without a network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))


def _model(cache: pathlib.Path, model: str) -> pathlib.Path:
    return cache / f"models--{model.replace('/', '--')}"
