"""Reads all of a clip's media into the arrays that are stored, many clips at a time.

Nothing here imports TensorFlow: this is what the worker processes import.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import logging
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from data_pipelines import affinities, audio, media
from data_pipelines.datasets.clip import Clip
from data_pipelines.recipe import Recipe

_log = logging.getLogger(__name__)

# Clips given out ahead of the one whose turn it is, per worker: a long clip must not leave the
# other workers idle, nor may finished clips pile up in memory behind it.
_AHEAD = 4


@dataclasses.dataclass(frozen=True)
class Record:
    """What came of one clip.

    Attributes:
        clip: the clip.
        features: the stored features by name, or None when the clip has no usable video.
        problems: what is wrong with its files, in words. A clip that merely has no audio track, no
            transcript or no teacher's vectors has no problem.
    """

    clip: Clip
    features: dict[str, Any] | None
    problems: tuple[str, ...]


def read_records(clips: Iterable[Clip], recipe: Recipe, workers: int) -> Iterator[Record]:
    """Yields a record a clip, in the order of `clips`.

    Args:
        clips: the clips.
        recipe: what to make of their media.
        workers: processes to do it in; 1 = this one. Should a clip crash its process (FFmpeg is
            C code, and files are odd), that clip alone is lost.
    """
    if workers == 1:
        yield from (read_record(clip, recipe) for clip in clips)
        return
    waiting = iter(clips)
    under_way: collections.deque[tuple[Clip, concurrent.futures.Future[Record]]]
    under_way = collections.deque()
    pool = _pool(workers)
    try:
        while True:
            for clip in itertools.islice(waiting, _AHEAD * workers - len(under_way)):
                under_way.append((clip, pool.submit(read_record, clip, recipe)))
            if not under_way:
                return
            clip, future = under_way.popleft()
            try:
                record = future.result()
            except BrokenProcessPool:
                # One of the clips under way did it. The one whose turn it is gets a process of its
                # own, which tells; the others start again.
                record = _read_alone(clip, recipe)
                pool.shutdown()
                pool = _pool(workers)
                under_way = collections.deque(
                    (clip, pool.submit(read_record, clip, recipe)) for clip, _ in under_way
                )
            yield record
    finally:
        pool.shutdown(cancel_futures=True)


def read_record(clip: Clip, recipe: Recipe) -> Record:
    """Reads all media of one clip.

    Raises:
        UserError: this installation cannot read what the clip consists of.
    """
    try:
        frames = media.decode_frames(clip.video, recipe)
    except media.MediaError as error:
        return Record(clip, None, (f"left out: {clip.video}: {error}",))
    except Exception as error:
        # One odd file among ten thousand must not end hours of work; it is named instead.
        _log.exception("clip %s: %s", clip.video_id, clip.video)
        return Record(clip, None, (f"left out: {clip.video}: unexpected {error!r}",))
    waveform, audio_problems = _read_waveform(clip)
    has_audio = audio.long_enough(waveform)
    fbank = audio.fbank(waveform, recipe) if has_audio else audio.silent(recipe)
    vectors, vector_problems = _read_vectors(clip, recipe)
    features = {
        "video_id": clip.video_id,
        "frames": [media.encode_frame(frame, recipe.encoding) for frame in frames],
        "num_frames": len(frames),
        "fbank": fbank.astype(np.float16),
        "has_audio": has_audio,
        "transcript": clip.transcript,
        "captions": list(clip.captions),
        "groups": list(clip.groups),
        "has_teacher": vectors is not None,
    }
    absent = np.zeros(recipe.teacher_size, np.float32)
    features["teacher_video"], features["teacher_audio"] = vectors or (absent, absent)
    return Record(clip, features, (*audio_problems, *vector_problems))


def _read_waveform(clip: Clip) -> tuple[np.ndarray | None, list[str]]:
    """The clip's sound from its own audio file or, failing that, from its video."""
    problems = []
    for path in filter(None, (clip.audio, clip.video)):
        try:
            return audio.read_waveform(path), problems
        except media.MediaError as error:
            problems.append(f"no audio from {path}: {error}")
        except Exception as error:
            _log.exception("clip %s: %s", clip.video_id, path)
            problems.append(f"no audio from {path}: unexpected {error!r}")
    return None, problems


def _read_vectors(
    clip: Clip, recipe: Recipe
) -> tuple[tuple[np.ndarray, np.ndarray] | None, list[str]]:
    """The teacher's vectors of video and audio, or None unless both are there and usable."""
    vectors, problems = [], []
    for path in filter(None, (clip.teacher_video, clip.teacher_audio)):
        try:
            vectors.append(affinities.read_vector(path, recipe.teacher_size))
        except affinities.VectorError as error:
            problems.append(f"no teacher from {path}: {error}")
    return (vectors[0], vectors[1]) if len(vectors) == 2 else None, problems


def _read_alone(clip: Clip, recipe: Recipe) -> Record:
    try:
        with _pool(1) as pool:
            return pool.submit(read_record, clip, recipe).result()
    except BrokenProcessPool:
        return Record(clip, None, (f"left out: {clip.video}: it crashes the decoder",))


def _pool(workers: int) -> concurrent.futures.ProcessPoolExecutor:
    # Spawned, not forked: the parent has TensorFlow's threads, which do not survive a fork.
    return concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn")
    )
