"""Makes the demo corpus: renders the planned clips to media files and writes the annotations.

Under its root:

    VideoData/ID.mp4                            H.264, and AAC unless the clip is silent
    captions.csv                                video_id,caption,group,split
    asr_text.json                               [{"key": "ID.mp4", "text": what is spoken}, ...]
    FeatureData/ImageBind/VideoFeature/ID.npy   float32 [1024], the teacher's vectors
    FeatureData/ImageBind/AudioFeature/ID.npy
    attributes.csv                              what each clip was made to show, sound like and say
    manifest.json                               generator version, seed and sizes: its identity
"""

import contextlib
import csv
import functools
import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import av
import numpy as np
from tqdm import tqdm

from data_pipelines.demo_corpus import scenes, sounds, speech, teacher
from data_pipelines.demo_corpus.plan import PlannedClip, clip_rng, plan
from data_pipelines.pool import in_order
from save_jax import files, locks
from save_jax.errors import UserError

# Raised whenever the generator would make other files from the same seed.
VERSION = 1

MANIFEST = "manifest.json"
VIDEOS = "VideoData"
VIDEO_FEATURES = os.path.join("FeatureData", "ImageBind", "VideoFeature")
AUDIO_FEATURES = os.path.join("FeatureData", "ImageBind", "AudioFeature")
CAPTIONS = "captions.csv"
ASR = "asr_text.json"
CAPTION_COLUMNS = ("video_id", "caption", "group", "split")
ATTRIBUTES = "attributes.csv"

_ATTRIBUTE_COLUMNS = (
    *("video_id", "split", "shape", "colour", "motion", "sound", "topic"),
    *("has_track", "has_transcript"),
)
_OTHER_PLACE = "Give another directory, or remove this one to make the corpus anew."
# What may precede the manifest: the lock, an interruption's leftover, preparation's default --out.
_EMPTY_ROOT = re.compile(rf"{re.escape(locks.LOCK)}|\.{re.escape(MANIFEST)}\..*tmp|prepared")
_SECONDS = (3.0, 4.0)  # shortest and longest clip
_LEVEL = 0.1  # root mean square of speech, or of a sound alone; full scale is 1
_SPEECH_OVER_SOUND_DB = (5.0, 11.0)  # how much louder speech is than the sound behind it


def generate(
    root: str | os.PathLike,
    seed: int = 0,
    workers: int = 0,
    n_train: int | None = None,
    n_test: int | None = None,
) -> None:
    """Makes the demo corpus under root, or what is still missing of it.

    The files depend on the seed and the sizes only, not on the number of workers nor on
    interruptions. Files get their names only once they are complete. Returns at once when the
    corpus is complete already; waits for another process that is making it.

    Args:
        root: the folder to fill; made if absent.
        seed: decides everything random.
        workers: processes to use; 0 = one for each CPU core.
        n_train: number of training clips. None = as many as the corpus begun in root has, or 600.
        n_test: number of test clips. None = as many as the corpus begun in root has, or 128.

    Raises:
        UserError: root holds something else, such as a corpus of another seed; or the speech
            synthesiser is missing.
        OutageError: the machine fails; the same call completes the corpus.
    """
    root = Path(root)
    identity, clips = _planned(root, seed, n_train, n_test)
    if (root / MANIFEST).exists() and not _absent_clips(root, clips) and not _unwritten(root):
        return
    with locks.hold(root, wait=True):
        # Again, since another process may have begun another corpus here.
        identity, clips = _planned(root, seed, n_train, n_test)
        _complete(root, identity, clips, workers or _cpu_cores())


def _planned(
    root: Path, seed: int, n_train: int | None, n_test: int | None
) -> tuple[dict[str, int], list[PlannedClip]]:
    """Returns the identity of the corpus that is wanted and its clips; arguments of `generate`."""
    begun = _read_manifest(root)
    n_train = begun.get("train", 600) if n_train is None else n_train
    n_test = begun.get("test", 128) if n_test is None else n_test
    identity = {"generator_version": VERSION, "seed": seed, "train": n_train, "test": n_test}
    _check_same(root, begun, identity)
    return identity, plan(seed, n_train, n_test)


def _complete(root: Path, identity: dict[str, int], clips: list[PlannedClip], workers: int) -> None:
    """Makes what is missing of a corpus that no other process writes to."""
    if not (root / MANIFEST).exists():  # first, so that root is recognised after an interruption
        files.write(root / MANIFEST, json.dumps(identity, indent=1) + "\n")
    for folder in ("", *_clip_files("")):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for left in (root / folder).glob(".*.tmp"):  # by processes that were killed
            left.unlink(missing_ok=True)

    todo = _absent_clips(root, clips)
    _render_all(root, identity["seed"], todo, workers)
    if todo or _unwritten(root):
        _write_annotations(root, clips)


def _absent_clips(root: Path, clips: list[PlannedClip]) -> list[PlannedClip]:
    absent = {Path(path).stem for path in absent_files(root, [clip.video_id for clip in clips])}
    return [clip for clip in clips if clip.video_id in absent]


def _unwritten(root: Path) -> bool:
    """Says whether annotations are missing."""
    return not all((root / name).exists() for name in (CAPTIONS, ASR, ATTRIBUTES))


def absent_files(root: str | os.PathLike, video_ids: Iterable[str]) -> list[str]:
    """Returns the paths of the clips' files that are missing under root."""
    root = Path(root)
    present = {folder: _complete_files(root / folder) for folder in _clip_files("")}
    return [
        str(root / folder / name)
        for video_id in video_ids
        for folder, name in _clip_files(video_id).items()
        if name not in present[folder]
    ]


def _clip_files(video_id: str) -> dict[str, str]:
    """Returns the name of a clip's file in each folder."""
    return {
        VIDEOS: f"{video_id}.mp4",
        VIDEO_FEATURES: f"{video_id}.npy",
        AUDIO_FEATURES: f"{video_id}.npy",
    }


def _complete_files(folder: Path) -> set[str]:
    """Returns the names of a folder's files, without empty ones that a crash may have left."""
    if not folder.is_dir():
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file() and entry.stat().st_size}


def _cpu_cores() -> int:
    """Returns how many CPU cores this process may use: in a container, fewer than there are."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _read_manifest(root: Path) -> dict[str, int]:
    """Reads the identity of the corpus begun in root; {} when root is absent or empty.

    Raises:
        UserError: root holds something else.
    """
    path = root / MANIFEST
    if path.exists():
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            manifest = None
        if not isinstance(manifest, dict) or "generator_version" not in manifest:
            raise UserError(
                f"{path}: expected a demo corpus's manifest, found another file. {_OTHER_PLACE}"
            )
        return manifest
    if root.exists() and not root.is_dir():
        raise UserError(f"{root}: expected a directory, found a file. {_OTHER_PLACE}")
    if root.exists() and not all(_EMPTY_ROOT.fullmatch(file.name) for file in root.iterdir()):
        raise UserError(
            f"{root}: expected a demo corpus or an empty directory, found other files and no"
            f" {MANIFEST}. {_OTHER_PLACE}"
        )
    return {}


def _check_same(root: Path, begun: dict[str, int], identity: dict[str, int]) -> None:
    """Raises UserError when the corpus begun in root is not the one wanted."""
    differing = [
        f"  {key}: wanted {wanted}, found {begun.get(key)}"
        for key, wanted in identity.items()
        if begun and begun.get(key) != wanted
    ]
    if differing:
        lines = "\n".join(differing)
        raise UserError(
            f"{root} holds a demo corpus made with other settings:\n{lines}\n{_OTHER_PLACE}"
        )


def _render_all(root: Path, seed: int, clips: list[PlannedClip], workers: int) -> None:
    """Renders clips in worker processes, with a progress bar."""
    render = functools.partial(_render, root, seed)
    progress = functools.partial(
        tqdm, total=len(clips), desc="making demo clips", unit="clip", disable=not clips
    )
    workers = max(min(workers, -(-len(clips) // 8)), 1)  # a process takes a while to start
    with contextlib.closing(in_order(render, clips, workers, _crashed, _name)) as rendered:
        for _ in progress(rendered):
            pass


def _name(clip: PlannedClip) -> str:
    return f"the demo's clip {clip.video_id}"


def _crashed(clip: PlannedClip) -> NoReturn:
    raise RuntimeError(f"{_name(clip)}: making it crashes its process")


def _render(root: Path, seed: int, clip: PlannedClip) -> None:
    """Makes the files of one clip, the video last."""
    for folder, vector in (
        (VIDEO_FEATURES, teacher.video_vector(seed, clip)),
        (AUDIO_FEATURES, teacher.audio_vector(seed, clip)),
    ):
        buffer = io.BytesIO()
        np.save(buffer, vector)
        # Without fsync, for speed: a file that a power cut leaves empty counts as absent.
        files.write(root / folder / f"{clip.video_id}.npy", buffer.getvalue(), fsync=False)
    rng = clip_rng(seed, clip, purpose=1)
    num_frames, wave = _audio(rng, clip)
    frames = scenes.draw(rng, clip.shape, clip.colour, clip.motion, num_frames)
    buffer = io.BytesIO()
    _encode(buffer, frames, wave)
    files.write(root / VIDEOS / f"{clip.video_id}.mp4", buffer.getvalue(), fsync=False)


def _audio(rng: np.random.Generator, clip: PlannedClip) -> tuple[int, np.ndarray | None]:
    """Makes the sound of a clip, which decides the clip's length.

    Returns:
        The number of video frames, and float32 [samples] in [-1, 1] at sounds.RATE, of the same
        duration; None when the clip has no audio track.
    """
    seconds = rng.uniform(*_SECONDS)
    voice = np.zeros(0, np.float32)
    if clip.script:
        voice = _voice(rng, clip.script)
        seconds = max(_SECONDS[0], len(voice) / sounds.RATE + rng.uniform(0.3, 0.5))
    num_frames = min(int(np.ceil(seconds * scenes.FPS)), int(_SECONDS[1] * scenes.FPS))
    if not clip.has_track:
        return num_frames, None

    n = round(num_frames * sounds.RATE / scenes.FPS)
    wave = np.zeros(n, np.float32)
    level = _LEVEL * rng.uniform(0.7, 1.3)
    if clip.script:
        start = int(rng.uniform(0.2, 0.8) * (n - len(voice)))
        wave[start : start + len(voice)] += level * voice / np.sqrt(np.mean(voice**2))
        level *= 10 ** (-rng.uniform(*_SPEECH_OVER_SOUND_DB) / 20)
    if clip.sound:
        fade = np.minimum(1, np.minimum(np.arange(n), np.arange(n)[::-1]) / (0.02 * sounds.RATE))
        wave += (level * fade * sounds.synthesise(rng, clip.sound, n)).astype(np.float32)
    return num_frames, wave * min(1, 0.95 / np.abs(wave).max())


def _voice(rng: np.random.Generator, script: str) -> np.ndarray:
    """Speaks a script, faster if it would not fit into the longest clip."""
    name = str(rng.choice(speech.VOICES))
    rate, pitch = int(rng.integers(150, 173)), int(rng.integers(30, 61))
    brightness = rng.uniform(0.3, 0.8)
    longest = int((_SECONDS[1] - 0.3) * sounds.RATE)
    voice = speech.speak(script, name, rate, pitch, brightness)
    while len(voice) > longest:
        rate = max(rate + 3, int(rate * len(voice) / longest))
        voice = speech.speak(script, name, rate, pitch, brightness)
    return voice


def _encode(file: io.BytesIO, frames: np.ndarray, wave: np.ndarray | None) -> None:
    """Writes an .mp4 file, the same bytes for the same input.

    Args:
        file: where to write.
        frames: uint8 [frames, height, width, 3], RGB, at scenes.FPS.
        wave: float32 [samples] in [-1, 1] at sounds.RATE, mono; None = no audio track.
    """
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        video = container.add_stream("libx264", rate=scenes.FPS)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        # The slower presets' look-ahead gives other bytes from one run to the next.
        video.options = {"crf": "20", "preset": "superfast"}
        video.thread_count = 1
        audio = None
        if wave is not None:
            audio = container.add_stream("aac", rate=sounds.RATE, layout="mono")
            audio.bit_rate = 64000
        for pixels in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode(None))
        if audio is not None and wave is not None:
            size = 1024  # samples in a frame of AAC
            for start in range(0, len(wave), size):
                samples = np.ascontiguousarray(wave[None, start : start + size], np.float32)
                frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
                frame.sample_rate, frame.pts = sounds.RATE, start
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))


def _write_annotations(root: Path, clips: list[PlannedClip]) -> None:
    asr = [{"key": f"{c.video_id}.mp4", "text": c.script} for c in clips if c.has_transcript]
    files.write(root / ASR, json.dumps(asr, indent=0) + "\n")
    _write_csv(
        root / ATTRIBUTES,
        _ATTRIBUTE_COLUMNS,
        [tuple(getattr(clip, column) for column in _ATTRIBUTE_COLUMNS) for clip in clips],
    )
    _write_csv(
        root / CAPTIONS,
        CAPTION_COLUMNS,
        [(c.video_id, text, group, c.split) for c in clips for group, text in c.captions],
    )


def _write_csv(path: Path, columns: Sequence[str], rows: list[tuple]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([columns, *rows])
    files.write(path, text.getvalue())
