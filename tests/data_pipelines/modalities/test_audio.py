import numpy as np
import pytest
from transformers import audio_utils

from data_pipelines.modalities import audio
from data_pipelines.modalities.container import MediaError
from data_pipelines.recipe import Recipe
from tests.support import media as synthetic

FULL = Recipe()


def kaldi_fbank(waveform: np.ndarray, fbank_frames: int, mel_bins: int) -> np.ndarray:
    """Kaldi's log-Mel filterbank, from its definition, loops and all: float64 [frames, mel_bins].

    Independent of the code under test: written from Kaldi's feature-window and mel-computations.
    """
    rate, window, padded = 16000, 400, 512
    waveform = waveform.astype(np.float64)
    waveform = waveform - waveform.mean()
    shift_ms = len(waveform) * 1000 / (rate * fbank_frames)
    shift = max(1, int(rate * 0.001 * shift_ms + 1e-9))
    hanning = [0.5 - 0.5 * np.cos(2 * np.pi * i / (window - 1)) for i in range(window)]

    def mel(hertz):
        return 1127.0 * np.log(1.0 + hertz / 700.0)

    low, high = mel(20.0), mel(rate / 2)
    step = (high - low) / (mel_bins + 1)
    weights = np.zeros((mel_bins, padded // 2 + 1))
    for b in range(mel_bins):
        left, centre, right = low + b * step, low + (b + 1) * step, low + (b + 2) * step
        for k in range(padded // 2):  # Kaldi leaves the Nyquist bin out
            m = mel(k * rate / padded)
            if left < m < right:
                up, down = (m - left) / (centre - left), (right - m) / (right - centre)
                weights[b, k] = up if m <= centre else down

    rows = []
    for start in range(0, len(waveform) - window + 1, shift):
        frame = waveform[start : start + window]
        frame = frame - frame.mean()
        emphasised = np.empty(window)
        emphasised[0] = frame[0] - 0.97 * frame[0]
        for i in range(1, window):
            emphasised[i] = frame[i] - 0.97 * frame[i - 1]
        spectrum = np.fft.fft(np.concatenate([emphasised * hanning, np.zeros(padded - window)]))
        power = np.abs(spectrum[: padded // 2 + 1]) ** 2
        rows.append(np.log(np.maximum(weights @ power, 1.1920929e-07)))
    return np.array(rows)


def sound(seconds: float) -> np.ndarray:
    """Noise, a glide and a stretch of silence, off centre: float32 [samples]."""
    n = round(seconds * 16000)
    rng = np.random.default_rng(n)
    time = np.arange(n) / 16000
    wave = 0.3 * np.sin(2 * np.pi * (200 + 50 * time) * time) + 0.05 * rng.standard_normal(n) + 0.1
    wave[n // 3 : n // 2] = 0
    return np.clip(wave, -1, 1).astype(np.float32)


@pytest.mark.parametrize("seconds", [1, 1.3, 10, 60])
def test_fbank_is_kaldis(seconds):
    waveform = sound(seconds)
    expected = kaldi_fbank(waveform, 128, 128)[:128]
    found = audio.fbank(waveform, Recipe(fbank_frames=128)) * (2 * 3.2527153) - 5.118
    assert found.shape == (128, 128)
    np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-3)
    np.testing.assert_allclose(found[len(expected) :], 0, atol=1e-5)  # padded before normalising


def test_fbank_at_full_size_is_kaldis():
    waveform = sound(5)
    expected = kaldi_fbank(waveform, 1024, 128)[:1024]
    found = audio.fbank(waveform, FULL) * (2 * 3.2527153) - 5.118
    np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-3)


def test_fbank_is_that_of_transformers():
    waveform = sound(10)
    shift = 160000 // 1024
    filters = audio_utils.mel_filter_bank(
        257, 40, 20.0, 8000.0, 16000, mel_scale="kaldi", triangularize_in_mel_space=True
    )
    expected = audio_utils.spectrogram(
        waveform - waveform.mean(), np.hanning(400), 400, shift, 512, power=2.0, center=False,
        preemphasis=0.97, mel_filters=filters, mel_floor=1.192092955078125e-07, log_mel="log",
        remove_dc_offset=True,
    ).T[:1024]  # fmt: skip
    found = audio.fbank(waveform, Recipe(mel_bins=40)) * (2 * 3.2527153) - 5.118
    np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-3)


@pytest.mark.parametrize(
    ("samples", "shift"),
    [(400, 1), (1023, 1), (2047, 1), (2048, 2), (160000, 156), (163840, 160), (57_600_000, 56250)],
)
def test_the_shift_grows_with_the_length(samples, shift):
    assert audio.frame_shift(samples, 1024) == shift


def test_a_very_long_track_fills_the_filterbank():
    waveform = np.zeros(20 * 60 * 16000, np.float32)
    waveform[::2] = 0.5
    fbank = audio.fbank(waveform, FULL)
    np.testing.assert_allclose(fbank[-2], fbank[0], atol=1e-5)


def test_less_than_a_window_is_no_track():
    assert not audio.long_enough(None)
    assert not audio.long_enough(np.zeros(399, np.float32))
    assert audio.long_enough(np.zeros(400, np.float32))
    with pytest.raises(ValueError, match="found 399"):
        audio.fbank(np.zeros(399, np.float32), FULL)


def test_a_track_of_silence_is_not_an_absent_track():
    quiet = audio.fbank(np.zeros(16000, np.float32), FULL)
    np.testing.assert_allclose(quiet[0], (np.log(2**-23) + 5.118) / (2 * 3.2527153), rtol=1e-6)
    absent = audio.silent(FULL)
    assert absent.shape == (1024, 128) and not absent.any()


def test_wav_is_read_as_it_is(tmp_path):
    wave = synthetic.tone(1.5)
    found = audio.read_waveform(synthetic.write_wav(tmp_path / "a.wav", wave[None]))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wave, atol=2**-15)


def test_of_several_channels_the_first_is_taken(tmp_path):
    channels = np.stack([synthetic.tone(1, 300), synthetic.tone(1, 2000)])
    found = audio.read_waveform(synthetic.write_wav(tmp_path / "a.wav", channels))
    np.testing.assert_allclose(found, channels[0], atol=2**-15)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_other_rates_are_resampled(tmp_path, rate):
    wave = synthetic.tone(2, 440, rate)
    found = audio.read_waveform(synthetic.write_wav(tmp_path / "a.wav", wave[None], rate))
    assert abs(len(found) - 32000) <= 32
    np.testing.assert_allclose(found[1000:31000], synthetic.tone(2)[1000:31000], atol=0.01)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
@pytest.mark.parametrize("layout", ["mono", "stereo", "5.1"])
@pytest.mark.parametrize("kind", ["wav", "mp4"])
def test_layouts_and_rates(tmp_path, kind, layout, rate):
    channels = {"mono": 1, "stereo": 2, "5.1": 6}[layout]
    sound = np.stack([synthetic.tone(1.5, 440 + 500 * n, rate) for n in range(channels)])
    if kind == "wav":
        path = synthetic.write_wav(tmp_path / "a.wav", sound, rate)
    else:
        path = synthetic.write_video(
            tmp_path / "a.mp4", [], codec="", sound=sound, sound_rate=rate, sound_layout=layout
        )
    damage = []
    found = audio.read_waveform(path, damage.append)
    # An encoder of AAC adds some of its frames, of 1,024 samples.
    assert abs(len(found) - 24000) < 3 * 1024 * 16000 / rate and not damage
    spectrum = np.abs(np.fft.rfft(found[4000:20000]))
    # AAC stores the centre of 5.1 first; a decoder gives the channels their usual order again.
    assert spectrum.argmax() == 440
    assert all(spectrum[440 + 500 * n] < 0.05 * spectrum[440] for n in range(1, channels))


def test_a_track_that_changes_its_layout_and_rate(tmp_path):
    waves = [synthetic.tone(1, 440, rate)[None] for rate in (16000, 32000)]
    parts = []
    for wave, rate, channels in ((waves[0], 16000, 1), (waves[1], 32000, 2)):
        path = tmp_path / f"{rate}.aac"  # of which one can be put behind the other
        sound = np.concatenate([wave] * channels)
        synthetic.write_video(
            path, [], codec="", sound=sound, sound_rate=rate,
            sound_layout="mono" if channels == 1 else "stereo",
        )  # fmt: skip
        parts.append(path.read_bytes())
    (tmp_path / "a.aac").write_bytes(b"".join(parts))
    found = audio.read_waveform(tmp_path / "a.aac")
    assert abs(len(found) - 32000) < 4000
    for second in (found[2000:14000], found[20000:32000]):
        assert np.abs(np.fft.rfft(second)).argmax() * 16000 / 12000 == pytest.approx(440, abs=2)


def test_a_track_that_was_cut_is_told_of(tmp_path):
    path = synthetic.write_video(
        tmp_path / "a.mp4", [], codec="", sound=synthetic.tone(6)[None],
        options={"movflags": "faststart"},
    )  # fmt: skip
    damage = []
    assert abs(len(audio.read_waveform(path, damage.append)) - 96000) < 3000 and damage == []
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert 30000 < len(audio.read_waveform(path, damage.append)) < 60000
    assert len(damage) == 1
    assert "audio track breaks off after" in damage[0] or "damaged" in damage[0]


@pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
def test_the_track_of_a_video(tmp_path, name):
    wave = np.stack([synthetic.tone(2, 440, 48000), synthetic.tone(2, 3000, 48000)])
    path = synthetic.write_video(
        tmp_path / name, synthetic.numbered_frames(20), sound=wave, sound_rate=48000,
        codec="libvpx" if name.endswith("webm") else "mpeg4", sound_layout="stereo",
    )  # fmt: skip
    found = audio.read_waveform(path)
    assert abs(len(found) - 32000) < 2000
    spectrum = np.abs(np.fft.rfft(found[8000:24000]))
    assert spectrum.argmax() == 440
    assert spectrum[3000] < 0.05 * spectrum[440]  # nothing of the second channel


def test_no_track_is_none(tmp_path):
    path = synthetic.write_video(tmp_path / "a.mp4", synthetic.numbered_frames(5))
    assert audio.read_waveform(path) is None


@pytest.mark.parametrize("content", [b"", b"text, not sound\n" * 100])
def test_unreadable_files_raise(tmp_path, content):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(MediaError):
        audio.read_waveform(tmp_path / "a.wav")


def test_a_track_without_samples_raises(tmp_path):
    path = synthetic.write_wav(tmp_path / "a.wav", np.zeros((1, 0)))
    with pytest.raises(MediaError, match="nothing of its audio"):
        audio.read_waveform(path)
