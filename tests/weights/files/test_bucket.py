"""Weights in a bucket are read as those on a disk; what goes wrong says whose fault it is."""

import pathlib

import numpy as np
import pytest

from save_jax import checkpoint
from save_jax.errors import OutageError, UserError
from save_jax.weights import loading
from save_jax.weights.files import bucket, recognise, safetensors
from tests.support import object_store, small
from tests.weights.files.test_recognise import make_clip, write_sharded

CONFIG = small.config()
_, EXPECTED = small.abstract(CONFIG)


@pytest.fixture
def store():
    bucket.fetch.cache_clear()
    yield object_store.register()
    bucket.fetch.cache_clear()


def put(store, source: pathlib.Path, where: str) -> None:
    for path in [source] if source.is_file() else source.iterdir():
        name = where if source.is_file() else f"{where}/{path.name}"
        store.pipe(name, path.read_bytes())


@pytest.mark.parametrize("scheme", ["gs", "s3"])
@pytest.mark.parametrize("kind", ["archive", "file", "shards"])
def test_a_bucket_gives_what_the_disk_gives(store, tmp_path, scheme, kind):
    values = {name: np.full(x.shape, 0.5, np.float32) for name, x in EXPECTED.items()}
    here = tmp_path / "model.safetensors"
    if kind == "archive":
        here = tmp_path / "ViT.pt"
        make_clip("archive", here)
    elif kind == "file":
        safetensors.write(here, values, {recognise.CONFIG: '{"seed": 5}'})
    else:
        here = tmp_path / "shards"
        write_sharded(here, values)
    there = f"{scheme}://bucket/weights/{here.name}"
    put(store, here, there)
    trusted = {"trust_archive": True}
    on_disk = loading.load(str(here), CONFIG, EXPECTED, **trusted)
    in_bucket = loading.load(there, CONFIG, EXPECTED, **trusted)
    assert set(in_bucket.parameters) == set(on_disk.parameters) and in_bucket.parameters
    for name, value in on_disk.parameters.items():
        np.testing.assert_array_equal(in_bucket.parameters[name], value)
    if kind == "file":
        assert recognise.recorded_config(there)[1] == {"seed": 5}
    if kind == "archive":
        with pytest.raises(UserError, match=f"{there}.*trust_archive"):
            loading.load(there, CONFIG, EXPECTED)


def test_what_is_absent_or_damaged_is_named_by_its_full_path(store):
    with pytest.raises(UserError, match=r"gs://bucket/none\.pt does not exist"):
        recognise.open_source("gs://bucket/none.pt")
    store.pipe("gs://bucket/odd.pt", b"<html>")
    with pytest.raises(UserError, match=r"gs://bucket/odd\.pt is a web page"):
        recognise.open_source("gs://bucket/odd.pt")
    store.pipe("gs://bucket/folder/readme.txt", b"")
    with pytest.raises(UserError, match=r"gs://bucket/folder is a directory without weights"):
        recognise.open_source("gs://bucket/folder")
    assert not checkpoint.is_ours("gs://bucket/folder")


@pytest.mark.parametrize(("code", "kind"), [(503, OutageError), (403, UserError)])
def test_a_store_that_fails_is_no_mistake(store, monkeypatch, code, kind):
    store.pipe("gs://bucket/a.pt", b"x" * 99)

    def fail(*_, **__):
        raise object_store.HttpError(code)

    monkeypatch.setattr(object_store.ObjectStore, "get_file", fail)
    monkeypatch.setattr(object_store.ObjectStore, "_open", fail)
    monkeypatch.setattr(object_store.ObjectStore, "cat_file", fail)
    with pytest.raises(kind, match=r"gs://bucket/a\.pt"):
        recognise.open_source("gs://bucket/a.pt")
