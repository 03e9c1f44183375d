"""What the machine, its network or a store does wrong ends the run, and costs no clip."""

import csv
import errno
import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile

import av
import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines import outages, pool, prepared, sidecars
from data_pipelines.datasets import annotations, folder, layout
from data_pipelines.datasets.types import Clip
from data_pipelines.modalities import audio, teacher_files
from data_pipelines.modalities import record as records
from data_pipelines.modalities import video as video_files
from data_pipelines.modalities.container import MediaError
from data_pipelines.prepare import main
from data_pipelines.recipe import Recipe
from save_jax.errors import OutageError
from tests.data_pipelines.conftest import SMALL
from tests.support import media as synthetic
from tests.support import object_store, preparing, system

RECIPE = Recipe(**SMALL)
FLAGS = [f"--{key}={value}" for key, value in SMALL.items()]
STALE = OSError(errno.ESTALE, os.strerror(errno.ESTALE))


class HttpError(Exception):
    """As gcsfs has it: no OSError."""

    def __init__(self, code: int):
        super().__init__(f"Service Unavailable, {code}")
        self.code = code


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(pool, "_PAUSES", (0, 0))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Six videos, of which every other is longer, and takes more than one read."""
    folder = tmp_path_factory.mktemp("videos")
    noise = list(np.random.default_rng(0).integers(0, 256, (25, 64, 64, 3), np.uint8))
    for number, name in enumerate("abcdef"):
        frames = noise if number % 2 else synthetic.numbered_frames(4)
        synthetic.write_video(
            folder / f"{name}.{'mkv' if name == 'd' else 'mp4'}",
            frames,
            1,
            sound=synthetic.tone(len(frames))[None],
        )
    assert (folder / "b.mp4").stat().st_size > 50_000
    return folder


@pytest.fixture
def root(videos, tmp_path):
    """A folder with these, which a test may damage."""
    return shutil.copytree(videos, tmp_path / "root")


def command(root, *flags):
    return ["folder", f"--root={root}", f"--out={root.parent / 'out'}", "--transcripts=none",
            *flags]  # fmt: skip


def run(arguments, **environment):
    """Runs the public command as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "data_pipelines.prepare", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
    )


def counts(out):
    """Listed, prepared and left out; and what problems.csv names."""
    directory = out / "folder" / "default" / "1.0.0"
    found = json.loads((directory / "metadata.json").read_text())["counts"]["test"]
    with (directory / "problems.csv").open() as file:
        problems = [row["problem"] for row in csv.DictReader(file)]
    return found["listed"], found["prepared"], found["left out"], problems


def nothing_is_lost(code, error, out, *words):
    """Whether a run that an outage ended says so, and has left nothing out for good."""
    assert code == os.EX_TEMPFAIL == 75, error
    assert error.count("interrupted: ") == 1 and "Traceback" not in error, error
    for word in (*words, "no clip is left out", "run the same command again"):
        assert word in error
    assert not list(out.rglob("metadata.json"))


# The whole command.


def test_a_full_temporary_directory(root, tmp_path):
    """Frames at 1,024 pixels, of which 22 are 64 MiB: more are kept in the temporary directory."""
    system.need("mount", "mount")
    full = tmp_path / "full"
    full.mkdir()
    if (
        os.getuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(full)], capture_output=True
        ).returncode
    ):
        pytest.skip("only root can make a file system that is full")
    arguments = command(root, "--image_size=1024", "--max_frames=2")
    try:
        done = run([*arguments, "--workers=2"], TMPDIR=full)
        nothing_is_lost(done.returncode, done.stderr, tmp_path / "out", str(full), "No space left")
    finally:
        subprocess.run(["umount", str(full)], check=True)
    assert main([*arguments, "--workers=1"]) == 0
    assert counts(tmp_path / "out") == (6, 6, 0, [])


def test_a_temporary_file_on_a_full_device(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(video_files, "_CANDIDATES_IN_MEMORY", 5 * 32 * 32 * 3)
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", lambda **_: io.FileIO("/dev/full", "r+"))
        code = main(command(root, "--workers=1", *FLAGS))
    nothing_is_lost(code, capsys.readouterr().err, tmp_path / "out", "temporary", "No space left")
    assert main(command(root, "--workers=1", *FLAGS)) == 0
    assert counts(tmp_path / "out") == (6, 6, 0, [])


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"),
        PermissionError(errno.EACCES, "Permission denied"),
    ],
)
def test_no_temporary_directory(root, tmp_path, monkeypatch, capsys, error):
    """Which is not the absence of the clip's own file, nor that one's permissions."""

    def none(**_):
        raise error

    monkeypatch.setattr(video_files, "_CANDIDATES_IN_MEMORY", 5 * 32 * 32 * 3)
    monkeypatch.setattr(tempfile, "TemporaryFile", none)
    code = main(command(root, "--workers=1", *FLAGS))
    nothing_is_lost(code, capsys.readouterr().err, tmp_path / "out", "temporary", error.strerror)


FAILING_READ = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

ssize_t read(int fd, void *buffer, size_t size) {
    ssize_t (*actual)(int, void *, size_t) = dlsym(RTLD_NEXT, "read");
    char link[32], path[4096] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    char *name = getenv("FAILING_FILE");
    if (name && length > 0 && strstr(path, name) && lseek(fd, 0, SEEK_CUR) >= 4096) {
        errno = atoi(getenv("FAILING_NUMBER"));
        return -1;
    }
    return actual(fd, buffer, size);
}
"""


@pytest.mark.parametrize(("name", "number"), [("b.mp4", errno.EIO), ("d.mkv", errno.ESTALE)])
def test_a_disk_that_fails_in_the_middle_of_a_file(root, tmp_path, name, number):
    system.need("gcc", "gcc")
    (tmp_path / "read.c").write_text(FAILING_READ)
    library = tmp_path / "read.so"
    compiler = ["gcc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "read.c"), "-ldl"]
    subprocess.run(compiler, check=True)
    done = run(
        command(root, "--workers=2", *FLAGS),
        LD_PRELOAD=library,
        FAILING_FILE=root / name,
        FAILING_NUMBER=number,
    )
    words = (str(root / name), os.strerror(number))
    nothing_is_lost(done.returncode, done.stderr, tmp_path / "out", *words)
    assert main(command(root, "--workers=1", *FLAGS)) == 0
    assert counts(tmp_path / "out") == (6, 6, 0, [])


@pytest.mark.parametrize(
    ("name", "replaced"),
    [
        ("data_pipelines.modalities.video.decode_frames", MemoryError()),
        ("data_pipelines.modalities.audio.read_waveform", MemoryError()),
        ("data_pipelines.modalities.audio.fbank", MemoryError()),
        ("data_pipelines.sidecars.read", STALE),
        ("data_pipelines.storage.shards.write", OSError(errno.EIO, os.strerror(errno.EIO))),
        ("data_pipelines.prepare.usual_recipe", OSError(errno.EMFILE, os.strerror(errno.EMFILE))),
    ],
)
def test_an_outage_anywhere_ends_the_command(root, tmp_path, monkeypatch, capsys, name, replaced):
    def fail(*_, **__):
        raise replaced

    monkeypatch.setattr(name, fail)
    code = main(command(root, "--workers=1", *FLAGS))
    nothing_is_lost(code, capsys.readouterr().err, tmp_path / "out")


def test_a_passing_outage_is_waited_for(root, tmp_path, monkeypatch):
    decode, times = video_files.decode_frames, []

    def fail_once(*arguments):
        times.append(1)
        if len(times) == 2:
            raise STALE
        return decode(*arguments)

    monkeypatch.setattr(video_files, "decode_frames", fail_once)
    assert main(command(root, "--workers=1", *FLAGS)) == 0
    assert counts(tmp_path / "out") == (6, 6, 0, []) and len(times) == 7


def test_a_mount_that_is_lost_costs_no_clip(root, tmp_path, monkeypatch, capsys):
    """What was there when the work began, and does not exist when it is read, is not left out."""
    read, away, seen = records.read_record, tmp_path / "away", []

    def reading(clip, recipe):
        seen.append(clip)
        if len(seen) == 4:
            root.rename(away)
        return read(clip, recipe)

    with monkeypatch.context() as patch:
        patch.setattr(records, "read_record", reading)
        code = main([*command(root, "--workers=1"), *FLAGS])
    assert len(seen) == 6
    nothing_is_lost(code, capsys.readouterr().err, tmp_path / "out", "does not exist", "mount")
    away.rename(root)
    assert main([*command(root, "--workers=1"), *FLAGS]) == 0
    assert counts(tmp_path / "out") == (6, 6, 0, [])


def test_a_link_to_a_disk_that_is_not_mounted_is_named(root, tmp_path):
    (root / "more").symlink_to("/nowhere/disk")
    assert main([*command(root, "--workers=1"), *FLAGS]) == 0
    listed, prepared, left_out, problems = counts(tmp_path / "out")
    assert (listed, prepared, left_out) == (6, 6, 0)
    assert problems == ["not used: it is a link that leads nowhere (is what it leads to mounted?)"]


def damage(path, kind):
    """Damages a file so that FFmpeg uses the system's words for it."""
    if kind == "memory":  # a table of two thousand million entries
        data = bytearray(path.read_bytes())
        start = data.index(b"stts") + 8
        data[start : start + 4] = b"\x7f\xff\xff\xf0"
    else:
        data = path.read_bytes()[:56]
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "kind", "number"), [("b.mp4", "memory", errno.ENOMEM), ("d.mkv", "cut", errno.EIO)]
)
def test_a_damaged_file_is_left_out_whatever_ffmpeg_calls_it(root, tmp_path, name, kind, number):
    damage(root / name, kind)
    with pytest.raises(av.error.FFmpegError) as caught, av.open(str(root / name)) as container:
        list(container.demux())
    assert caught.value.errno == number
    assert main(command(root, "--workers=1", *FLAGS)) == 0
    listed, prepared, left_out, problems = counts(tmp_path / "out")
    assert (listed, prepared, left_out) == (6, 5, 1)
    assert all(f"{root / name}: " in problem for problem in problems) and problems


def test_a_colon_in_a_relative_root_is_no_protocol(root, monkeypatch):
    root.rename(root.parent / "2026-01-01T12:00")
    monkeypatch.chdir(root.parent)
    arguments = ["folder", "--root=2026-01-01T12:00", "--out=out", "--transcripts=none"]
    assert main([*arguments, "--workers=1", *FLAGS]) == 0
    assert counts(root.parent / "out") == (6, 6, 0, [])


# A store that fails.


@pytest.fixture
def store(root):
    """A store with the six videos and their captions."""
    store = object_store.register()
    store.put(str(root), "gs://media/root", recursive=True)
    rows = "".join(f"{name},something,train\n" for name in "abcdef")
    store.pipe_file("gs://media/root/captions.csv", f"video_id,caption,split\n{rows}".encode())
    return store


class _Breaking(io.BytesIO):
    def __init__(self, content, error):
        super().__init__(content)
        self.error = error

    def read(self, size=-1):
        if self.tell() > 100:
            raise self.error
        return super().read(min(size, 101))


def _broken_file(patch, error):
    """Has b.mp4 break off after its first bytes."""
    open_ = object_store.ObjectStore._open

    def breaking(self, path, *arguments, **options):
        file = open_(self, path, *arguments, **options)
        return _Breaking(file.getvalue(), error) if path.endswith("b.mp4") else file

    patch.setattr(object_store.ObjectStore, "_open", breaking)


def _broken(method, name):
    """Has a method of the store fail for the paths that end in a name."""

    def arrange(patch, error):
        actual = getattr(object_store.ObjectStore, method)

        def fail(self, path, *arguments, **options):
            if path.rstrip("/").endswith(name):
                raise error
            return actual(self, path, *arguments, **options)

        patch.setattr(object_store.ObjectStore, method, fail)

    return arrange


@pytest.mark.parametrize(
    "error",
    [HttpError(503), OSError(errno.EBUSY, "Please reduce your request rate"), PermissionError()],
)
@pytest.mark.parametrize(
    "arrange",
    [
        _broken_file,
        _broken("_open", "b.mp4"),
        _broken("info", "b.mp4"),
        _broken("info", "captions.csv"),  # else the store would be taken to have none
        _broken("ls", "root"),  # else there would be fewer clips
    ],
)
def test_a_store_that_fails(store, tmp_path, monkeypatch, capsys, arrange, error):
    arguments = ["folder", "--root=gs://media/root", f"--out={tmp_path / 'out'}",
                 "--transcripts=none", "--workers=1", *FLAGS]  # fmt: skip
    with monkeypatch.context() as patch:
        arrange(patch, error)
        code = main(arguments)
    nothing_is_lost(code, capsys.readouterr().err, tmp_path / "out", "gs://media/root")
    assert main(arguments) == 0
    found = json.loads((tmp_path / "out/folder/default/1.0.0/metadata.json").read_text())["counts"]
    assert (found["train"]["prepared"], found["train"]["captions"]) == (6, 6)


# Beam, and processes.


def test_beam_fails_with_the_same_message(root, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise STALE

    monkeypatch.setattr(video_files, "decode_frames", fail)
    code = main(command(root, "--beam_runner=DirectRunner", *FLAGS))
    error = capsys.readouterr().err
    nothing_is_lost(code, error[error.index("interrupted") :], tmp_path / "out", "a.mp4", "Stale")


class _Ending(str):
    """A path that ends the process that it is sent to."""

    how = ()

    def __reduce__(self):
        return self.how


class _Killed(_Ending):
    how = (signal.raise_signal, (signal.SIGKILL,))


class _Crashing(_Ending):
    how = (signal.raise_signal, (signal.SIGSEGV,))


def _no_module(*_):
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


class _Unstartable(_Ending):
    how = (_no_module, ())


def clip(video):
    return Clip(
        video_id="a",
        video=video,
        audio=None,
        captions=(),
        groups=(),
        teacher_video=None,
        teacher_audio=None,
    )


@pytest.mark.parametrize(
    ("path", "words"),
    [(_Killed("a.mp4"), "Killed"), (_Unstartable("a.mp4"), "no process could be started")],
)
def test_a_process_ended_from_outside_is_no_clips_fault(path, words):
    with pytest.raises(OutageError, match=rf"a\.mp4: .*{words}.*same command again"):
        list(records.read_records([clip(path)], RECIPE, workers=2))


def test_a_process_that_crashes_is(capfd):
    (record,) = records.read_records([clip(_Crashing("a.mp4"))], RECIPE, workers=2)
    assert record.problems == ("left out: a.mp4: it crashes the decoder",)


def test_a_crash_that_is_found_while_work_is_given_out(root):
    """The results before it are used slowly: the pool is broken before it is asked again."""
    clips = [clip(str(root / "a.mp4")), clip(_Crashing("b.mp4"))]
    clips += [clip(str(root / "a.mp4"))] * 8  # of all, more than are given out at first
    found = records.read_records(clips, RECIPE, workers=2)
    first = next(found)
    for process in pool.multiprocessing.active_children():
        process.join(30)  # the crash ends both
    assert [bool(record.features) for record in (first, *found)] == [True, False, *[True] * 8]


def test_the_error_comes_whole_from_another_process():
    error = outages.outage("a.mp4", STALE)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is OutageError and str(copy) == str(error)


# Which is which.


@pytest.mark.parametrize(
    ("error", "ends_the_run"),
    [
        (STALE, True),
        *((OSError(number, os.strerror(number)), True) for number in (
            errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
            errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.EHOSTUNREACH, errno.EAGAIN,
        )),
        (MemoryError(), True),
        (TimeoutError(), True),
        (ConnectionError("reset"), True),
        (type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})("503"), True),
        (type("ClientError", (Exception,), {"__module__": "botocore.exceptions"})("403"), True),
        (type("SSLError", (OSError,), {"__module__": "ssl"})(1, "handshake"), True),
        *((OSError(number, os.strerror(number)), False) for number in (
            errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EACCES,
        )),
        (FileNotFoundError("gs://bucket/a"), False),
        (OSError("image file is truncated"), False),  # Pillow's
        (ValueError("anything"), False),
        (type("DecodeError", (Exception,), {"__module__": "google.protobuf.message"})("x"), False),
        (av.error.InvalidDataError(1094995529, "Invalid data found"), False),
        (av.error.OSError(errno.EIO, "Input/output error"), False),  # of a file cut short
        (av.error.PermissionError(errno.EPERM, "Operation not permitted"), False),
        (av.error.MemoryError(errno.ENOMEM, "Cannot allocate memory"), False),
    ],
    ids=repr,
)  # fmt: skip
def test_which_errors_are_outages(error, ends_the_run):
    assert outages.is_outage(error) == ends_the_run


def test_ffmpegs_lack_of_memory_is_believed_where_memory_is_short():
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**30, hard))
    try:
        short = outages.is_outage(av.error.MemoryError(errno.ENOMEM, "Cannot allocate memory"))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert short


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "Make room"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ENOMEM, "more memory"),
        (errno.ESTALE, "responds again"),
    ],
)
def test_what_to_do_is_said(number, words):
    said = str(outages.outage("/data/a.mp4", OSError(number, os.strerror(number))))
    assert said.startswith("/data/a.mp4: ") and os.strerror(number) in said and words in said


def test_permission_refused_for_a_file_and_for_a_whole_folder(tmp_path, monkeypatch):
    """Of one file, it is the file's own; of all, it is that of an account or a mount."""

    def refused(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "a.mp4")

    (tmp_path / "a.mp4").write_bytes(b"x")
    monkeypatch.setattr(video_files.io, "FileIO", refused)
    with pytest.raises(MediaError, match="Permission denied"):
        video_files.decode_frames(tmp_path / "a.mp4", RECIPE)
    monkeypatch.setattr(os, "access", lambda path, _: os.fspath(path) != str(tmp_path))
    with pytest.raises(OutageError, match=r"a\.mp4.*Permission denied"):
        video_files.decode_frames(tmp_path / "a.mp4", RECIPE)


def _images(path):
    path.mkdir()
    Image.new("RGB", (40, 40)).save(path / "1.png")


# What makes a file, and what reads it.
READERS = {
    "a.mp4": (
        lambda path: synthetic.write_video(path, synthetic.numbered_frames(3)),
        lambda path: video_files.decode_frames(path, RECIPE),
    ),
    "b.mp4": (
        lambda path: synthetic.write_video(path, synthetic.numbered_frames(3)),
        lambda path: video_files.decode_evenly(path, 4, 32),
    ),
    "images": (_images, lambda path: video_files.decode_frames(path, RECIPE)),
    "a.wav": (
        lambda path: synthetic.write_wav(path, synthetic.tone(1)[None]),
        audio.read_waveform,
    ),
    "a.npy": (
        lambda path: np.save(path, np.ones(8)),
        lambda path: teacher_files.read_vector(path, 8),
    ),
    "a.pt": (
        lambda path: torch.save(torch.ones(8), path),
        lambda path: teacher_files.read_vector(path, 8),
    ),
    "a.csv": (lambda path: path.write_text("x"), annotations.read_text),
    "metadata.json": (
        lambda path: path.write_text("{}"),
        lambda path: prepared.prepared_by(prepared.epath.Path(path.parent)),
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_too_many_open_files(tmp_path, name):
    make, read = READERS[name]
    make(tmp_path / name)
    if name != "metadata.json":
        read(tmp_path / name)  # which imports what it needs
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OutageError, match="Too many open files"):
            read(tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("name", ["a.npy", "a.pt"])
def test_a_vector_on_a_disk_that_fails(tmp_path, name):
    """The system answers a read of a process's memory at 0 as it does one of a broken disk."""
    (tmp_path / name).symlink_to("/proc/self/mem")
    with pytest.raises(OutageError, match=rf"{name}: .*Input/output error"):
        teacher_files.read_vector(tmp_path / name, 8)


def test_a_vector_that_claims_more_than_there_is_memory(tmp_path):
    np.save(tmp_path / "a.npy", np.ones(8))
    content = (tmp_path / "a.npy").read_bytes()
    content = content.replace(b"(8,), }           ", b"(9999999999999,), }")
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(teacher_files.VectorError, match="not a NumPy array"):
        teacher_files.read_vector(tmp_path / "a.npy", 8)


@pytest.mark.parametrize("link", [False, True])
def test_a_folder_that_cannot_be_listed_now(tmp_path, monkeypatch, link):
    """Were it passed over, all its clips would be missing without a word."""
    there = tmp_path / "root" / "more"
    (tmp_path / "elsewhere" if link else there).mkdir(parents=True)
    if link:
        there.parent.mkdir()
        there.symlink_to(tmp_path / "elsewhere")
    (there / "a.mp4").write_bytes(b"x")
    (tmp_path / "root" / "b.mp4").write_bytes(b"x")

    def stale(actual):
        def fail(path, *arguments, **options):
            if str(path).endswith("more"):
                raise STALE
            return actual(path, *arguments, **options)

        return fail

    monkeypatch.setattr(os, "stat" if link else "scandir", stale(os.stat if link else os.scandir))
    with pytest.raises(OutageError, match=r"more: .*Stale file handle"):
        folder.read_annotations(str(tmp_path / "root"), "default")


def test_images_that_cannot_be_listed_now(tmp_path, monkeypatch):
    (tmp_path / "ImageData" / "a").mkdir(parents=True)
    (tmp_path / "ImageData" / "a" / "1.png").write_bytes(b"x")
    scandir = os.scandir

    def fail(path):
        if str(path).endswith("ImageData"):
            raise STALE
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(OutageError, match=r"ImageData: .*Stale file handle"):
        layout.annotate(str(tmp_path), {"train": {"a": ["x"]}}, [], images=True)


def test_a_file_of_transcripts_that_cannot_be_asked_for_now(tmp_path, monkeypatch):
    """Were it taken for absent, Whisper would run for days."""
    stat = os.stat

    def fail(path, *arguments, **options):
        if str(path).endswith("asr.json"):
            raise STALE
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", fail)
    with pytest.raises(OutageError, match=r"asr\.json: .*Stale file handle"):
        sidecars._read_speech(
            str(tmp_path / "asr.json"), [], str(tmp_path), sidecars.Speech(), 1, False
        )


def test_verify_calls_nothing_damaged_that_cannot_be_read_now(miniature, tmp_path, capsys):
    preparing.run(str(miniature), str(tmp_path))
    arguments = ["msrvtt", f"--out={tmp_path}", "--verify"]
    assert main(arguments) == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        code = main(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert code == 75
    printed = capsys.readouterr()
    assert "Too many open files" in printed.err and "training" not in printed.out
