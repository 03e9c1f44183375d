"""Miniatures of all data sets' layouts, with real media (spec section 10)."""

import csv
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.support import media

CAPTIONS_PER_CLIP = 20  # of MSR-VTT's official release; JSFusion's test list has one a clip
SIZE = (72, 96)
FPS = 8
SECONDS = 3

_THINGS = ("cat", "dog", "drummer", "chef", "singer", "car", "boat", "horse", "robot", "child")
_DOINGS = ("running", "cooking", "talking", "dancing", "turning", "falling", "singing")
_PLACES = ("kitchen", "street", "forest", "studio", "garden", "school", "river", "stadium")


def caption(number: int, i: int) -> str:
    """The i-th caption of clip `number`."""
    thing = _THINGS[number % len(_THINGS)]
    doing = _DOINGS[(number + i) % len(_DOINGS)]
    place = _PLACES[(number // len(_THINGS) + i) % len(_PLACES)]
    return f"a {thing} is {doing} in the {place}"


def msrvtt(root: str | os.PathLike, n_train: int = 6, n_test: int = 4) -> None:
    """MSR-VTT: annotations, videos, ASR texts and ImageBind vectors.

    For 9k and 7k-1ka, the clips are video0 … video{n_train − 1} to train on and the next n_test to
    test on. For 7k, the official split, every third of the n_train goes to its "validate".

    Args:
        root: the folder to fill; made if absent.
        n_train: clips to train on, at least 3.
        n_test: clips to test on.
    """
    root = Path(root)
    ids = [f"video{number}" for number in range(n_train + n_test)]
    train, test = ids[:n_train], ids[n_train:]
    asr = _write_media(root, ids)
    _write_json(root / "msrvtt10k_asr_text.json", asr)
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
                "caption": caption(number, i),
            }
            for number, video_id in enumerate(ids)
            for i in range(CAPTIONS_PER_CLIP)
        ],
    }
    folder = root / "Annotations"
    _write_json(folder / "MSRVTT_data.json", data)
    for name in ("9k", "7k"):
        _write_csv(folder / f"MSRVTT_train.{name}.csv", ["video_id"], [[i] for i in train])
    _write_csv(
        folder / "MSRVTT_JSFUSION_test.csv",
        ["key", "vid_key", "video_id", "sentence"],
        [[f"ret{n}", f"msr{i[5:]}", i, caption(n_train + n, 3)] for n, i in enumerate(test)],
    )


def vatex(root: str | os.PathLike) -> None:
    """VATEX: 4 clips to train on, 2 of "val" and 2 of "test", 3 captions each; one is WebM."""
    root = Path(root)
    ids = [f"-clip_{number}_000010_000020" for number in range(8)]
    asr = _write_media(root, ids, endings={ids[1]: ".webm"})
    folder = root / "Annotations"
    _write_json(folder / "vatex_asr_text.json", asr)
    for split, its in (("train", ids[:4]), ("val", ids[4:6]), ("test", ids[6:])):
        (folder / f"{split}_list.txt").write_text("".join(f"{video_id}\n" for video_id in its))
    _write_json(
        folder / "ref_captions.json",
        {video_id: [caption(n, i) for i in range(3)] for n, video_id in enumerate(ids)},
    )


def charades(root: str | os.PathLike) -> None:
    """Charades: 4 clips to train on and 2 to test on.

    The first three have their frames as images, the first of them without a video and with its
    sound in a .wav, the second with a video, which has the sound.
    """
    root = Path(root)
    ids = ["46GP8", "N11GT", "0IH69", "KRF68", "MJO7C", "015XE"]
    asr = _write_media(root, ids)
    for number, video_id in enumerate(ids[:3]):
        folder = root / "ImageData" / video_id
        folder.mkdir(parents=True)
        for n, frame in enumerate(_frames(number)[:: FPS // 2]):
            Image.fromarray(frame).save(folder / f"{video_id}-{n:06d}.jpg")
    (root / "VideoData" / f"{ids[0]}.mp4").unlink()
    media.write_wav(root / "AudioData" / f"{ids[0]}.wav", media.tone(SECONDS, 200)[None])
    _write_json(root / "charades_vad_text.json", asr)
    for split, numbers in (("train", range(4)), ("test", range(4, 6))):
        _write_csv(
            root / "Annotations" / f"Charades_v1_{split}.csv",
            ["id", "subject", "script", "actions", "length"],
            [[ids[n], "X", f"{caption(n, 0)}, then leaves.", "c1 0 1", "3.0"] for n in numbers],
        )


def lsmdc(root: str | os.PathLike) -> None:
    """LSMDC: 3 clips to train on, one with two captions, 2 of "val" and 2 of "test".

    They are clips of two films, a sub-folder each, in AVI files, as they come.
    """
    root = Path(root)
    films = ["0001_A_Film", "1002_Another_Film"]
    ids = [f"{films[n % 2]}_00.00.5{n}.926-00.00.5{n + 3}.129" for n in range(7)]
    asr = _write_media(root, ids, endings=dict.fromkeys(ids, ".avi"))
    for number, video_id in enumerate(ids):
        (root / "VideoData" / films[number % 2]).mkdir(exist_ok=True)
        path = root / "VideoData" / f"{video_id}.avi"
        path.rename(root / "VideoData" / films[number % 2] / path.name)
    _write_json(root / "lsmdc_asr_text.json", asr)
    files = {
        "annos_training": [0, 1, 2, 0],
        "annos_val": [3, 4],
        "challenge_1000_publictect": [5, 6],
    }
    for name, numbers in files.items():
        lines = [
            [ids[n], *ids[n].rpartition("_")[2].split("-") * 2, f'SOMEONE says "{caption(n, i)}.']
            for i, n in enumerate(numbers)
        ]
        path = root / "Annotations" / f"LSMDC16_{name}.csv"
        path.write_text("".join("\t".join(line) + "\n" for line in lines))


def folder(root: str | os.PathLike, captions: bool = True) -> None:
    """Someone's own videos: 4 to train on, 2 to test on, one that is in no list.

    They are in sub-folders, their names are not plain, and so are their endings.

    Args:
        root: the folder to fill; made if absent.
        captions: whether to write captions.csv.
    """
    root = Path(root)
    ids = ["a/one", 'a/it\'s "two", 2', "b c/три", "b c/四", "five", "a/deep/six", "unlisted"]
    endings = dict(zip(ids, (".mp4", ".MP4", ".mkv", ".m4v", ".mov", ".avi", ".webm"), strict=True))
    asr = _write_media(root, ids, videos=root, endings=endings)
    _write_json(root / "asr.json", asr)
    if captions:
        _write_csv(
            root / "captions.csv",
            ["video_id", "caption", "group", "split"],
            [
                [video_id, caption(n, i), "vision" if i else "", "train" if n < 4 else "test"]
                for n, video_id in enumerate(ids[:6])
                for i in range(2)
            ],
        )


def _write_media(
    root: Path,
    ids: Sequence[str],
    *,
    videos: Path | None = None,
    endings: dict[str, str] | None = None,
) -> list[dict[str, str]]:
    """Writes videos and the teacher's vectors; returns what an ASR file says of them.

    Every fourth clip has no audio track, no vector of it and no transcript; every third of the
    others has sound without speech.

    Args:
        root: the data set's folder.
        ids: its clips.
        videos: the folder of its videos; VideoData by default.
        endings: those of the videos, by id; .mp4 where there is none.
    """
    videos = videos or root / "VideoData"
    features = root / "FeatureData" / "ImageBind"
    for name in ("Annotations", "AudioData"):
        (root / name).mkdir(parents=True, exist_ok=True)
    asr = []
    for number, video_id in enumerate(ids):
        silent = number % 4 == 3
        ending = (endings or {}).get(video_id, ".mp4")
        path = videos / f"{video_id}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        media.write_video(
            path,
            _frames(number),
            FPS,
            codec="libvpx" if ending == ".webm" else "mpeg4",
            sound=None if silent else media.tone(SECONDS, 200 + 60 * number)[None],
        )
        _save_vector(features / "VideoFeature" / f"{video_id}.pt", [8, number])
        if not silent:
            _save_vector(features / "AudioFeature" / f"{video_id}.pt", [9, number])
            speaks = number % 3 != 2
            asr.append({"key": f"{video_id}.mp4", "text": caption(number, 0) if speaks else ""})
    return asr


def _frames(number: int) -> list[np.ndarray]:
    """A square of one colour that drifts over another, a new pair for each clip."""
    rng = np.random.default_rng([7, number])
    back, front = rng.integers(0, 256, (2, 3))
    start = rng.integers(0, SIZE[0] - 24, 2)
    frames = []
    for t in range(FPS * SECONDS):
        frame = np.full((*SIZE, 3), back, np.uint8)
        y, x = start[0], (start[1] + t) % (SIZE[1] - 24)
        frame[y : y + 24, x : x + 24] = front
        frames.append(frame)
    return frames


def _save_vector(path: Path, seed: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    vector = np.random.default_rng(seed).standard_normal(1024).astype(np.float32)
    torch.save(torch.from_numpy(vector), path)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def _write_csv(path: Path, columns: list[str], rows: Iterable[list[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
