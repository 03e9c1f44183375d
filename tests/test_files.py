"""Files of a run, on a disk and in a bucket."""

import errno
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from save_jax import files, main
from save_jax.errors import OutageError, UserError
from tests.support import object_store
from tests.support.object_store import HttpError


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


def test_a_file_that_is_written_bit_by_bit_appears_at_once(tmp_path):
    (tmp_path / "a").write_text("old")
    with files.appearing(tmp_path / "a") as temporary:
        with temporary.open("w") as file:
            file.write("n")
            assert (tmp_path / "a").read_text() == "old"
            file.write("ew")
        assert temporary.parent == tmp_path
        with files.appearing(tmp_path / "a") as other:  # of a second process
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


def test_what_killed_processes_left_is_removed_a_day_later(tmp_path):
    names = [f".{name}.{digit * 32}.tmp" for name, digit in (("a", "0"), ("b", "1"), ("a", "2"))]
    (tmp_path / names[0]).write_text("half")
    (tmp_path / names[1]).mkdir()
    (tmp_path / names[1] / "part").touch()
    for name in names[:2]:
        os.utime(tmp_path / name, (time.time() - 25 * 3600,) * 2)
    (tmp_path / names[2]).write_text("of a process that is writing it")
    (tmp_path / ".mine.tmp").write_text("not ours")
    os.utime(tmp_path / ".mine.tmp", (0, 0))
    files.write(tmp_path / "a", "whole")
    assert sorted(os.listdir(tmp_path)) == sorted([names[2], ".mine.tmp", "a"])


REPLACING = """
import os, pathlib, shutil, signal, sys
from save_jax import files

directory, killed_in = pathlib.Path(sys.argv[1]), sys.argv[2]
module, _, name = killed_in.rpartition(".")
with files.appearing(directory) as temporary:
    temporary.mkdir()
    (temporary / "file").write_text("new")
    setattr(sys.modules[module], name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.mark.parametrize(
    ("killed_in", "found"), [("os.rename", "old"), ("os.replace", "old"), ("shutil.rmtree", "new")]
)
def test_a_directory_is_there_again_after_a_kill_while_it_was_replaced(tmp_path, killed_in, found):
    made = tmp_path / "made"
    made.mkdir()
    (made / "file").write_text("old")
    arguments = [sys.executable, "-c", REPLACING, str(made), killed_in]
    assert subprocess.run(arguments).returncode == -signal.SIGKILL
    with pytest.raises(ZeroDivisionError), files.appearing(made):
        raise ZeroDivisionError
    assert content(made) == {"file": found}
    assert not [name for name in os.listdir(tmp_path) if name != "made" and name[-4:] != ".tmp"]


def test_a_directory_that_cannot_be_replaced_is_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "file").write_text("old")

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output"), files.appearing(tmp_path / "made") as new:
        new.mkdir()
    assert content(tmp_path) == {"file": "old"} and os.listdir(tmp_path) == ["made"]


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
    with pytest.raises(
        OutageError, match=r"gs://bucket/run cannot be reached .*command again to resume"
    ):
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
        (ImportError("no gcsfs"), "gs://bucket/run.*no gcsfs.*pip install -e .*remote"),
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
