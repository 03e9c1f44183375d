"""Sound in, normalised log-Mel filterbanks out (spec section 1, row "audio").

The filterbank is Kaldi's, as AST was trained on it: what Kaldi calls `window_type=hanning`,
`htk_compat=True`, `use_energy=False`, `dither=0`, `snip_edges=True`.
"""

import functools
import os
import warnings

import av
import numpy as np
from transformers import audio_utils

from data_pipelines import media
from data_pipelines.recipe import Recipe

SAMPLE_RATE = 16000
WINDOW = 400  # samples: 25 ms
FFT_LENGTH = 512
PREEMPHASIS = 0.97
LOW_HERTZ = 20.0
LOG_FLOOR = 1.1920928955078125e-07  # float32's epsilon
# AST's training set: (x - mean) / (2 * standard deviation).
MEAN = -5.118
DEVIATION = 3.2527153


def read_waveform(path: str | os.PathLike) -> np.ndarray | None:
    """Decodes the first channel of a file's first audio track, resampled to 16 kHz.

    Args:
        path: an audio or a video file.

    Returns:
        float32 [samples] in [-1, 1], or None when the file has no audio track. A damaged track
        gives the samples that decode.

    Raises:
        MediaError: the file cannot be opened, or nothing of its audio track decodes.
    """
    with media.open_media(path) as container:
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        chunks = []
        resampler, resampler_format = None, None
        for frame in media.decodable(container, stream):
            # A track may change its layout on the way (AAC that turns to stereo does): a resampler
            # takes one format only.
            frame_format = (frame.format.name, frame.layout.name, frame.sample_rate)
            if frame_format != resampler_format:
                chunks += _first_channel(resampler, None)
                resampler_format = frame_format
                resampler = av.AudioResampler(
                    format="fltp", layout=frame.layout.name, rate=SAMPLE_RATE
                )
            # Without a timestamp the resampler neither fills gaps nor drops overlaps.
            frame.pts = None
            chunks += _first_channel(resampler, frame)
        chunks += _first_channel(resampler, None)
    if not chunks:
        raise media.MediaError("nothing of its audio track can be decoded")
    return np.concatenate(chunks)


def long_enough(waveform: np.ndarray | None) -> bool:
    """Whether there is at least one window of sound; less counts as no track."""
    return waveform is not None and len(waveform) >= WINDOW


def frame_shift(samples: int, fbank_frames: int) -> int:
    """Samples from one window to the next: whole, at least 1, about `fbank_frames` windows."""
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
    # Only the windows that are kept are made: at a shift of one sample there may be many more.
    windows = np.lib.stride_tricks.sliding_window_view(waveform, WINDOW)[::shift]
    windows = windows[: recipe.fbank_frames].astype(np.float64)

    # This also removes the mean of the whole waveform, which the reference does first.
    windows -= windows.mean(axis=1, keepdims=True)
    emphasised = windows.copy()
    emphasised[:, 1:] -= PREEMPHASIS * windows[:, :-1]
    emphasised[:, 0] *= 1 - PREEMPHASIS
    spectrum = np.fft.rfft(emphasised * np.hanning(WINDOW), FFT_LENGTH)
    power = spectrum.real**2 + spectrum.imag**2
    log_mel = np.log(np.maximum(power @ _mel_filters(recipe.mel_bins), LOG_FLOOR))

    padded = np.zeros((recipe.fbank_frames, recipe.mel_bins), np.float64)
    padded[: len(log_mel)] = log_mel
    return ((padded - MEAN) / (2 * DEVIATION)).astype(np.float32)


def silent(recipe: Recipe) -> np.ndarray:
    """What stands in for the filterbank of a clip without an audio track: float32 [T, M] zeros."""
    return np.zeros((recipe.fbank_frames, recipe.mel_bins), np.float32)


def _first_channel(
    resampler: av.AudioResampler | None, frame: av.AudioFrame | None
) -> list[np.ndarray]:
    """Resamples a frame, or what is left in the resampler (None); keeps the first channel."""
    if resampler is None:
        return []
    return [resampled.to_ndarray()[0] for resampled in resampler.resample(frame)]


@functools.cache
def _mel_filters(mel_bins: int) -> np.ndarray:
    """Triangular filters in Kaldi's Mel scale, float64 [FFT_LENGTH / 2 + 1, mel_bins]."""
    with warnings.catch_warnings():
        # 128 bins are so many that the lowest fall between two FFT bins: so they do in Kaldi.
        warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")
        return audio_utils.mel_filter_bank(
            num_frequency_bins=FFT_LENGTH // 2 + 1,
            num_mel_filters=mel_bins,
            min_frequency=LOW_HERTZ,
            max_frequency=SAMPLE_RATE / 2,
            sampling_rate=SAMPLE_RATE,
            mel_scale="kaldi",
            triangularize_in_mel_space=True,
        )
