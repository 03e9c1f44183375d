import errno
import fcntl
import io
import json
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest

from data_pipelines import input as pipeline
from data_pipelines.splits import open_split
from data_pipelines.storage.local_copies import local_copies
from save_jax.errors import OutageError, UserError
from save_jax.tokenizer import Tokenizer
from tests.data_pipelines.conftest import SMALL
from tests.support import object_store


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """A file system that answers to gs://, and an empty folder for copies."""
    monkeypatch.setenv("SAVE_JAX_CACHE", str(tmp_path / "copies"))
    return object_store.register()


def _content(path):
    return pathlib.Path(path).read_bytes()


def _pipe(files, path, content):
    files.pipe_file(path, content)
    return path


def test_a_file_is_copied_once(bucket, monkeypatch, tmp_path):
    paths = [_pipe(bucket, f"gs://copied/set/{n}", bytes([n]) * 1000) for n in range(3)]
    copies = local_copies(paths)
    assert [_content(copy) for copy in copies] == [bytes([n]) * 1000 for n in range(3)]
    opened = []
    monkeypatch.setattr(
        object_store.ObjectStore, "open", lambda *arguments: opened.append(arguments)
    )
    assert local_copies(paths) == copies
    assert not opened


def test_a_file_that_changed_is_copied_again(bucket):
    path = _pipe(bucket, "gs://copied/a", b"old")
    old = local_copies([path])
    new = local_copies([_pipe(bucket, "gs://copied/a", b"new")])
    assert old != new and _content(*new) == b"new"


def test_files_of_one_name_are_kept_apart(bucket):
    paths = [_pipe(bucket, f"gs://{name}/a", name.encode()) for name in ("one", "two")]
    assert [_content(copy) for copy in local_copies(paths)] == [b"one", b"two"]


def test_what_breaks_off_is_copied_again(bucket, monkeypatch, tmp_path):
    path = _pipe(bucket, "gs://copied/a", b"content")
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space")))
        with pytest.raises(UserError, match=r"No space.*SAVE_JAX_CACHE"):
            local_copies([path])
    assert [name.name for name in (tmp_path / "copies").iterdir()] == ["lock"]
    assert _content(*local_copies([path])) == b"content"


def test_a_store_that_breaks_off_can_be_asked_again(bucket, monkeypatch, tmp_path):
    path = _pipe(bucket, "gs://copied/a", b"content")

    class Breaking(io.BytesIO):
        def read(self, size=-1):
            raise Exception("Service Unavailable, 503")

    with monkeypatch.context() as broken:
        broken.setattr(object_store.ObjectStore, "_open", lambda *_, **__: Breaking())
        with pytest.raises(OutageError, match=r"gs://copied/a: .*503.*same command again"):
            local_copies([path])
    assert [name.name for name in (tmp_path / "copies").iterdir()] == ["lock"]
    assert _content(*local_copies([path])) == b"content"


def test_an_absent_file(bucket):
    with pytest.raises(UserError, match="copied/nowhere"):
        local_copies(["gs://copied/nowhere"])


def test_one_process_copies_and_the_others_wait(bucket, tmp_path):
    path = _pipe(bucket, "gs://copied/a", b"content")
    (tmp_path / "copies").mkdir()
    held = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX);"
    held += "print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", held, str(tmp_path / "copies" / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        other.stdout.readline()
        found = []
        waiting = threading.Thread(target=lambda: found.extend(local_copies([path])))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive() and not found
        other.kill()  # when a process dies, the next one continues
        waiting.join(10)
        assert _content(*found) == b"content"


def test_where_no_lock_can_be_had_it_is_copied_nonetheless(bucket, monkeypatch, capsys):
    def without(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", without)
    assert _content(*local_copies([_pipe(bucket, "gs://copied/a", b"content")])) == b"content"
    assert "copies/lock: this file system has no locks" in capsys.readouterr().err


def test_what_a_killed_process_left_is_removed(bucket, tmp_path):
    path = _pipe(bucket, "gs://copied/a", b"content")
    (copy,) = map(pathlib.Path, local_copies([path]))
    left = copy.with_name(f".{copy.name}.{'0' * 32}.tmp")
    copy.rename(left)
    (tmp_path / "copies" / ".mine.tmp").touch()  # is not ours
    assert local_copies([path]) == [str(copy)] and not left.exists()
    assert (tmp_path / "copies" / ".mine.tmp").exists()


def test_training_reads_a_remote_directory(bucket, prepared):
    bucket.put(str(prepared), "gs://copied/prepared", recursive=True)
    read = []
    for data_dir in (str(prepared), "gs://copied/prepared"):
        split = open_split(data_dir, "msrvtt", "9k", "train", SMALL)
        read += pipeline.train_batches(
            split, batch_size=8, seed=0, start_step=2, total_steps=3, max_words=12, sound=True,
            speech=True, teacher=True, tokenizer=Tokenizer(),
        )  # fmt: skip
    for here, remote in zip(*read, strict=True):
        np.testing.assert_array_equal(here, remote)


def test_a_remote_directory_that_is_not_prepared(bucket, prepared):
    with pytest.raises(UserError, match=r"did not find gs://copied/absent/msrvtt/9k/1\.0\.0/meta"):
        open_split("gs://copied/absent", "msrvtt", "9k", "train", SMALL)
    bucket.put(str(prepared), "gs://copied/lost", recursive=True)
    (record,) = bucket.glob("gs://copied/lost/msrvtt/9k/1.0.0/*test*array_record*")
    bucket.rm(record)
    with pytest.raises(UserError, match=os.path.basename(record)):
        open_split("gs://copied/lost", "msrvtt", "9k", "test", SMALL)
    assert json.loads(bucket.cat("gs://copied/lost/msrvtt/9k/1.0.0/metadata.json"))
