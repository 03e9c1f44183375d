import dataclasses
import os

import numpy as np
import pytest

from data_pipelines.datasets.types import Clip
from data_pipelines.modalities import record as records
from data_pipelines.recipe import Recipe
from tests.data_pipelines.conftest import SMALL
from tests.support import media as synthetic

RECIPE = Recipe(teacher_size=8, **SMALL)


@pytest.fixture
def clip(tmp_path):
    """A clip with everything."""
    video = synthetic.write_video(
        tmp_path / "a.mp4", synthetic.numbered_frames(30), sound=synthetic.tone(3)[None]
    )
    for name in ("video", "audio"):
        np.save(tmp_path / f"{name}.npy", np.full(8, len(name), np.float32))
    return Clip(
        video_id="a",
        video=str(video),
        audio=None,
        transcript="hello there",
        captions=("one", "two"),
        groups=("", "sound"),
        teacher_video=str(tmp_path / "video.npy"),
        teacher_audio=str(tmp_path / "audio.npy"),
    )


def test_a_clip_with_everything(clip):
    record = records.read_record(clip, RECIPE)
    assert record.problems == ()
    features = record.features
    assert len(features["frames"]) == features["num_frames"] == 3
    assert features["fbank"].dtype == np.float16 and features["fbank"].shape == (64, 128)
    assert features["fbank"].any() and features["has_audio"] and features["has_teacher"]
    assert features["captions"] == ["one", "two"] and features["groups"] == ["", "sound"]
    np.testing.assert_array_equal(features["teacher_video"], np.full(8, 5))
    np.testing.assert_array_equal(features["teacher_audio"], np.full(8, 5))


def test_a_clip_with_nothing_but_pictures(clip, tmp_path):
    video = synthetic.write_video(tmp_path / "b.mp4", synthetic.numbered_frames(3))
    bare = dataclasses.replace(
        clip, video=str(video), captions=(), groups=(), teacher_video=None, teacher_audio=None
    )
    record = records.read_record(bare, RECIPE)
    assert record.problems == ()
    assert not (record.features["has_audio"] or record.features["has_teacher"])
    assert not record.features["fbank"].any()
    assert record.features["teacher_video"].tolist() == [0.0] * 8


def test_less_than_a_window_of_sound_is_no_problem_and_no_track(clip, tmp_path):
    wav = synthetic.write_wav(tmp_path / "a.wav", synthetic.tone(399 / 16000)[None])
    record = records.read_record(dataclasses.replace(clip, audio=str(wav)), RECIPE)
    assert (record.features["has_audio"], record.problems) == (False, ())


def test_a_wav_is_preferred(clip, tmp_path):
    wav = synthetic.write_wav(tmp_path / "a.wav", synthetic.tone(3, 3000)[None])
    own = records.read_record(clip, RECIPE).features["fbank"].astype(float).mean(0)
    preferred = records.read_record(dataclasses.replace(clip, audio=str(wav)), RECIPE)
    assert preferred.features["fbank"].astype(float).mean(0).argmax() > own.argmax() + 20


def test_a_damaged_wav_is_named_and_the_videos_own_sound_is_used(clip, tmp_path):
    (tmp_path / "a.wav").write_bytes(b"")
    record = records.read_record(dataclasses.replace(clip, audio=str(tmp_path / "a.wav")), RECIPE)
    assert record.features["has_audio"]
    assert len(record.problems) == 1 and "a.wav: the file is empty" in record.problems[0]


@pytest.mark.parametrize("values", [np.ones(7), np.full(8, np.nan)])
def test_a_bad_teacher_vector_is_named(clip, values):
    np.save(clip.teacher_audio, values.astype(np.float32))
    record = records.read_record(clip, RECIPE)
    assert not record.features["has_teacher"]
    assert not record.features["teacher_video"].any()
    assert len(record.problems) == 1 and clip.teacher_audio in record.problems[0]


def test_one_vector_of_two_is_no_teacher(clip):
    record = records.read_record(dataclasses.replace(clip, teacher_audio=None), RECIPE)
    assert (record.features["has_teacher"], record.problems) == (False, ())


def test_a_clip_without_frames_is_left_out(clip):
    record = records.read_record(dataclasses.replace(clip, video="/nowhere/a.mp4"), RECIPE)
    assert record.features is None
    assert record.problems == ("left out: /nowhere/a.mp4: the file does not exist",)


def test_what_nobody_thought_of_is_named_too(clip, monkeypatch):
    def surprise(*_):
        raise KeyError("odd")

    monkeypatch.setattr(records.video, "decode_frames", surprise)
    record = records.read_record(clip, RECIPE)
    assert record.features is None and "KeyError('odd')" in record.problems[0]


class _Deadly(str):
    """A path that ends the worker process it is sent to, as a crash in FFmpeg would."""

    def __reduce__(self):
        return os._exit, (9,)


def test_workers_keep_the_order_and_a_crash_costs_one_clip(clip):
    clips = [dataclasses.replace(clip, video_id=str(n)) for n in range(6)]
    clips[2] = dataclasses.replace(clips[2], video=_Deadly("deadly.mp4"))
    found = list(records.read_records(clips, RECIPE, workers=2))
    assert [record.clip.video_id for record in found] == list("012345")
    assert [record.clip.video_id for record in found if record.features is None] == ["2"]
    assert found[2].problems == ("left out: deadly.mp4: it crashes the decoder",)
    alone = records.read_record(clip, RECIPE)
    np.testing.assert_array_equal(found[5].features["fbank"], alone.features["fbank"])
