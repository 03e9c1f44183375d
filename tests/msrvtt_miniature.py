"""A miniature of MSR-VTT in the layout of its official release (spec section 10)."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import torch

from tests import media

CAPTIONS_PER_CLIP = 20  # of the official release; JSFusion's test list has one a clip
SIZE = (72, 96)
FPS = 8
SECONDS = 3

_THINGS = ("cat", "dog", "drummer", "chef", "singer", "car", "boat", "horse", "robot", "child")
_DOINGS = ("running", "cooking", "talking", "dancing", "turning", "falling", "singing")
_PLACES = ("kitchen", "street", "forest", "studio", "garden", "school", "river", "stadium")


def make(root: str | os.PathLike, n_train: int = 6, n_test: int = 4) -> None:
    """Makes annotations, videos, ASR texts and ImageBind vectors below `root`.

    For 9k and 7k-1ka, the clips are video0 … video{n_train − 1} to train on and the next n_test to
    test on. For 7k, the official split, every third of the n_train goes to its "validate".
    Every fourth clip has no audio track, no vector of it and no transcript; every third of the
    others has sound without speech.

    Args:
        root: the folder to fill; made if absent.
        n_train: clips to train on, at least 3.
        n_test: clips to test on.
    """
    root = Path(root)
    features = root / "FeatureData" / "ImageBind"
    for folder in ("Annotations", "VideoData", "AudioData"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for modality in ("VideoFeature", "AudioFeature"):
        (features / modality).mkdir(parents=True, exist_ok=True)

    ids = [f"video{number}" for number in range(n_train + n_test)]
    asr = []
    for number, video_id in enumerate(ids):
        rng = np.random.default_rng([7, number])
        silent = number % 4 == 3
        sound = None if silent else media.tone(SECONDS, 200 + 60 * number)[None]
        media.write_video(root / "VideoData" / f"{video_id}.mp4", _frames(rng), FPS, sound=sound)
        _save_vector(features / "VideoFeature" / f"{video_id}.pt", rng)
        if not silent:
            _save_vector(features / "AudioFeature" / f"{video_id}.pt", rng)
            speaks = number % 3 != 2
            asr.append({"key": f"{video_id}.mp4", "text": _caption(number, 0) if speaks else ""})
    (root / "msrvtt10k_asr_text.json").write_text(json.dumps(asr))
    _write_annotations(root / "Annotations", ids[:n_train], ids[n_train:])


def _write_annotations(folder: Path, train: list[str], test: list[str]) -> None:
    number_of = {video_id: number for number, video_id in enumerate(train + test)}
    split_of = dict.fromkeys(train, "train") | dict.fromkeys(train[2::3], "validate")
    split_of |= dict.fromkeys(test, "test")
    data = {
        "videos": [
            {"video_id": video_id, "category": 0, "split": split, "start time": 0.0}
            for video_id, split in split_of.items()
        ],
        "sentences": [
            {
                "video_id": video_id,
                "sen_id": number * CAPTIONS_PER_CLIP + i,
                "caption": _caption(number, i),
            }
            for video_id, number in number_of.items()
            for i in range(CAPTIONS_PER_CLIP)
        ],
    }
    (folder / "MSRVTT_data.json").write_text(json.dumps(data))
    for name, ids in (("9k", train), ("7k", train)):
        _write_csv(folder / f"MSRVTT_train.{name}.csv", ["video_id"], [[i] for i in ids])
    _write_csv(
        folder / "MSRVTT_JSFUSION_test.csv",
        ["key", "vid_key", "video_id", "sentence"],
        [[f"ret{n}", f"msr{i[5:]}", i, _caption(number_of[i], 3)] for n, i in enumerate(test)],
    )


def _write_csv(path: Path, columns: list[str], rows: list[list[str]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def _caption(number: int, i: int) -> str:
    thing = _THINGS[number % len(_THINGS)]
    doing = _DOINGS[(number + i) % len(_DOINGS)]
    place = _PLACES[(number // len(_THINGS) + i) % len(_PLACES)]
    return f"a {thing} is {doing} in the {place}"


def _frames(rng: np.random.Generator) -> list[np.ndarray]:
    """A square of one colour that drifts over another, a new pair for each clip."""
    back, front = rng.integers(0, 256, (2, 3))
    start = rng.integers(0, SIZE[0] - 24, 2)
    frames = []
    for t in range(FPS * SECONDS):
        frame = np.full((*SIZE, 3), back, np.uint8)
        y, x = start[0], (start[1] + t) % (SIZE[1] - 24)
        frame[y : y + 24, x : x + 24] = front
        frames.append(frame)
    return frames


def _save_vector(path: Path, rng: np.random.Generator) -> None:
    torch.save(torch.from_numpy(rng.standard_normal(1024).astype(np.float32)), path)
