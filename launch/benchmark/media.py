"""Makes the clips that reading and preparing are measured on."""

import csv
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np

from data_pipelines.datasets.types import Clip
from data_pipelines.modalities import audio

WIDTH, HEIGHT, FPS, SOUND_RATE = 320, 240, 25, 44100
SHOT_SECONDS = 5
# How many clips are made; the others are links to these files.
DISTINCT = 4
# The steepness of a picture's spectrum. This one gives H.264 files of about 400 kbit/s with x264's
# own settings, and JPEG frames of about 35 kB.
_STEEPNESS = 1.2
CAPTIONS = 20  # of each clip


def make_clip(path: pathlib.Path, seed: int, seconds: int, shot_seconds: int) -> pathlib.Path:
    """Writes an H.264 file with AAC sound, 320×240 at 25 frames a second, and a .wav beside it.

    Each shot pans over a picture whose spectrum falls like that of photographs, with a second
    picture that circles in it. The encoders use their default settings.
    """
    rng = np.random.default_rng([seed, shot_seconds])
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=Fraction(FPS))
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        sound = container.add_stream("aac", rate=SOUND_RATE, layout="stereo")
        for pixels in _pictures(rng, seconds * FPS, shot_seconds * FPS):
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        frame = av.AudioFrame.from_ndarray(_sound(rng, seconds), format="fltp", layout="stereo")
        frame.sample_rate = SOUND_RATE
        container.mux(sound.encode(frame))
        for stream in (video, sound):
            container.mux(stream.encode(None))
    _write_wav(path.with_suffix(".wav"), waveform(path))
    return path


def make_data_set(root: pathlib.Path, count: int, seconds: int) -> list[Clip]:
    """Makes a folder of videos with captions and transcripts, most of them links to a few."""
    root.mkdir()
    ids = [f"clip{number:05d}" for number in range(count)]
    for number, video_id in enumerate(ids):
        path = root / f"{video_id}.mp4"
        if number < DISTINCT:
            make_clip(path, number, seconds, SHOT_SECONDS)
            continue
        source = root / f"{ids[number % DISTINCT]}.mp4"
        try:
            os.link(source, path)
        except OSError:  # a file system without links
            shutil.copyfile(source, path)
    with (root / "captions.csv").open("w", newline="") as file:
        rows = [(i, f"caption {n} of {i}", "train") for i in ids for n in range(CAPTIONS)]
        csv.writer(file).writerows([("video_id", "caption", "split"), *rows])
    spoken = [{"key": f"{i}.mp4", "text": f"what is said in {i}"} for i in ids]
    (root / "asr.json").write_text(json.dumps(spoken))
    return [clip_of(video_id, str(root / f"{video_id}.mp4")) for video_id in ids]


def clip_of(video_id: str, video: str) -> Clip:
    return Clip(
        video_id=video_id,
        video=video,
        audio=None,
        captions=(),
        groups=(),
        teacher_video=None,
        teacher_audio=None,
    )


def _pictures(rng: np.random.Generator, count: int, shot: int) -> Iterator[np.ndarray]:
    for number in range(count):
        time_in_shot = number % shot
        if time_in_shot == 0:
            back, front = _texture(rng, 512), _texture(rng, 96)
            start, velocity = rng.uniform(0, 512, 2), rng.uniform(-1, 1, 2)
        y, x = (start + velocity * time_in_shot).astype(int)
        # The picture wraps around without a seam.
        pixels = back.take(np.arange(y, y + HEIGHT), 0, mode="wrap")
        pixels = pixels.take(np.arange(x, x + WIDTH), 1, mode="wrap")
        y = int(72 + 60 * np.sin(time_in_shot / 9))
        x = int(112 + 90 * np.cos(time_in_shot / 7))
        pixels[y : y + 96, x : x + 96] = front
        yield pixels


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Returns a random picture, uint8 [size, size, 3], with few details and similar hues."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = 1
    noise = np.fft.rfft2(rng.standard_normal((3, size, size)))
    light, red, blue = np.fft.irfft2(noise * frequency**-_STEEPNESS, s=(size, size))
    colours = np.stack([light + 0.2 * red, light, light + 0.2 * blue], axis=-1)
    colours = 120 + 50 * (colours - colours.mean()) / colours.std()
    return np.clip(colours, 0, 255).astype(np.uint8)


def _sound(rng: np.random.Generator, seconds: int) -> np.ndarray:
    time = np.arange(seconds * SOUND_RATE) / SOUND_RATE
    tones = 0.2 * np.sin(2 * np.pi * 220 * time) + 0.1 * np.sin(2 * np.pi * 1500 * time)
    noise = 0.05 * rng.standard_normal((2, len(time)))
    return np.ascontiguousarray(tones + noise, np.float32)


def waveform(path: str | os.PathLike) -> np.ndarray:
    waveform = audio.read_waveform(path)
    assert waveform is not None  # every file made here has sound
    return waveform


def _write_wav(path: pathlib.Path, waveform: np.ndarray) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=audio.SAMPLE_RATE, layout="mono")
        samples = np.round(np.clip(waveform, -1, 1) * (2**15 - 1)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = audio.SAMPLE_RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
