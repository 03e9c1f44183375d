"""Files of a run, on a disk and in a bucket."""

import pathlib

import pytest

from save_jax import files
from save_jax.errors import UserError
from tests import object_store


@pytest.fixture
def store():
    return object_store.register()


def test_a_bucket_is_written_and_read(store):
    where = files.path("gs://bucket/run")
    files.write(where / "config.json", "{}")
    assert where.is_dir() and (where / "config.json").read_text() == "{}"
    (content,) = store.store.values()
    assert content.getvalue() == b"{}"


def test_a_disk_is_written_and_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = files.path("run.json")
    assert where == tmp_path / "run.json" and isinstance(where, pathlib.Path)
    files.write(where, b"{}")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("no route to host"), "gs://bucket/run cannot be reached .*no route to host"),
        (ValueError("Bucket is requester pays"), "cannot be reached .*requester pays"),
        (ImportError("no gcsfs"), "gs://bucket/run.*no gcsfs.*save_jax.remote"),
    ],
)
def test_a_store_that_cannot_be_reached(store, monkeypatch, error, message):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(object_store.ObjectStore, "exists", fail)
    with pytest.raises(UserError, match=message):
        files.path("gs://bucket/run")


def test_a_kind_of_store_that_does_not_exist():
    with pytest.raises(UserError, match="xyz://bucket/run: expected a path on a disk, gs:// or"):
        files.path("xyz://bucket/run")
