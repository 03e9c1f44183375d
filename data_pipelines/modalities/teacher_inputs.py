"""Makes the inputs of ImageBind, the teacher, from a clip (spec section 8).

The worker processes import this: nothing here depends on the model.
"""

import fractions
import logging
from typing import NamedTuple

import numpy as np

from data_pipelines import outages
from data_pipelines.datasets.types import Clip
from data_pipelines.modalities import audio, record, video
from data_pipelines.modalities.container import MediaError

_log = logging.getLogger(__name__)

FRAMES = 32
PIECES = 3  # of sound
PIECE_SECONDS = 2
SHIFT = 160  # samples: 10 ms
# ImageBind's normalisation: (x - mean) / standard deviation, where AST divides by twice that.
MEAN = -4.268
DEVIATION = 9.138


class Task(NamedTuple):
    """A clip and which inputs are wanted of it.

    Attributes:
        clip: the clip.
        video: whether its frames are wanted.
        audio: whether its sound is wanted.
    """

    clip: Clip
    video: bool
    audio: bool


class Sizes(NamedTuple):
    """The sizes of the teacher's inputs: square frames of `image_size`, fbanks of frames × bins."""

    image_size: int
    fbank_frames: int
    mel_bins: int


class Inputs(NamedTuple):
    """The result of a task.

    Attributes:
        clip: the clip.
        frames: uint8 [FRAMES, image_size, image_size, 3], or None.
        fbanks: float32 [PIECES, fbank_frames, mel_bins], or None.
        problem: why something that was wanted is None, in words; "" also if the clip merely has no
            sound.
    """

    clip: Clip
    frames: np.ndarray | None
    fbanks: np.ndarray | None
    problem: str


def read_inputs(task: Task, sizes: Sizes) -> Inputs:
    """Reads the teacher's inputs from a clip.

    A clip without sound gives nothing, not even frames: the only loss that uses the teacher leaves
    such clips out (spec section 6), so its vectors would never be used.

    Raises:
        UserError: a package that the clip's files need is not installed.
        OutageError: the machine or a store cannot read it now, through no fault of the clip.
    """
    clip, frames, fbanks = task.clip, None, None
    waveform, problems = record.read_waveform(clip)
    if not audio.long_enough(waveform):
        return Inputs(clip, None, None, "; ".join(problems))
    try:
        if task.video:
            frames = video.decode_evenly(clip.video, FRAMES, sizes.image_size)
        if task.audio:
            fbanks = sound(waveform, sizes)
    except MediaError as error:
        return Inputs(clip, None, None, f"{clip.video}: {error}")
    except Exception as error:
        outages.pass_on(error, clip.video)
        # One odd file among ten thousand must not end hours of work; it is named instead.
        _log.exception("clip %s: %s", clip.video_id, clip.video)
        return Inputs(clip, None, None, f"{clip.video}: unexpected {error!r}")
    return Inputs(clip, frames, fbanks, "")


def pieces(samples: int) -> list[tuple[int, int]]:
    """Returns where a waveform's first, middle and last pieces begin and end, in samples.

    Seconds are exact fractions of the rounded duration, cut to whole samples, as in pytorchvideo's
    ConstantClipsPerVideoSampler, which ImageBind uses. If the waveform is shorter than a piece,
    each piece is all of it.
    """
    last = fractions.Fraction(max(samples / audio.SAMPLE_RATE - PIECE_SECONDS, 0.0))
    starts = [last / (PIECES - 1) * n for n in range(PIECES)]
    return [
        (int(start * audio.SAMPLE_RATE), int((start + PIECE_SECONDS) * audio.SAMPLE_RATE))
        for start in starts
    ]


def sound(waveform: np.ndarray, sizes: Sizes) -> np.ndarray:
    """Computes the filterbanks of a waveform's pieces.

    Args:
        waveform: float32 [samples] at 16 kHz in [-1, 1], at least 400 samples.
        sizes: of a filterbank; a piece of two seconds has 198 frames, and zeros up to 204.

    Returns:
        float32 [PIECES, fbank_frames, mel_bins], normalised after padding.
    """
    log_mel = [
        audio.log_mel_windows(waveform[start:end], SHIFT, sizes.fbank_frames, sizes.mel_bins)
        for start, end in pieces(len(waveform))
    ]
    return ((np.stack(log_mel) - MEAN) / DEVIATION).astype(np.float32)


def crashed(task: Task) -> Inputs:
    """Returns the result of a task that crashed its process."""
    return Inputs(task.clip, None, None, f"{task.clip.video}: it crashes the decoder")
