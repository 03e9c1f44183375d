"""Files of a run, on a disk and in a bucket."""

import errno
import fcntl
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from save_jax import files, main
from save_jax.errors import OutageError, UserError
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


def content(folder) -> dict[str, str]:
    return {p.name: p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("unique", [False, True])
def test_a_file_that_is_written_bit_by_bit_appears_at_once(tmp_path, unique):
    (tmp_path / "a").write_text("old")
    with files.appearing(tmp_path / "a", unique=unique) as temporary:
        with temporary.open("w") as file:
            file.write("n")
            assert (tmp_path / "a").read_text() == "old"
            file.write("ew")
        assert temporary.parent == tmp_path
        with files.appearing(tmp_path / "a", unique=True) as other:  # of a second process
            assert other != temporary
            other.write_text("theirs")
        assert temporary.read_text() == "new" and (tmp_path / "a").read_text() == "theirs"
    assert content(tmp_path) == {"a": "new"}


def test_a_directory_appears_at_once_in_the_place_of_another(tmp_path):
    for number in range(2):
        with files.appearing(tmp_path / "made") as temporary:
            temporary.mkdir()
            (temporary / f"file-{number}").write_text(str(number))
            assert (tmp_path / "made").exists() == bool(number)
    assert content(tmp_path) == {"file-1": "1"} and os.listdir(tmp_path) == ["made"]


def test_a_directory_is_not_replaced_by_a_file(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("kept")
    with pytest.raises(IsADirectoryError):
        files.write(tmp_path / "a", "b")
    assert content(tmp_path) == {"mine": "kept"}


def test_a_file_for_a_bucket_is_made_here_and_copied(store, tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    for text in ("old", "new"):
        with files.appearing(files.path("gs://bucket/run/a")) as temporary:
            assert temporary.parent == tmp_path
            temporary.write_text(text)
    assert store.cat("gs://bucket/run/a") == b"new" and not os.listdir(tmp_path)


@pytest.mark.parametrize("where", ["disk", "gs://bucket"])
def test_what_is_not_finished_leaves_what_was_there(store, tmp_path, monkeypatch, where):
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    target = files.path(tmp_path / "a" if where == "disk" else f"{where}/a")
    files.write(target, "old")
    with pytest.raises(ZeroDivisionError), files.appearing(target) as temporary:
        temporary.write_text("n")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), files.appearing(target) as temporary:
        temporary.mkdir()
        (temporary / "part").touch()
        raise ZeroDivisionError
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == (["a"] if where == "disk" else [])


def test_a_name_does_not_stand_for_what_is_not_on_the_disk(tmp_path, monkeypatch):
    """The content reaches the disk before the name does, and then the folder with the name."""
    done, fsync, replace = [], os.fsync, os.replace

    def noting_fsync(descriptor):
        found = os.stat(f"/proc/self/fd/{descriptor}")
        done.append("folder" if os.path.samestat(found, tmp_path.stat()) else found.st_size)
        fsync(descriptor)

    def noting_replace(source, target):
        done.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    files.write(tmp_path / "a", "content")
    assert done == [7, "name", "folder"]
    done.clear()
    files.write(tmp_path / "b", "content", fsync=False)
    assert done == ["name"]


class HttpError(Exception):
    """As gcsfs has it."""

    __module__ = "gcsfs.retry"

    def __init__(self, code):
        super().__init__(f"HTTP {code}")
        self.code = code


def named(name: str, module: str, **attributes) -> Exception:
    return type(name, (Exception,), {"__module__": module, **attributes})(name)


@pytest.mark.parametrize(
    "error",
    [
        HttpError(503),
        HttpError(429),
        TimeoutError(),
        OSError(errno.ENETUNREACH, "Network is unreachable"),
        OSError(errno.EBUSY, "SlowDown"),  # s3fs, of 503
        named("ClientConnectorError", "aiohttp.client_exceptions"),
        named("EndpointConnectionError", "botocore.exceptions"),
        named("TransportError", "google.auth.exceptions", retryable=False),
        named("RefreshError", "google.auth.exceptions", retryable=True),
    ],
)
def test_a_store_that_does_not_answer_is_an_outage(store, monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(object_store.ObjectStore, "exists", fail)
    with pytest.raises(OutageError, match=r"gs://bucket/run cannot be reached .*command goes on"):
        files.path("gs://bucket/run")


@pytest.mark.parametrize(("code", "ends"), [(503, os.EX_TEMPFAIL), (401, 2)])
def test_a_run_that_a_store_does_not_let_begin(store, monkeypatch, capsys, code, ends):
    """After an outage, its launcher starts it again; with a wrong name, that would be no use."""

    def fail(*arguments, **options):
        raise HttpError(code)

    monkeypatch.setattr(object_store.ObjectStore, "exists", fail)
    flags = ["--config=configs/demo.py", "--workdir=gs://bucket/run"]
    assert main.main(["save_jax.main", *flags]) == ends
    assert f"gs://bucket/run cannot be reached (HttpError: HTTP {code})" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["_open", "open"])
def test_a_store_that_fails_as_a_directory_is_taken(store, quick_lease, monkeypatch, method):
    where = files.path("gs://bucket/run")

    def fail(*arguments, **options):
        raise HttpError(503)

    monkeypatch.setattr(object_store.ObjectStore, method, fail)
    with pytest.raises(OutageError, match=r"gs://bucket/run/\.lock cannot"), files.hold(where):
        pass


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (HttpError(401), "cannot be reached .*HTTP 401.* credentials of this machine right"),
        (HttpError(400), "cannot be reached .*HTTP 400"),
        (named("DefaultCredentialsError", "google.auth.exceptions"), "cannot be reached"),
        (named("NoCredentialsError", "botocore.exceptions"), "cannot be reached"),
        (
            named(
                "ClientError",
                "botocore.exceptions",
                response={"ResponseMetadata": {"HTTPStatusCode": 403}},
            ),
            "cannot be reached",
        ),
        (PermissionError("Forbidden"), "cannot be reached"),
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


def test_a_lock_that_its_last_holder_removed_is_taken_anew(tmp_path):
    """What waited got a lock on a file that is not there any more, as anybody's second would."""
    path, waited = tmp_path / "lock", []
    first = files.lock(path)
    assert files.lock(path) is None
    waiting = threading.Thread(target=lambda: waited.append(files.lock(path, wait=True)))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive() and not waited
    path.unlink()
    os.close(first)
    waiting.join(10)
    assert path.exists() and files.lock(path) is None  # the one that waited has it
    os.close(waited[0])
    os.close(files.lock(path))


def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, capsys):
    def without(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    for _ in range(2):
        os.close(files.lock(tmp_path / "lock"))
    with files.hold(tmp_path / "run"):
        pass
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("this file system has no locks" in line for line in said)
    assert f"{tmp_path}/lock" in said[0] and f"{tmp_path}/run/.lock" in said[1]


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


def test_a_directory_that_is_made_later_is_held_by_a_file_beside_it(tmp_path):
    directory, lock = tmp_path / "out" / "1.0.0", tmp_path / "out" / "1.0.0.lock"
    with files.hold(directory, beside=lock):
        assert os.listdir(lock.parent) == ["1.0.0.lock"]
        with pytest.raises(UserError, match=r"1\.0\.0 is in use by .*1\.0\.0\.lock"):
            files.hold(directory, beside=lock).__enter__()
        directory.mkdir()
    assert os.listdir(lock.parent) == ["1.0.0"]


def test_a_lock_is_left_to_another_process_that_has_it(tmp_path):
    with files.hold(tmp_path):
        (tmp_path / ".lock").unlink()
        other = files.lock(tmp_path / ".lock")
    assert files.lock(tmp_path / ".lock") is None
    os.close(other)


def test_a_process_may_wait_for_the_one_that_holds_a_directory(tmp_path, capfd):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE)
    while not (tmp_path / ".lock").exists() or not (tmp_path / ".lock").read_text():
        time.sleep(0.05)
    threading.Timer(0.5, holder.communicate, [b"\n"]).start()
    with files.hold(tmp_path, wait=True):
        assert holder.wait() == 0
    assert f"waiting for process {holder.pid} on" in capfd.readouterr().out


def test_where_no_directory_can_be_made_there_is_an_end():
    with pytest.raises(UserError, match="/proc/run: expected a directory to write to, found"):
        files.hold(pathlib.Path("/proc/run")).__enter__()


@pytest.mark.parametrize(("number", "error"), [(errno.EIO, OutageError), (errno.EROFS, UserError)])
def test_a_disk_that_fails_as_a_directory_is_taken(tmp_path, monkeypatch, number, error):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(error, match=f"{tmp_path}.*{os.strerror(number)}"), files.hold(tmp_path):
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


def test_a_bucket_may_be_waited_for_as_long_as_it_takes(store, quick_lease):
    """Longer than a lease lasts, for it is renewed."""
    where = files.path("gs://bucket/run")
    lock, waited = where / files.LOCK, []

    def wait() -> None:
        with files.hold(where, wait=True):
            waited.append(True)

    files.write(lock, '{"id": "x", "holder": "process 7 on pod-0", "beat": 0}')
    waiting = threading.Thread(target=wait)
    waiting.start()
    for beat in range(20):
        files.write(lock, f'{{"id": "x", "holder": "process 7 on pod-0", "beat": {beat}}}')
        time.sleep(0.1)
    assert not waited
    lock.unlink()
    waiting.join(10)
    assert waited and not store.store


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
    """It must not write any more, at once. Launchers take its exit code for "can be resumed"."""
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
    assert done.returncode == os.EX_TEMPFAIL, done.stderr
    assert "was taken over by process 9 on pod-2" in done.stderr
    assert not (tmp_path / "late").exists()


def test_a_file_in_the_place_of_a_directory_is_named(tmp_path):
    (tmp_path / "run").touch()
    with (
        pytest.raises(UserError, match=r"run: expected a directory to write to"),
        files.hold(tmp_path / "run"),
    ):
        pass
