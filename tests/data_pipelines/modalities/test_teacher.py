"""Computing the teacher's vectors: what is missing, once, whatever is in the way."""

import dataclasses
import errno
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
from typing import NamedTuple

import jax
import numpy as np
import pytest
import torch

from data_pipelines.datasets.types import Clip
from data_pipelines.modalities import record as records
from data_pipelines.modalities import teacher as teacher_vectors
from data_pipelines.modalities import teacher_inputs
from data_pipelines.recipe import Recipe
from data_pipelines.storage import tfds_format
from save_jax.batch import Embed
from save_jax.errors import UserError
from save_jax.models.imagebind import ImageBindConfig, make_embed
from save_jax.weights.names.imagebind import loader
from tests.support import imagebind_reference, object_store
from tests.support import media as synthetic

IDS = ("a", "sub folder/b", "ç 'd'", "e", "f")
CONFIG = ImageBindConfig(
    embed_dim=16,
    image_size=28,
    patch_size=7,
    vision_width=32,
    vision_layers=2,
    vision_heads=4,
    audio_width=24,
    audio_layers=2,
    audio_heads=3,
)


class Averages(NamedTuple):
    """A teacher that computes next to nothing, and counts what it is asked."""

    config: ImageBindConfig
    clips: int
    asked: dict[str, int]

    def video(self, frames: np.ndarray) -> np.ndarray:
        assert frames.shape[1:] == (32, 28, 28, 3) and frames.dtype == np.uint8
        self.asked["video"] += len(frames)
        return frames.reshape(len(frames), -1, 16).mean(1).astype(np.float32)

    def audio(self, fbanks: np.ndarray) -> np.ndarray:
        assert fbanks.shape[1:] == (3, 204, 128) and fbanks.dtype == np.float32
        self.asked["audio"] += len(fbanks)
        return fbanks.reshape(len(fbanks), -1, 16).mean(1)


def teacher(clips: int = 2) -> Averages:
    return Averages(CONFIG, clips, {"video": 0, "audio": 0})


def make_clips(root: pathlib.Path) -> list[Clip]:
    clips = []
    for n, video_id in enumerate(IDS):
        path = root / f"{video_id}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        frames = synthetic.numbered_frames(10 + n)[n:]
        synthetic.write_video(path, frames, sound=synthetic.tone(1 + n, 300 + 100 * n)[None])
        clips.append(Clip(video_id, str(path), None, ("a caption",), ("",), None, None))
    return clips


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[Clip]:
    return make_clips(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def expected(clips) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The vectors of each clip, each computed alone."""
    embed, sizes, result = teacher(), teacher_inputs.Sizes(28, 204, 128), {}
    for clip in clips:
        inputs = teacher_inputs.read_inputs(teacher_inputs.Task(clip, True, True), sizes)
        video, audio = embed.video(inputs.frames[None]), embed.audio(inputs.fbanks[None])
        result[clip.video_id] = video[0], audio[0]
    return result


def assert_written(directory, expected, ids=IDS) -> None:
    for video_id in ids:
        for folder, vector in zip(
            ("VideoFeature", "AudioFeature"), expected[video_id], strict=True
        ):
            found = np.load(directory / folder / f"{video_id}.npy")
            assert found.dtype == np.float32 and found.shape == (16,)
            np.testing.assert_array_equal(found, vector)


def test_what_is_missing_is_computed_once(clips, expected, tmp_path):
    embed = teacher()
    found, problems = teacher_vectors.compute(clips, str(tmp_path), embed, workers=1)
    assert problems == () and embed.asked == {"video": 5, "audio": 5}
    assert_written(tmp_path, expected)
    for before, after in zip(clips, found, strict=True):
        assert after == dataclasses.replace(
            before,
            teacher_video=str(tmp_path / "VideoFeature" / f"{before.video_id}.npy"),
            teacher_audio=str(tmp_path / "AudioFeature" / f"{before.video_id}.npy"),
        )
    record = records.read_record(found[1], Recipe(image_size=28, teacher_size=16))
    assert record.problems == () and record.features["has_teacher"]
    np.testing.assert_array_equal(record.features["teacher_audio"], expected[IDS[1]][1])

    again, problems = teacher_vectors.compute(clips, str(tmp_path), idle := teacher(), workers=1)
    assert again == found and problems == () and idle.asked == {"video": 0, "audio": 0}
    (tmp_path / "AudioFeature" / "e.npy").unlink()
    (tmp_path / "VideoFeature" / "f.npy").write_bytes(b"")
    again, problems = teacher_vectors.compute(clips, str(tmp_path), one := teacher(), workers=1)
    assert again == found and one.asked == {"video": 1, "audio": 1}
    assert [problem[:2] for problem in problems] == [("", "f")]
    assert_written(tmp_path, expected)


def test_processes_and_batches_make_no_difference(clips, expected, tmp_path):
    teacher_vectors.compute(clips, str(tmp_path), teacher(clips=3), workers=2)
    assert_written(tmp_path, expected)


def test_given_vectors_are_used(clips, expected, tmp_path):
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    torch.save(torch.arange(16.0), good)
    torch.save(torch.full((16,), torch.nan), bad)
    given = [
        dataclasses.replace(clips[0], teacher_video=str(good), teacher_audio=str(good)),
        dataclasses.replace(clips[1], teacher_video=str(good)),
        dataclasses.replace(clips[2], teacher_video=str(bad), teacher_audio=str(good)),
        dataclasses.replace(clips[3], teacher_video="/nowhere.pt", teacher_audio=str(good)),
    ]
    out = tmp_path / "out"
    found, problems = teacher_vectors.compute(given, str(out), embed := teacher(), workers=1)
    assert embed.asked == {"video": 2, "audio": 1}
    assert [(p[1], str(bad) in p[2]) for p in problems] == [(IDS[2], True)]
    assert "16 of its numbers are not finite" in problems[0][2]
    assert found[1].teacher_video == str(good)
    assert found[1].teacher_audio == str(out / "AudioFeature" / f"{IDS[1]}.npy")
    assert found[2].teacher_video == str(out / "VideoFeature" / f"{IDS[2]}.npy")
    assert found[3].teacher_video == str(out / "VideoFeature" / "e.npy")
    np.testing.assert_array_equal(np.load(found[2].teacher_video), expected[IDS[2]][0])


def test_one_clip_in_two_splits_is_computed_once(clips, tmp_path):
    found, _ = teacher_vectors.compute([clips[0]] * 2, str(tmp_path), embed := teacher(), workers=1)
    assert embed.asked == {"video": 1, "audio": 1}
    assert found[0] == found[1] and found[0].teacher_video


def test_bad_files_cost_only_their_own_clip(clips, expected, tmp_path):
    (tmp_path / "empty.mp4").touch()
    silent = synthetic.write_video(tmp_path / "silent.mp4", synthetic.numbered_frames(9))
    sound = synthetic.write_wav(tmp_path / "s.wav", synthetic.tone(3)[None])
    strange = [
        Clip("silent", str(silent), None, (), (), None, None),
        Clip("absent", "/nowhere.mp4", None, (), (), None, None),
        Clip("empty", str(tmp_path / "empty.mp4"), str(sound), (), (), None, None),
        Clip("../escapes", clips[0].video, None, (), (), None, None),
        Clip("dubbed", str(silent), str(sound), (), (), None, None),
    ]
    out = tmp_path / "out"
    found, problems = teacher_vectors.compute([*strange, *clips], str(out), teacher(), workers=1)
    assert_written(out, expected)
    assert [p[1] for p in problems] == ["../escapes", "absent", "empty"]
    assert "cannot be a file's name" in problems[0][2]
    assert "/nowhere.mp4: the file does not exist" in problems[1][2]
    assert "empty.mp4: the file is empty" in problems[2][2]
    assert [clip.teacher_video is None for clip in found[:5]] == [True] * 4 + [False]
    assert not (tmp_path / "VideoFeature").exists()
    # A clip without sound has no teacher, and is masked out of the loss by that alone.
    record = records.read_record(found[0], Recipe(image_size=28, teacher_size=16))
    assert not record.features["has_audio"] and not record.features["has_teacher"]
    assert record.problems == ()
    with pytest.raises(UserError, match=r"clip absent.*nowhere\.mp4"):
        teacher_vectors.compute(strange[:2], str(out), teacher(), workers=1, strict=True)


def test_numbers_that_are_not_finite_are_not_written(clips, tmp_path):
    embed = make_teacher(lambda frames: np.full((len(frames), 16), np.nan, np.float32))
    with pytest.raises(UserError, match="clip a: expected finite numbers from ImageBind"):
        teacher_vectors.compute(clips, str(tmp_path), embed, workers=1)
    assert not list(tmp_path.rglob("*.npy"))


class Patched(NamedTuple):
    config: ImageBindConfig
    clips: int
    video: object
    audio: object


def make_teacher(video) -> Patched:
    return Patched(CONFIG, 2, video, teacher().audio)


def test_a_full_disk(clips, expected, tmp_path, monkeypatch):
    write, written = tfds_format.write_file, []

    def full(path, content):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)
        written.append(path)

    with monkeypatch.context() as patched:
        patched.setattr(tfds_format, "write_file", full)
        with pytest.raises(UserError, match="disk full"):
            teacher_vectors.compute(clips, str(tmp_path), teacher(), workers=1)
    teacher_vectors.compute(clips, str(tmp_path), embed := teacher(), workers=1)
    assert sum(embed.asked.values()) == 10 - 3
    assert_written(tmp_path, expected)


@pytest.mark.parametrize("moment", ["os.replace", "embed.audio"])
def test_killed_at_any_moment_it_goes_on(clips, expected, tmp_path, moment):
    """The third file's rename, or the second batch's sound, takes the process down."""
    root = os.path.dirname(clips[0].video)
    program = f"""
        import os, pathlib, signal
        from data_pipelines.modalities import teacher
        from tests.data_pipelines.modalities import test_teacher as here

        def deadly(function, survives):
            def call(*args):
                nonlocal survives
                if not survives:
                    os.kill(os.getpid(), signal.SIGKILL)
                survives -= 1
                return function(*args)
            return call

        embed = here.teacher()
        if {moment!r} == "os.replace":
            os.replace = deadly(os.replace, 2)
        else:
            embed = here.Patched(embed.config, 2, embed.video, deadly(embed.audio, 1))
        root = pathlib.Path({root!r})
        clips = [here.Clip(i, str(root / f"{{i}}.mp4"), None, (), (), None, None) for i in here.IDS]
        teacher.compute(clips, {str(tmp_path)!r}, embed, workers=1)
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    kept = sum(1 for path in tmp_path.rglob("*.npy"))
    assert kept == {"os.replace": 2, "embed.audio": 6}[moment]
    teacher_vectors.compute(clips, str(tmp_path), embed := teacher(), workers=1)
    assert sum(embed.asked.values()) == 10 - kept
    assert_written(tmp_path, expected)


def test_a_remote_folder(clips, expected):
    object_store.register()
    where = "gs://teacher/vectors"
    found, problems = teacher_vectors.compute(clips, where, teacher(), workers=1)
    assert problems == () and found[1].teacher_video == f"{where}/VideoFeature/{IDS[1]}.npy"
    record = records.read_record(found[1], Recipe(image_size=28, teacher_size=16))
    np.testing.assert_array_equal(record.features["teacher_video"], expected[IDS[1]][0])
    again, _ = teacher_vectors.compute(clips, where, embed := teacher(), workers=1)
    assert again == found and embed.asked == {"video": 0, "audio": 0}


def test_with_imagebind_itself_from_its_checkpoint(clips, tmp_path):
    """From the files to the vectors, on all devices: as the reference embeds the same inputs."""
    sizes = {f.name for f in dataclasses.fields(imagebind_reference.Sizes)}
    theirs = imagebind_reference.ImageBind(
        imagebind_reference.Sizes(**{name: getattr(CONFIG, name) for name in sizes})
    )
    torch.save(theirs.state_dict(), tmp_path / "imagebind.pth")
    embed = make_embed(CONFIG, loader(str(tmp_path / "imagebind.pth"), CONFIG))
    assert isinstance(embed, Embed) and embed.clips == len(jax.devices())
    found, problems = teacher_vectors.compute(clips, str(tmp_path), embed, workers=1)
    assert problems == ()
    for clip in found:
        inputs = teacher_inputs.read_inputs(
            teacher_inputs.Task(clip, True, True), teacher_inputs.Sizes(28, 204, 128)
        )
        mel = torch.from_numpy(inputs.fbanks).swapaxes(1, 2)[None, :, None]
        with torch.no_grad():
            video = theirs("vision", torch.from_numpy(inputs.frames[None]))[0].numpy()
            audio = theirs("audio", mel)[0].numpy()
        np.testing.assert_allclose(np.load(clip.teacher_video), video, atol=1e-5)
        np.testing.assert_allclose(np.load(clip.teacher_audio), audio, atol=2e-4)
