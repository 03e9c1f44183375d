"""What the teacher is shown: frames over the whole clip, and pieces of sound as ImageBind's own."""

import fractions

import numpy as np
import pytest
from PIL import Image
from transformers import audio_utils

from data_pipelines.datasets.types import Clip
from data_pipelines.modalities import teacher_inputs
from data_pipelines.modalities import video as video_files
from data_pipelines.modalities.container import MediaError, decodable, open_media
from data_pipelines.recipe import Recipe
from tests.data_pipelines.modalities.test_audio import kaldi_fbank, sound
from tests.support import media as synthetic

SIZES = teacher_inputs.Sizes(image_size=32, fbank_frames=204, mel_bins=128)


def numbers(frames: np.ndarray) -> list[int]:
    return [synthetic.number_of(frame) for frame in frames]


def evenly(count: int) -> list[int]:
    """Truncated positions from the first of `count` frames to the last, in exact arithmetic."""
    return [n * (count - 1) // 31 for n in range(32)]


# -------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv", "a.webm"])
def test_frames_are_spread_over_the_whole_clip(tmp_path, name):
    codec = "libvpx" if name.endswith("webm") else "mpeg4"
    path = synthetic.write_video(
        tmp_path / name, synthetic.numbered_frames(100), fps=25, codec=codec
    )
    frames = video_files.decode_evenly(path, 32, 32)
    assert frames.shape == (32, 32, 32, 3) and frames.dtype == np.uint8
    assert numbers(frames) == evenly(100)


@pytest.mark.parametrize("count", [1, 5, 31, 32, 33])
def test_a_short_clip_repeats_frames(tmp_path, count):
    path = synthetic.write_video(tmp_path / "a.mp4", synthetic.numbered_frames(count))
    assert numbers(video_files.decode_evenly(path, 32, 32)) == evenly(count)


def test_a_clip_cut_short_is_spread_over_what_decodes(tmp_path):
    path = synthetic.write_video(
        tmp_path / "a.mp4", synthetic.numbered_frames(200), options={"movflags": "+faststart"}
    )
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with open_media(path) as container:
        count = len(list(decodable(container, container.streams.video[0])))
    assert 60 < count < 199
    found = numbers(video_files.decode_evenly(path, 32, 32))
    assert found[:-1] == evenly(count)[:-1]  # the very last is half a frame


def test_a_folder_of_images(tmp_path):
    for number, frame in enumerate(synthetic.numbered_frames(70)):
        Image.fromarray(frame).save(tmp_path / f"{number:03}.png")
    (tmp_path / "000.png").write_bytes(b"not an image")  # so that there are 69, from 1 on
    assert numbers(video_files.decode_evenly(tmp_path, 32, 32)) == [n + 1 for n in evenly(69)]


def test_frames_are_those_of_the_pipeline(tmp_path):
    """Resized, cropped and turned as the model's own frames are."""
    wide = [np.repeat(frame, 2, axis=1) for frame in synthetic.numbered_frames(1)]
    wide[0][:, :40] = 200
    path = synthetic.write_video(tmp_path / "a.mp4", wide, clockwise=90)
    expected = video_files.decode_frames(path, Recipe(image_size=24))
    np.testing.assert_array_equal(video_files.decode_evenly(path, 32, 24)[7], expected[0])


@pytest.mark.parametrize("content", [b"", b"text, not a video\n" * 100])
def test_an_unreadable_video_raises(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(MediaError):
        video_files.decode_evenly(tmp_path / "a.mp4", 32, 32)


# --------------------------------------------------------------------------------------- sound


def constant_clips(duration: float, clip_duration: int = 2, clips_per_video: int = 3):
    """Start and end of each clip, in seconds, asked for one at a time as of pytorchvideo's sampler.

    Independent of the code under test: written from the sampler's description.
    """
    found, index, is_last = [], 0, False
    while not is_last:
        latest = fractions.Fraction(max(duration - clip_duration, 0))
        step = fractions.Fraction(latest, max(clips_per_video - 1, 1))
        start = step * index
        index += 1
        is_last = index >= clips_per_video or step * index > latest
        found.append((start, start + clip_duration))
    return found


@pytest.mark.parametrize(
    "samples", [400, 16000, 31999, 32000, 32001, 32003, 48000, 160000, 237123, 16000 * 61 + 7]
)
def test_pieces_are_those_of_constant_clips_sampling(samples):
    waveform = np.arange(samples)
    expected = [
        waveform[int(start * 16000) : int(end * 16000)]
        for start, end in constant_clips(samples / 16000)
    ]
    found = [waveform[start:end] for start, end in teacher_inputs.pieces(samples)]
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert found[0][0] == 0 and found[-1][-1] >= samples - 2  # both ends, to rounding
    assert {len(piece) for piece in found} <= {min(samples, 32000), 32000}


def kaldi_by_transformers(piece: np.ndarray) -> np.ndarray:
    """A second implementation: float64 [frames, 128]."""
    filters = audio_utils.mel_filter_bank(
        num_frequency_bins=257, num_mel_filters=128, min_frequency=20, max_frequency=8000,
        sampling_rate=16000, mel_scale="kaldi", triangularize_in_mel_space=True,
    )  # fmt: skip
    return audio_utils.spectrogram(
        piece.astype(np.float64),
        audio_utils.window_function(400, "hann", periodic=False),
        frame_length=400,
        hop_length=160,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        mel_filters=filters,
        log_mel="log",
        mel_floor=1.192092955078125e-07,
        remove_dc_offset=True,
    ).T


@pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")
@pytest.mark.parametrize("seconds", [0.5, 1.3, 2, 7.77])
def test_filterbanks_are_imagebinds(seconds):
    waveform = sound(seconds)
    found = teacher_inputs.sound(waveform, SIZES)
    assert found.shape == (3, 204, 128) and found.dtype == np.float32
    for n, (start, end) in enumerate(constant_clips(len(waveform) / 16000)):
        piece = waveform[int(start * 16000) : int(end * 16000)]
        # 10 ms of 16 kHz: as many windows a second as this many in the piece.
        by_definition = kaldi_fbank(piece, len(piece) // 160, 128)
        by_transformers = kaldi_by_transformers(piece)
        frames = 1 + (len(piece) - 400) // 160
        assert len(by_definition) == len(by_transformers) == frames
        for log_mel in (by_definition, by_transformers):
            padded = np.zeros((204, 128))
            padded[:frames] = log_mel
            np.testing.assert_allclose(found[n], (padded + 4.268) / 9.138, atol=2e-4)


def test_the_inputs_of_a_clip(tmp_path):
    wave = synthetic.tone(3)
    video = synthetic.write_video(
        tmp_path / "a.mp4", synthetic.numbered_frames(40), sound=wave[None], sound_rate=16000
    )
    clip = Clip("a", str(video), None, (), (), None, None)
    both = teacher_inputs.read_inputs(teacher_inputs.Task(clip, True, True), SIZES)
    assert numbers(both.frames) == evenly(40)
    assert both.fbanks.shape == (3, 204, 128) and both.problem == ""
    # 440 Hz rings in every piece, in the same bin.
    assert {int(piece[50:150].mean(0).argmax()) for piece in both.fbanks} == {
        int(kaldi_fbank(wave[:32000], 200, 128).mean(0).argmax())
    }
    one = teacher_inputs.read_inputs(teacher_inputs.Task(clip, False, True), SIZES)
    assert one.frames is None
    np.testing.assert_array_equal(one.fbanks, both.fbanks)
