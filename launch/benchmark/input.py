"""Measures reading prepared clips and preparing them against the reference's way.

Makes H.264 clips with AAC sound, prepares them as JPEG and raw, and measures

- reading: `train_batches` with frames, filterbank, texts and teacher vectors, against what the
  reference does each time it needs a clip: OpenCV, one seek per frame, PIL resize and crop, and the
  filterbank of a .wav (extracted beforehand, at no cost to the reference; the filterbank is our
  code, which needs no torchaudio);
- preparing: from a file to the arrays, and to the stored record, against the same; for clips of one
  shot and of shots of five seconds, because the more key frames there are, the less a seek costs;
- how preparing scales with processes, and how much memory reading takes.

"Per core" means per second of processor time of the process and its threads, on which other work on
the machine has little effect.
"""

import argparse
import contextlib
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.datasets.types import Clip
from data_pipelines.modalities import audio, record
from data_pipelines.modalities import video as video_files
from data_pipelines.preparation import prepare
from data_pipelines.recipe import Recipe
from launch.benchmark import media, processes
from save_jax.batch import MAX_WORDS
from save_jax.errors import UserError


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    parser.add_argument(
        "--clips", type=int, default=64, metavar="N", help="clips to prepare (default: 64)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=10,
        metavar="S",
        help="length of each measurement (default: 10)",
    )
    parser.add_argument(
        "--clip_seconds",
        type=int,
        default=15,
        metavar="S",
        help="length of each clip (default: 15)",
    )
    parser.add_argument(
        "--batch_size", type=int, default=32, metavar="N", help="clips per batch read (default: 32)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that prepare (default: one per processor)",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures everything, prints a table and a line of JSON; returns what the JSON says.

    Raises:
        UserError: a flag is out of range, or OpenCV is not installed.
    """
    _check(options)
    workers = options.workers or os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="save_jax-benchmark-") as folder:
        root = pathlib.Path(folder)
        print(f"Making clips of {options.clip_seconds} s and preparing {options.clips} of them.")
        long_shot = media.make_clip(root / "one.mp4", 0, options.clip_seconds, options.clip_seconds)
        clips = media.make_data_set(root / "clips", options.clips, options.clip_seconds)
        reading, preparing = {}, {}
        for encoding in ("jpeg", "raw"):
            out = root / encoding
            with contextlib.redirect_stdout(sys.stderr):
                prepare(
                    "folder",
                    root=str(root / "clips"),
                    out=str(out),
                    recipe=Recipe(encoding=encoding),
                    workers=workers,
                )
            reading[encoding] = processes.in_own_process(
                read_batches, str(out), options.batch_size, options.seconds
            )
        cut = [clip.video for clip in clips[: media.DISTINCT]]
        for shots, videos in (("one_shot", [str(long_shot)]), ("shots_of_5_s", cut)):
            preparing[shots] = {
                way.__name__: processes.in_own_process(_repeat, way, videos, options.seconds)
                for way in (reference, to_arrays, to_record)
            }
        one, all_workers = _prepare_with(clips, 1), _prepare_with(clips, workers)
    # The reference prepares nothing: it does this each time it needs a clip.
    reading["reference"] = preparing["shots_of_5_s"]["reference"]
    for group in (reading, *preparing.values()):
        for rate in group.values():
            rate["times_reference"] = rate["a_core"] / group["reference"]["a_core"]
    results = {
        "clip_seconds": options.clip_seconds,
        "batch_size": options.batch_size,
        "reading": reading,
        "preparing": preparing,
        "scaling": {"workers": workers, "one": one, "all": all_workers, "times": all_workers / one},
    }
    print(_table(results))
    print(json.dumps(results))
    return results


def reference(video: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns frames and filterbank of a clip, read in the reference's way.

    OpenCV decodes with one thread, which takes less processor time than its default.
    """
    cv2 = _opencv()
    capture = cv2.VideoCapture(video, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    fps = int(capture.get(cv2.CAP_PROP_FPS))
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    recipe = Recipe()
    frames = []
    for position in range(0, count, fps):
        capture.set(cv2.CAP_PROP_POS_FRAMES, position)
        there, pixels = capture.read()
        if not there:
            break
        image = Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
        frames.append(video_files.fit(image, recipe.image_size))
    capture.release()
    kept = [frames[i] for i in video_files.keep_evenly(len(frames), recipe.max_frames)]
    waveform = media.waveform(pathlib.Path(video).with_suffix(".wav"))
    return np.stack(kept), audio.fbank(waveform, recipe)


def to_arrays(video: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the same arrays as preparation makes them, with the sound from the video itself."""
    recipe = Recipe()
    frames = video_files.decode_frames(video, recipe)
    return frames, audio.fbank(media.waveform(video), recipe)


def to_record(video: str) -> record.Record:
    """Returns the record of a clip that is stored: the same arrays, with the frames as JPEG."""
    return record.read_record(media.clip_of("clip", video), Recipe())


def read_batches(data_dir: str, batch_size: int, seconds: float) -> dict[str, float]:
    """Reads batches for some seconds, in this process.

    Returns:
        What `_rate` returns, and this process's memory in MiB: `memory_before` reading and
        `memory_peak`.
    """
    from data_pipelines import input as pipeline
    from data_pipelines.splits import open_split
    from save_jax.tokenizer import Tokenizer

    before = processes.memory("VmRSS")
    split = open_split(data_dir, "folder", "default", "train", {})
    batches = pipeline.train_batches(
        split,
        batch_size=batch_size,
        seed=0,
        start_step=0,
        total_steps=10**9,
        max_words=MAX_WORDS,
        sound=True,
        speech=True,
        teacher=True,
        tokenizer=Tokenizer(),
    )
    for _ in range(4):  # the batches that are prefetched, so that as many are at the end
        next(batches)
    rate = _rate(lambda: next(batches), batch_size, seconds)
    return {**rate, "memory_before": before, "memory_peak": processes.memory("VmHWM")}


def _repeat(way: Callable[[str], Any], videos: list[str], seconds: float) -> dict[str, float]:
    """Returns the rate of `way` over these videos, repeated in this process."""
    way(videos[0])  # initialisation, which is done only once
    return _rate(lambda: [way(video) for video in videos], len(videos), seconds)


def _rate(step: Callable[[], Any], clips: int, seconds: float) -> dict[str, float]:
    """Repeats a step; returns its clips per second of wall time and of processor time."""
    done, wall, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds or not done:
        step()
        done += clips
    return {
        "a_second": done / (time.perf_counter() - wall),
        "a_core": done / (time.process_time() - cpu),
    }


def _prepare_with(clips: list[Clip], workers: int) -> float:
    """Returns the clips per second of several processes, from the first finished clip on."""
    found = record.read_records(clips, Recipe(), workers)
    next(found)
    start = time.perf_counter()
    return sum(1 for _ in found) / (time.perf_counter() - start)


def _table(results: dict[str, Any]) -> str:
    reading, preparing, scaling = (results[key] for key in ("reading", "preparing", "scaling"))
    seconds = results["clip_seconds"]
    lines = [f"{'':<46}{'clips/s/core':>15}{'ms/clip':>11}{'× reference':>13}"]

    def rows(title: str, group: dict[str, dict[str, float]], names: dict[str, str]) -> None:
        lines.append(title)
        for key, name in names.items():
            rate, times = group[key]["a_core"], group[key]["times_reference"]
            lines.append(f"  {name:<44}{rate:>15.1f}{1000 / rate:>11.1f}{times:>13.1f}")

    rows(
        f"Reading (12 frames of 224², filterbank, texts), batches of {results['batch_size']}",
        reading,
        {
            "jpeg": "train_batches from JPEG",
            "raw": "train_batches from raw frames",
            "reference": "the reference's way, from the video",
        },
    )
    shots = {"one_shot": "one shot", "shots_of_5_s": f"shots of {media.SHOT_SECONDS} s"}
    for key, words in shots.items():
        rows(
            f"Preparing a clip of {seconds} s, {media.HEIGHT}p, {words}",
            preparing[key],
            {
                "to_arrays": "frames and filterbank from the video",
                "to_record": "the same, and frames to JPEG",
                "reference": "the reference's way, the sound from a .wav",
            },
        )
    lines.append(
        f"Preparing: {scaling['one']:.1f} clips/s with 1 process, {scaling['all']:.1f} with "
        f"{scaling['workers']}: {scaling['times']:.2f} times"
    )
    for encoding in ("jpeg", "raw"):
        before, peak = (reading[encoding][f"memory_{when}"] for when in ("before", "peak"))
        lines.append(
            f"Memory while reading {encoding}: {peak:.0f} MiB at most, {before:.0f} MiB before"
        )
    return "\n".join(lines)


def _opencv():
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            "the reference's way needs OpenCV, which is not installed: "
            "pip install opencv-python-headless"
        ) from error
    return cv2


def _check(options: argparse.Namespace) -> None:
    _opencv()
    for flag, least in (("clips", 2), ("seconds", 0), ("clip_seconds", 1), ("batch_size", 1)):
        if getattr(options, flag) < least:
            raise UserError(
                f"--{flag}={getattr(options, flag)}: expected --{flag} of at least {least}"
            )
    if options.workers < 0:
        raise UserError(f"--workers={options.workers}: expected --workers of at least 0")
    if options.batch_size > options.clips * media.CAPTIONS:
        raise UserError(
            f"--batch_size={options.batch_size}: expected at most {media.CAPTIONS} for each of the "
            f"{options.clips} clips"
        )
