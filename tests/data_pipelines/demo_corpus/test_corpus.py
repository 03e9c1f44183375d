"""A small demo corpus: its files, its determinism, its completion after an interruption."""

import csv
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import av
import numpy as np
import pytest

from data_pipelines.datasets import demo
from data_pipelines.demo_corpus import corpus, generate, scenes, sounds, speech, teacher
from data_pipelines.demo_corpus.plan import plan
from data_pipelines.modalities.transcripts import read_asr
from save_jax import locks
from save_jax.errors import UserError

SIZES = {"n_train": 8, "n_test": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A demo corpus of 12 clips. Not to be written to."""
    root = tmp_path_factory.mktemp("demo")
    generate(root, workers=1, **SIZES)
    return root


@pytest.fixture
def copy(root, tmp_path):
    """A copy of it that may be written to."""
    return shutil.copytree(root, tmp_path / "copy")


def _contents(root):
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def test_files_are_h264_and_aac_of_3_to_4_seconds(root):
    kinds = Counter()
    for clip in plan(0, 8, 4):
        with av.open(root / "VideoData" / f"{clip.video_id}.mp4") as container:
            video = container.streams.video[0]
            assert (video.codec_context.name, video.width, video.height) == ("h264", 64, 64)
            frames = sum(1 for _ in container.decode(video))
            seconds = frames / scenes.FPS
            assert 3 <= seconds <= 4
            assert bool(container.streams.audio) == clip.has_track
            kinds[bool(clip.sound), bool(clip.topic)] += 1
            if clip.has_track:
                container.seek(0)
                audio = container.streams.audio[0]
                assert (audio.codec_context.name, audio.rate, audio.channels) == ("aac", 22050, 1)
                wave = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio)])
                assert len(wave) / sounds.RATE == pytest.approx(seconds, abs=0.06)
                assert 0.02 < np.sqrt(np.mean(wave**2)) < 0.2
    assert len(kinds) == 4  # silent, sound, speech, both


def test_annotations_agree_with_the_plan(root):
    splits, problems = demo.read_annotations(str(root), "default")
    assert problems == ()
    transcripts = read_asr(demo.asr_file(str(root)))
    assert {split: len(clips) for split, clips in splits.items()} == {"train": 8, "test": 4}
    clips = {clip.video_id: clip for clips in splits.values() for clip in clips}
    for planned in plan(0, 8, 4):
        clip = clips[planned.video_id]
        assert tuple(zip(clip.groups, clip.captions, strict=True)) == planned.captions
        heard = transcripts.get(clip.video_id, "")
        assert heard == (planned.script if planned.has_transcript else "")
        assert clip.audio is None
        for path in (clip.teacher_video, clip.teacher_audio):
            vector = np.load(path)
            assert vector.dtype == np.float32
            assert vector.shape == (1024,)
            assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    with open(root / "attributes.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["video_id"] for row in rows] == [clip.video_id for clip in plan(0, 8, 4)]


def test_two_runs_write_the_same_bytes_whatever_the_number_of_workers(root, tmp_path):
    generate(tmp_path / "again", workers=2, **SIZES)
    assert _contents(tmp_path / "again") == _contents(root)


def test_an_interrupted_corpus_is_completed(root, copy):
    videos, vectors = copy / "VideoData", copy / "FeatureData" / "ImageBind" / "AudioFeature"
    (videos / "train_0003.mp4").unlink()
    (videos / "train_0004.mp4").rename(videos / f".train_0004.mp4.{'0' * 32}.tmp")
    (videos / "test_0001.mp4").write_bytes(b"")
    (vectors / "test_0002.npy").unlink()
    (copy / "captions.csv").unlink()
    untouched = (videos / "train_0000.mp4").stat().st_mtime_ns
    generate(copy, workers=1)  # the sizes are known from what is there
    assert _contents(copy) == _contents(root)
    assert (videos / "train_0000.mp4").stat().st_mtime_ns == untouched


def test_a_corpus_that_another_process_makes_is_waited_for(root, copy, capsys):
    (copy / "VideoData" / "train_0003.mp4").unlink()
    making = threading.Thread(target=generate, args=(copy,), kwargs={"workers": 1})
    with locks.hold(copy):
        making.start()
        making.join(1)
        assert making.is_alive() and not (copy / "VideoData" / "train_0003.mp4").exists()
    making.join(60)
    assert _contents(copy) == _contents(root)
    assert f"which holds {copy}" in capsys.readouterr().out


GENERATE = """
import sys
from data_pipelines import demo_corpus
if __name__ == "__main__":
    demo_corpus.generate(sys.argv[1], workers=2, n_train=400, n_test=4)
"""


def _children(number: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(number)], capture_output=True)
    return [int(line) for line in found.stdout.split()]


def _lives(number: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_workers_end_with_the_process_that_started_them(tmp_path):
    script = tmp_path / "make.py"
    script.write_text(GENERATE)
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[3])}
    command = [sys.executable, str(script), str(tmp_path / "demo")]
    making = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    workers = []
    try:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "demo").glob("VideoData/*.mp4")):
            assert making.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        workers = _children(making.pid)
        assert len(workers) >= 2
        making.kill()
        making.wait()
        deadline = time.monotonic() + 10
        while any(map(_lives, workers)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not [number for number in workers if _lives(number)]
    finally:
        making.kill()
        making.wait()
        for number in filter(_lives, workers):
            os.kill(number, signal.SIGKILL)


def test_a_complete_corpus_is_left_alone(copy, monkeypatch):
    monkeypatch.setattr(corpus.files, "write", lambda *_: pytest.fail("wrote to a complete corpus"))
    generate(copy, **SIZES)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 1}, "seed: wanted 1, found 0"), ({"n_train": 9}, "train: wanted 9, found 8")],
)
def test_another_corpus_is_not_written_over(root, change, named):
    with pytest.raises(UserError, match=named):
        generate(root, **{**SIZES, **change})


def test_another_version_is_not_written_over(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "generator_version": 0}))
    with pytest.raises(UserError, match="generator_version: wanted 1, found 0"):
        generate(copy, **SIZES)


def test_other_files_are_not_mixed_with(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="found other files"):
        generate(tmp_path, **SIZES)
    with pytest.raises(UserError, match="expected a directory"):
        generate(tmp_path / "thesis.txt", **SIZES)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_reading_names_every_absent_file_and_the_remedy(copy):
    (copy / "VideoData" / "train_0003.mp4").unlink()
    (copy / "FeatureData" / "ImageBind" / "VideoFeature" / "test_0000.npy").unlink()
    with pytest.raises(UserError) as error:
        demo.read_annotations(str(copy), "default")
    for part in ("train_0003.mp4", "test_0000.npy", "python -m data_pipelines.prepare demo"):
        assert part in str(error.value)
    (copy / "captions.csv").unlink()
    (copy / "asr_text.json").unlink()
    with pytest.raises(UserError, match=r"(?s)captions\.csv.*asr_text\.json.*prepare demo"):
        demo.read_annotations(str(copy), "default")


def test_reading_rejects_a_foreign_captions_file_and_variant(copy):
    (copy / "captions.csv").write_text("video_id,sentence\n")
    with pytest.raises(UserError, match="expected the columns video_id, caption, group, split"):
        demo.read_annotations(str(copy), "default")
    with pytest.raises(UserError, match="expected a variant"):
        demo.read_annotations(str(copy), "9k")


def test_sights_and_sounds_of_one_family_are_close_for_the_teacher():
    clips = plan(0, 60, 0)
    for a, b in itertools.pairwise(clips):
        if b.sound:
            cosine = teacher.video_vector(0, a) @ teacher.audio_vector(0, b)
            assert (cosine > 0.5) == (sounds.family(b.sound) == a.motion)


def test_speech_depends_on_its_arguments_alone():
    first = speech.speak("Mix flour with yeast.", "en+f2", 160, 40, 0.6)
    speech.speak("Open your mouth wide.", "en-us+m1", 170, 60, 0.6)
    np.testing.assert_array_equal(
        speech.speak("Mix flour with yeast.", "en+f2", 160, 40, 0.6), first
    )
    assert 0.8 < len(first) / sounds.RATE < 2.5


@pytest.mark.parametrize("voice", speech.VOICES)
def test_every_voice_exists(voice):
    assert len(speech.speak("Hello.", voice, 160, 50, 0.5))


def test_an_unknown_voice_is_named():
    with pytest.raises(UserError, match="nobody"):
        speech.speak("Hello.", "nobody", 160, 50, 0.5)


@pytest.mark.parametrize("sound", sounds.SOUNDS)
def test_every_sound_fills_its_clip_and_varies(sound):
    waves = [sounds.synthesise(np.random.default_rng(s), sound, 3 * sounds.RATE) for s in (0, 1)]
    for wave in waves:
        assert wave.shape == (3 * sounds.RATE,)
        assert np.sqrt(np.mean(wave**2)) == pytest.approx(1, rel=1e-3)
        loudness = np.sqrt(np.mean(wave.reshape(2, -1) ** 2, axis=1))
        assert loudness.min() > 0.3  # both halves sound
    assert abs(np.corrcoef(waves)[0, 1]) < 0.6


@pytest.mark.parametrize("motion", scenes.MOTIONS)
@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_every_scene_shows_its_colour_and_moves(shape, motion):
    frames = scenes.draw(np.random.default_rng(0), shape, "green", motion, 36)
    assert frames.shape == (36, 64, 64, 3)
    assert frames.dtype == np.uint8
    green = (frames[..., 1] > 110) & (frames[..., 0] < 80) & (frames[..., 2] < 110)
    assert 0.02 < green.mean() < 0.5
    assert max((green[0] != frame).mean() for frame in green[1:7]) > 0.005
