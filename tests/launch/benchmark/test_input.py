import json
import sys

import av
import numpy as np
import pytest

from launch.benchmark import __main__ as benchmark
from launch.benchmark import input as benchmark_input
from launch.benchmark import media

TINY = ["--clips=2", "--clip_seconds=2", "--seconds=0", "--batch_size=2", "--workers=1"]


def test_the_command_at_tiny_size(monkeypatch, capsys):
    # Each measurement has a process of its own, which takes seconds to start.
    monkeypatch.setattr(
        benchmark_input.processes, "in_own_process", lambda f, *arguments: f(*arguments)
    )
    assert benchmark.main(["input", *TINY]) == 0
    lines = capsys.readouterr().out.splitlines()
    results = json.loads(lines[-1])
    assert set(results["reading"]) == {"jpeg", "raw", "reference"}
    assert set(results["preparing"]) == {"one_shot", "shots_of_5_s"}
    for group in (results["reading"], *results["preparing"].values()):
        for rate in group.values():
            assert rate["a_second"] > 0 and rate["a_core"] > 0
            assert rate["times_reference"] == rate["a_core"] / group["reference"]["a_core"]
    assert results["reading"]["jpeg"]["memory_peak"] > 100
    assert results["scaling"]["workers"] == 1
    table = "\n".join(lines)
    for words in ("from JPEG", "from raw frames", "one shot", "shots of 5 s", "Memory while"):
        assert words in table


def test_both_ways_give_the_same_of_a_clip(tmp_path):
    video = str(media.make_clip(tmp_path / "a.mp4", 0, seconds=3, shot_seconds=1))
    frames, fbank = benchmark_input.to_arrays(video)
    its_frames, its_fbank = benchmark_input.reference(video)
    assert frames.shape == (3, 224, 224, 3)
    assert np.abs(frames.astype(int) - its_frames).mean() < 1
    assert np.abs(fbank - its_fbank).mean() < 0.01  # the .wav has 16 bits
    features = benchmark_input.to_record(video).features
    assert features is not None
    assert features["num_frames"] == 3
    np.testing.assert_array_equal(features["fbank"], fbank.astype(np.float16))


def test_shots_differ_and_each_begins_with_a_key_frame(tmp_path):
    video = media.make_clip(tmp_path / "a.mp4", 0, seconds=6, shot_seconds=2)
    with av.open(str(video)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert container.streams.audio[0].codec_context.name == "aac"
        keys = [packet.pts for packet in container.demux(video=0) if packet.is_keyframe]
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--clips=1", "--clips of at least 2"),
        ("--batch_size=0", "--batch_size of at least 1"),
        ("--batch_size=41", "at most 20 for each of the 2"),
        ("--workers=-1", "--workers of at least 0"),
    ],
)
def test_flags_out_of_range(capsys, flag, words):
    assert benchmark.main(["input", "--clips=2", flag]) == 2
    assert words in capsys.readouterr().err


def test_without_opencv(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert benchmark.main(["input", *TINY]) == 2
    assert "pip install opencv-python-headless" in capsys.readouterr().err
