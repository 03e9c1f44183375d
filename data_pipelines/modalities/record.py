"""Reads all of a clip's media into the arrays that are stored, many clips at a time.

Nothing here imports TensorFlow: this is what the worker processes import.
"""

import dataclasses
import functools
import logging
from collections.abc import Generator, Iterable
from typing import Any

import numpy as np

from data_pipelines import outages
from data_pipelines.datasets.types import Clip
from data_pipelines.modalities import audio, teacher_files, video
from data_pipelines.modalities.container import MediaError
from data_pipelines.pool import in_order
from data_pipelines.recipe import Recipe

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Record:
    """The result of reading one clip.

    Attributes:
        clip: the clip.
        features: the stored features by name, or None when the clip has no usable video.
        problems: what is wrong with its files, in words. A clip that merely has no audio track, no
            transcript or no teacher vectors has no problem.
    """

    clip: Clip
    features: dict[str, Any] | None
    problems: tuple[str, ...]


def read_records(clips: Iterable[Clip], recipe: Recipe, workers: int) -> Generator[Record]:
    """Yields one record per clip, in the order of `clips`.

    Args:
        clips: the clips.
        recipe: decides the stored arrays.
        workers: number of processes; 1 = this one. If a clip crashes its process (FFmpeg is C code,
            and files are odd), only that clip is lost.
    """
    read = functools.partial(read_record, recipe=recipe)
    return in_order(read, clips, workers, _crashed, lambda clip: clip.video)


def read_record(clip: Clip, recipe: Recipe) -> Record:
    """Reads all media of one clip.

    Raises:
        UserError: a package that the clip's files need is not installed.
        OutageError: the machine or a store cannot read it now, through no fault of the clip.
    """
    video_problems: list[str] = []

    def damaged(reason: str) -> None:
        video_problems.append(f"damaged: {clip.video}: {reason}")

    try:
        frames = video.decode_frames(clip.video, recipe, damaged)
    except MediaError as error:
        return Record(clip, None, (f"left out: {clip.video}: {error}",))
    except Exception as error:
        outages.pass_on(error, clip.video)
        # One odd file among ten thousand must not end hours of work; it is named instead.
        _log.exception("clip %s: %s", clip.video_id, clip.video)
        return Record(clip, None, (f"left out: {clip.video}: unexpected {error!r}",))
    waveform, audio_problems = read_waveform(clip)
    fbank = audio.fbank(waveform, recipe) if audio.long_enough(waveform) else None
    teacher, vector_problems = _read_vectors(clip, recipe)
    features = {
        "video_id": clip.video_id,
        "frames": [video.encode_frame(frame, recipe.encoding) for frame in frames],
        "num_frames": len(frames),
        "fbank": (audio.silent(recipe) if fbank is None else fbank).astype(np.float16),
        "has_audio": fbank is not None,
        "transcript": clip.transcript,
        "captions": list(clip.captions),
        "groups": list(clip.groups),
        "has_teacher": teacher is not None,
    }
    absent = np.zeros(recipe.teacher_size, np.float32)
    features["teacher_video"], features["teacher_audio"] = teacher or (absent, absent)
    return Record(clip, features, (*video_problems, *audio_problems, *vector_problems))


def read_waveform(clip: Clip) -> tuple[np.ndarray | None, list[str]]:
    """Reads a clip's sound from its audio file or, failing that, from its video.

    Returns:
        float32 [samples] at 16 kHz, or None without sound; and problems, in words.

    Raises:
        UserError, OutageError: as `read_record` does.
    """
    problems = []
    # If the video is a folder of images, it has no track of its own.
    own = None if outages.is_folder(clip.video) else clip.video
    for path in filter(None, (clip.audio, own)):

        def damaged(reason: str, path: str = path) -> None:
            problems.append(f"damaged: {path}: {reason}")

        try:
            return audio.read_waveform(path, damaged), problems
        except MediaError as error:
            problems.append(f"no audio from {path}: {error}")
        except Exception as error:
            outages.pass_on(error, path)
            _log.exception("clip %s: %s", clip.video_id, path)
            problems.append(f"no audio from {path}: unexpected {error!r}")
    return None, problems


def _read_vectors(
    clip: Clip, recipe: Recipe
) -> tuple[tuple[np.ndarray, np.ndarray] | None, list[str]]:
    """Reads the teacher's vectors of video and audio; None unless both are there and usable."""
    found, problems = [], []
    for path in filter(None, (clip.teacher_video, clip.teacher_audio)):
        try:
            found.append(teacher_files.read_vector(path, recipe.teacher_size))
        except teacher_files.VectorError as error:
            problems.append(f"no teacher from {path}: {error}")
    return (found[0], found[1]) if len(found) == 2 else None, problems


def _crashed(clip: Clip) -> Record:
    return Record(clip, None, (f"left out: {clip.video}: it crashes the decoder",))
