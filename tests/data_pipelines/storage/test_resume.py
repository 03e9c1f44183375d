"""A preparation may end at any moment: the next one completes it, with the same result."""

import errno
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from array_record.python import array_record_module

from data_pipelines import prepared
from data_pipelines.modalities import record as records
from data_pipelines.prepare import main
from data_pipelines.recipe import version_directory
from data_pipelines.storage import build, shards, tfds_format
from save_jax import locks, processes
from save_jax.errors import UserError
from tests.data_pipelines.conftest import SMALL
from tests.support import preparing

MOMENTS = ("shard", "note", "index", "rename", "clean")
WHERE = os.path.join("msrvtt", "9k", "1.0.0")
FLAGS = [f"--{key}={value}" for key, value in SMALL.items()]


def contents(directory: pathlib.Path) -> dict[str, str]:
    """A hash of every file below a directory, by its path."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(miniature, tmp_path_factory) -> dict[str, str]:
    """What an uninterrupted preparation leaves behind."""
    out = tmp_path_factory.mktemp("whole")
    preparing.run(str(miniature), str(out))
    assert len(contents(out)) == 11 and os.listdir(out / "msrvtt" / "9k") == ["1.0.0"]
    return contents(out)


@pytest.fixture(scope="module")
def killed(miniature, tmp_path_factory):
    """A folder for each moment, with what is there after SIGKILL at that moment."""
    out = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.support.preparing", str(miniature), str(out), *MOMENTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    ends = [line for line in done.stdout.splitlines() if line.startswith("ended")]
    assert ends == [f"ended {moment} {-signal.SIGKILL}" for moment in MOMENTS], done.stderr
    return out


@pytest.fixture
def reading(monkeypatch) -> list[str]:
    """The ids of the clips whose media are read."""
    read, ids = records.read_record, []
    monkeypatch.setattr(
        records, "read_record", lambda clip, recipe: ids.append(clip.video_id) or read(clip, recipe)
    )
    return ids


@pytest.mark.parametrize(
    ("moment", "left"),
    [
        ("shard", ["video6", *(f"video{n}" for n in range(7, 12))]),
        ("note", ["video6", *(f"video{n}" for n in range(7, 12))]),
        ("index", []),
        ("rename", []),
        ("clean", []),
    ],
)
def test_after_a_sigkill(killed, miniature, whole, reading, moment, left):
    there = contents(killed / moment)
    assert there != whole
    complete = os.path.join(WHERE, "metadata.json") in there
    assert complete == (moment == "clean")
    preparing.run(str(miniature), str(killed / moment))
    assert contents(killed / moment) == whole
    assert reading == left  # and what was done was not done again


def test_what_changed_meanwhile_is_done_again(miniature, tmp_path, whole, reading, monkeypatch):
    shutil.copytree(miniature, tmp_path / "root")
    with monkeypatch.context() as patch:
        patch.setattr(build, "_describe", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            preparing.run(str(tmp_path / "root"), str(tmp_path / "out"))
    reading.clear()
    os.utime(tmp_path / "root/VideoData/video4.mp4", (1, 1))
    work = tmp_path / "out" / f"{WHERE}.incomplete"
    with open(work / "msrvtt-test.array_record-00000-of-00002", "ab") as file:
        file.truncate(1000)
    (work / "stray").write_text("x")
    preparing.run(str(tmp_path / "root"), str(tmp_path / "out"))
    assert reading == [f"video{n}" for n in (3, 4, 5, 7, 8, 9)]
    assert contents(tmp_path / "out") == whole


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


class FullDisk:
    """array_record's writer, with room for some records only."""

    actual = array_record_module.ArrayRecordWriter

    def __init__(self, path, options):
        self.writer = self.actual(path, options)
        self.room = 2

    def write(self, record):
        self.room -= 1
        if self.room < 0:
            # In array_record's own words.
            raise RuntimeError(
                "write() failed: No space left on device; writing x; at byte 0; Failed to close"
            )
        self.writer.write(record)

    def close(self):
        self.writer.close()


@pytest.mark.parametrize(
    ("name", "failing", "done"),
    [
        ("data_pipelines.storage.tfds_format.array_record_module.ArrayRecordWriter", FullDisk, 0),
        ("data_pipelines.storage.tfds_format.os.fsync", no_space, 0),
        ("data_pipelines.storage.tfds_format.shutil.copyfile", no_space, 5),
    ],
)
def test_a_full_disk(miniature, tmp_path, whole, monkeypatch, name, failing, done):
    with monkeypatch.context() as patch:
        patch.setattr(name, failing)
        with pytest.raises(UserError, match=r"disk full.*make room and run the same") as caught:
            preparing.run(str(miniature), str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    names = os.listdir(tmp_path / f"{WHERE}.incomplete")
    assert len(names) == done and not any(name.endswith(".tmp") for name in names)
    preparing.run(str(miniature), str(tmp_path))
    assert contents(tmp_path) == whole


def test_a_full_disk_is_one_message_on_the_command_line(miniature, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tfds_format, "write_records", no_space)
    assert main(["msrvtt", f"--root={miniature}", f"--out={tmp_path}", "--workers=1", *FLAGS]) == 2
    error = capsys.readouterr().err
    assert "error: " in error and "disk full" in error and "Traceback" not in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_a_message(miniature, tmp_path, number, monkeypatch, capsys):
    write = shards.write

    def interrupted(shard, *args, **kwargs):
        if shard.number == 1:
            os.kill(os.getpid(), number)
            time.sleep(5)  # the signal comes before this is over
        write(shard, *args, **kwargs)

    monkeypatch.setattr(shards, "CLIPS_PER_SHARD", 3)
    monkeypatch.setattr(shards, "write", interrupted)
    before = signal.getsignal(number)
    command = ["msrvtt", f"--root={miniature}", f"--out={tmp_path}", "--workers=1", *FLAGS]
    assert main(command) == os.EX_TEMPFAIL == 75
    assert signal.getsignal(number) == before
    error = capsys.readouterr().err
    assert "the same command resumes" in error and "Traceback" not in error
    assert len(os.listdir(tmp_path / f"{WHERE}.progress")) == 1
    monkeypatch.setattr(shards, "write", write)
    assert main(command) == 0
    assert "7 clips in 3 shards" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("send", "number", "code"),
    [
        # Ctrl-C in a terminal goes to every process of the group, as does a cluster's SIGTERM.
        (os.killpg, signal.SIGINT, 75),
        (os.killpg, signal.SIGTERM, 75),
        (os.kill, signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_no_worker_outlives_the_end(miniature, tmp_path, send, number, code):
    for n in range(40):  # work for a while
        source = os.path.join(miniature, "VideoData", f"video{n % 12}.mp4")
        (tmp_path / "root").mkdir(exist_ok=True)
        os.link(source, tmp_path / "root" / f"{n}.mp4")
    command = [sys.executable, "-m", "data_pipelines.prepare", "folder",
               f"--root={tmp_path / 'root'}", f"--out={tmp_path / 'out'}", "--workers=2",
               "--transcripts=none", "--fbank_frames=20000"]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        for line in process.stdout:
            if line.startswith("frames and sound"):
                break
        time.sleep(0.5)
        send(process.pid, number)
        _, error = process.communicate(timeout=60)
        deadline = time.monotonic() + 30
        with pytest.raises(ProcessLookupError):  # no process of the group is left
            while time.monotonic() < deadline:
                os.killpg(process.pid, 0)
                time.sleep(0.1)
    assert process.returncode == code, error
    assert "Traceback" not in error and ("the same command resumes" in error) == (code == 75)


def test_two_at_once(miniature, tmp_path, whole):
    directory = version_directory(str(tmp_path), "msrvtt", "9k", 1)
    with locks.hold(directory, beside=prepared.lock_path(directory)):
        with pytest.raises(UserError, match=rf"process {os.getpid()} on .*same command again"):
            preparing.run(str(miniature), str(tmp_path))
        # A process that is ready to wait for another: for one that ends without having done it.
        command = (
            "import sys; from tests.support import preparing;"
            "preparing.run(sys.argv[1], sys.argv[2], wait=True)"
        )
        waiting = subprocess.Popen(
            [sys.executable, "-c", command, str(miniature), str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert "waiting for process" in waiting.stdout.readline()
    printed, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 0 and "frames and sound" in printed
    assert contents(tmp_path) == whole


def test_one_that_waited_uses_what_the_other_has_prepared(miniature, tmp_path, monkeypatch, capsys):
    """The lock is held for as long as the other prepares; then there is nothing to do."""
    hold = locks.hold

    def slow(directory, **options):
        monkeypatch.setattr(locks, "hold", hold)
        preparing.run(str(miniature), str(tmp_path))  # the other process
        return hold(directory, **options)

    monkeypatch.setattr(locks, "hold", slow)
    preparing.run(str(miniature), str(tmp_path), wait=True)
    assert capsys.readouterr().out.count("Already prepared") == 1


def test_the_lock_of_a_dead_process_is_taken_over(miniature, tmp_path, whole):
    dead = subprocess.Popen(["true"])
    dead.wait()
    path = tmp_path / f"{WHERE}.lock"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"holder": "it", **processes.describe(dead.pid)}))
    preparing.run(str(miniature), str(tmp_path))
    assert contents(tmp_path) == whole
