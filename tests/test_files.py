"""Files of a run, on a disk and in a bucket."""

import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from save_jax import files
from save_jax.errors import UserError
from tests.support import object_store


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


HOLD = "import sys; from save_jax import files\nwith files.hold(files.path(sys.argv[1])): input()"


def test_a_directory_is_held_by_one_process(tmp_path):
    with files.hold(tmp_path / "run"):
        with (
            pytest.raises(UserError, match=f"run is in use by process {os.getpid()} on"),
            files.hold(tmp_path / "run"),
        ):
            pass
        (tmp_path / "run" / "config.json").touch()
    with files.hold(tmp_path / "run"):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_nothing_is_left_of_a_directory_that_was_not_written_to(tmp_path):
    with files.hold(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()


def test_a_lock_ends_with_its_process(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE)
    while not (tmp_path / ".lock").exists() or not (tmp_path / ".lock").read_text():
        time.sleep(0.05)
    with pytest.raises(UserError, match=f"process {holder.pid} on"), files.hold(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with files.hold(tmp_path):
        pass


@pytest.fixture
def quick_lease(monkeypatch):
    monkeypatch.setattr(files, "_RENEWED", 0.1)
    monkeypatch.setattr(files, "_LEASE", 1.0)
    monkeypatch.setattr(files, "_SETTLED", 0.2)


def test_a_bucket_is_held_by_one_process(store, quick_lease):
    where = files.path("gs://bucket/run")
    with files.hold(where):
        with (
            pytest.raises(UserError, match=f"run is in use by process {os.getpid()} on"),
            files.hold(where),
        ):
            pass
        time.sleep(0.5)
    assert not store.store
    with files.hold(where):
        pass


def test_a_lease_that_was_left_behind_is_taken_over(store, quick_lease, capsys):
    where = files.path("gs://bucket/run")
    files.write(where / files.LOCK, '{"id": "x", "holder": "process 7 on pod-0", "beat": 3}')
    with files.hold(where):
        assert "is in use by process 7 on pod-0: waiting" in capsys.readouterr().out
    assert not store.store


def test_a_lease_whose_holder_is_ending_is_waited_for(store, quick_lease):
    where, began = files.path("gs://bucket/run"), time.monotonic()

    def end() -> None:
        for beat in range(3):
            files.write(where / files.LOCK, f'{{"id": "x", "holder": "pod-0", "beat": {beat}}}')
            time.sleep(0.1)
        (where / files.LOCK).unlink()

    files.write(where / files.LOCK, '{"id": "x", "holder": "pod-0", "beat": -1}')
    ending = threading.Thread(target=end)
    ending.start()
    with files.hold(where):
        assert time.monotonic() - began < 1.0
    ending.join()


def test_of_two_that_begin_at_once_one_has_the_bucket(store, quick_lease, monkeypatch):
    where, written = files.path("gs://bucket/run"), []

    def slow_write(path, text):
        write(path, text)
        if not written:  # another process writes its own right after
            written.append(True)
            write(path, '{"id": "y", "holder": "process 8 on pod-1", "beat": 0}')

    write = files.write
    monkeypatch.setattr(files, "write", slow_write)
    with pytest.raises(UserError, match="process 8 on pod-1"), files.hold(where):
        pass


def test_a_process_whose_lease_was_taken_over_ends(tmp_path):
    """It must not write any more: its exit code is 1, at once."""
    program = f"""
import time
from save_jax import files
from tests.support import object_store
object_store.register()
files._RENEWED, files._SETTLED = 0.1, 0.1
where = files.path("gs://bucket/run")
with files.hold(where):
    files.write(where / files.LOCK, '{{"id": "z", "holder": "process 9 on pod-2"}}')
    time.sleep(30)
    open({str(tmp_path / "late")!r}, "w")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "was taken over by process 9 on pod-2" in done.stderr
    assert not (tmp_path / "late").exists()


def test_a_file_in_the_place_of_a_directory_is_named(tmp_path):
    (tmp_path / "run").touch()
    with (
        pytest.raises(UserError, match=r"run: expected a directory to write to"),
        files.hold(tmp_path / "run"),
    ):
        pass
