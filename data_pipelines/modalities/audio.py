"""Sound in, normalised log-Mel filterbanks out (spec section 1, row "audio").

The filterbank is Kaldi's, as AST was trained on it: what Kaldi calls `window_type=hanning`,
`htk_compat=True`, `use_energy=False`, `dither=0`, `snip_edges=True`.
"""

import functools
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import TypeGuard

import av
import numpy as np
from transformers import audio_utils

from data_pipelines.modalities.container import Damage, MediaError, decodable, open_media
from data_pipelines.recipe import Recipe

SAMPLE_RATE = 16000
WINDOW = 400  # samples: 25 ms
FFT_LENGTH = 512
PREEMPHASIS = 0.97
LOW_HERTZ = 20.0
LOG_FLOOR = 1.1920928955078125e-07  # float32's epsilon
# Windows transformed at a time: few enough to stay in a core's cache.
_BLOCK = 64
# AST's training set: (x - mean) / (2 * standard deviation).
MEAN = -5.118
DEVIATION = 3.2527153


def read_waveform(
    path: str | os.PathLike, damage: Damage = lambda reason: None
) -> np.ndarray | None:
    """Decodes the first channel of a file's first audio track, resampled to 16 kHz.

    Args:
        path: an audio or a video file.
        damage: called with a description of the parts that do not decode, if others do.

    Returns:
        float32 [samples] in [-1, 1], or None when the file has no audio track. A damaged track
        gives the samples that decode.

    Raises:
        MediaError: the file cannot be opened, or nothing of its audio track decodes.
    """
    with open_media(path) as container:
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        # Preparation runs one process per core; more threads would only compete for them.
        stream.codec_context.thread_count = 1
        chunks = []
        resampler, resampler_format = None, None
        for frame in _first_channel(decodable(container, stream, damage)):
            # A track may change its format midway, but a resampler accepts only one.
            frame_format = (frame.format.name, frame.sample_rate)
            if frame_format != resampler_format:
                chunks += _resample(resampler, None)
                resampler_format = frame_format
                resampler = av.AudioResampler(format="fltp", layout="mono", rate=SAMPLE_RATE)
            chunks += _resample(resampler, frame)
        chunks += _resample(resampler, None)
    if not chunks:
        raise MediaError("nothing of its audio track can be decoded")
    return np.concatenate(chunks)


def long_enough(waveform: np.ndarray | None) -> TypeGuard[np.ndarray]:
    """Returns whether there is at least one window of sound; less counts as no track."""
    return waveform is not None and len(waveform) >= WINDOW


def frame_shift(samples: int, fbank_frames: int) -> int:
    """Returns the samples from one window to the next, at least 1, for about `fbank_frames`."""
    return max(1, samples // fbank_frames)


def fbank(waveform: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Computes the log-Mel filterbank of a waveform of any length (spec section 1).

    Args:
        waveform: float32 [samples] at 16 kHz in [-1, 1], at least 400 samples.
        recipe: says T (`fbank_frames`) and M (`mel_bins`).

    Returns:
        float32 [T, M], zero-padded or cut to T, then normalised.

    Raises:
        ValueError: the waveform is shorter than one window.
    """
    if not long_enough(waveform):
        raise ValueError(f"expected at least {WINDOW} samples, found {len(waveform)}")
    shift = frame_shift(len(waveform), recipe.fbank_frames)
    log_mel = log_mel_windows(waveform, shift, recipe.fbank_frames, recipe.mel_bins)
    return ((log_mel - MEAN) / (2 * DEVIATION)).astype(np.float32)


def log_mel_windows(waveform: np.ndarray, shift: int, frames: int, mel_bins: int) -> np.ndarray:
    """Computes Kaldi's log-Mel energies, one window every `shift` samples.

    Args:
        waveform: float32 [samples] at 16 kHz in [-1, 1], at least 400 samples.
        shift: samples from one window to the next.
        frames: windows to return; further ones are cut off, and missing ones are zeros.
        mel_bins: filters.

    Returns:
        float64 [frames, mel_bins], not normalised.
    """
    # Only the windows that are kept are computed: at a shift of one sample there may be many more.
    windows = np.lib.stride_tricks.sliding_window_view(waveform, WINDOW)[::shift][:frames]
    power = np.empty((len(windows), FFT_LENGTH // 2 + 1), np.float64)
    for start in range(0, len(windows), _BLOCK):
        block = windows[start : start + _BLOCK].astype(np.float64)
        # This also removes the mean of the whole waveform, which the reference does first.
        block -= block.mean(axis=1, keepdims=True)
        block[:, 1:] -= PREEMPHASIS * block[:, :-1]
        block[:, 0] *= 1 - PREEMPHASIS
        spectrum = np.fft.rfft(block * np.hanning(WINDOW), FFT_LENGTH)
        power[start : start + _BLOCK] = spectrum.real**2 + spectrum.imag**2
    log_mel = np.zeros((frames, mel_bins), np.float64)
    for mel_bin, (band, weights) in enumerate(_mel_filters(mel_bins)):
        energy = power[:, band] @ weights
        log_mel[: len(power), mel_bin] = np.log(np.maximum(energy, LOG_FLOOR))
    return log_mel


def silent(recipe: Recipe) -> np.ndarray:
    """Returns the filterbank of a clip without an audio track: float32 [T, M] zeros."""
    return np.zeros((recipe.fbank_frames, recipe.mel_bins), np.float32)


def _first_channel(frames: Iterable[av.AudioFrame]) -> Iterator[av.AudioFrame]:
    """Yields the first channel of the same sound in frames of about a second.

    Resampling has a cost per frame, and a frame of AAC is only a fiftieth of a second. The frames
    have no timestamps, so that a resampler neither fills gaps nor drops overlaps.
    """

    def whole() -> av.AudioFrame:
        frame = av.AudioFrame.from_ndarray(np.concatenate(pending)[None], name, "mono")
        frame.sample_rate = rate
        return frame

    pending: list[np.ndarray] = []
    name, rate, samples = "", 0, 0
    for frame in frames:
        frame_format = (frame.format.planar.name, frame.sample_rate)
        if pending and (frame_format != (name, rate) or samples >= frame.sample_rate):
            yield whole()
            pending, samples = [], 0
        name, rate = frame_format
        data = frame.to_ndarray()
        planar = frame.format.is_planar
        pending.append(data[0] if planar else data[0, :: frame.layout.nb_channels])
        samples += frame.samples
    if pending:
        yield whole()


def _resample(resampler: av.AudioResampler | None, frame: av.AudioFrame | None) -> list[np.ndarray]:
    """Resamples a frame, or what is left in the resampler (None)."""
    if resampler is None:
        return []
    return [resampled.to_ndarray()[0] for resampled in resampler.resample(frame)]


@functools.cache
def _mel_filters(mel_bins: int) -> list[tuple[slice, np.ndarray]]:
    """Makes triangular filters on Kaldi's Mel scale: for each, its FFT bins and their weights.

    Nearly all weights of a filter are zeros. One product with the whole matrix would also have the
    threads of NumPy's linear algebra wait for each other, in every process that reads media.
    """
    with warnings.catch_warnings():
        # With 128 bins, the lowest fall between two FFT bins, as they do in Kaldi.
        warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")
        filters = audio_utils.mel_filter_bank(
            num_frequency_bins=FFT_LENGTH // 2 + 1,
            num_mel_filters=mel_bins,
            min_frequency=LOW_HERTZ,
            max_frequency=SAMPLE_RATE / 2,
            sampling_rate=SAMPLE_RATE,
            mel_scale="kaldi",
            triangularize_in_mel_space=True,
        )
    taken = [np.flatnonzero(column) for column in filters.T]
    bands = [slice(bins[0], bins[-1] + 1) if len(bins) else slice(0) for bins in taken]
    return [(band, filters[band, number]) for number, band in enumerate(bands)]
