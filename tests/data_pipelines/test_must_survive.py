"""One folder of everything that files can be: each bad one is named, every other clip is intact."""

import csv
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from data_pipelines.preparation import prepare
from data_pipelines.recipe import Recipe
from save_jax.errors import UserError
from tests.data_pipelines.conftest import SMALL
from tests.support import media as synthetic

RECIPE = Recipe(encoding="raw", **SMALL)
FRAMES = synthetic.numbered_frames(30)
SOUND = synthetic.tone(3)[None]


def _write(path, **options):
    synthetic.write_video(path, options.pop("frames", FRAMES), **options)


def _cut(path, part, **options):
    _write(path, **options)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])


def _half_and_half(height, width):
    pixels = np.full((height, width, 3), 60, np.uint8)
    pixels[:, : (width + 1) // 2] = 200
    return [pixels] * 30


def _layout(layout, channels, rate):
    sound = np.stack([synthetic.tone(3, 440 + 500 * n, rate) for n in range(channels)])
    return lambda path: _write(path, sound=sound, sound_rate=rate, sound_layout=layout)


def _vectors(audio):
    """A video with a teacher's vectors, that of the sound being `audio`."""

    def make(path):
        _write(path, sound=SOUND)
        for folder, vector in (("VideoFeature", np.ones(1024)), ("AudioFeature", audio)):
            where = path.parent / "FeatureData" / "ImageBind" / folder
            where.mkdir(parents=True, exist_ok=True)
            if vector is not None:
                np.save(where / f"{path.stem}.npy", vector.astype(np.float32))

    return make


def _with_wav(content):
    def make(path):
        _write(path, sound=SOUND)
        (path.parent / "AudioData").mkdir(exist_ok=True)
        (path.parent / "AudioData" / f"{path.stem}.wav").write_bytes(content)

    return make


# Clips that cannot be used: the file's name, what makes it, what is said of it.
LEFT_OUT = {
    "zero bytes.mp4": (lambda path: path.write_bytes(b""), "the file is empty"),
    "text.mp4": (lambda path: path.write_text("not a video\n" * 99), "FFmpeg"),
    "truncated.mp4": (lambda path: _cut(path, 0.6), "not complete"),
    "no picture.mp4": (lambda path: _write(path, frames=[], codec="", sound=SOUND), "no video tr"),
}
# Clips of which something cannot be used.
DAMAGED = {
    "cut.mkv": (lambda path: _cut(path, 0.6, codec="libx264"), "video track breaks off"),
    "nan vector.mp4": (_vectors(np.full(1024, np.nan)), "not finite"),
    "short vector.mp4": (_vectors(np.ones(512)), "[512]"),
    "bad wav.mp4": (_with_wav(b""), "the file is empty"),
}
# Clips that are odd, and as good as any: the number of frames, and whether they have sound.
FINE = {
    "plain.mp4": (lambda path: _write(path, sound=SOUND), 3, True),
    "silent.mp4": (_write, 3, False),
    "long sound.mp4": (lambda path: _write(path, sound=synthetic.tone(6)[None]), 3, True),
    "short sound.mp4": (lambda path: _write(path, sound=synthetic.tone(0.5)[None]), 3, True),
    # 30 frames in 4.2 s are 7 a second.
    "variable.mp4": (
        lambda path: _write(path, codec="libx264", times=[*range(15), *range(15, 45, 2)]),
        4,
        False,
    ),
    "turned.mp4": (lambda path: _write(path, clockwise=90), 3, False),
    "odd size.mkv": (
        lambda path: _write(path, frames=_half_and_half(63, 65), codec="ffv1"),
        3,
        False,
    ),
    "strip.mkv": (
        lambda path: _write(
            path, frames=_half_and_half(1, 64), codec="libx264", pixel_format="yuv444p"
        ),
        3,
        False,
    ),
    "ten bits.mp4": (
        lambda path: _write(path, codec="libx264", pixel_format="yuv420p10le"),
        3,
        False,
    ),
    "full colour.mp4": (
        lambda path: _write(path, codec="libx264", pixel_format="yuv444p"),
        3,
        False,
    ),
    "mono 8 kHz.mp4": (_layout("mono", 1, 8000), 3, True),
    "stereo 22.05 kHz.mp4": (_layout("stereo", 2, 22050), 3, True),
    "surround 44.1 kHz.mp4": (_layout("5.1", 6, 44100), 3, True),
    "stereo 48 kHz.webm": (
        lambda path: _write(
            path, codec="libvpx", sound=np.stack([synthetic.tone(3, 440, 48000)] * 2),
            sound_rate=48000, sound_layout="stereo",
        ),
        3,
        True,
    ),
    "with teacher.mp4": (_vectors(np.ones(1024)), 3, True),
    "no sound vector.mp4": (_vectors(None), 3, True),
    "it's \"quoted\", naïve 動画.mp4": (lambda path: _write(path, sound=SOUND), 3, True),
}  # fmt: skip
# Whose picture is that of "plain", up to compression.
LIKE_PLAIN = [
    name
    for name in FINE
    if not name.startswith(("variable", "turned", "odd", "strip")) and name != "plain.mp4"
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder with all of these. Not to be written to."""
    root = tmp_path_factory.mktemp("everything")
    for name, (make, *_) in (LEFT_OUT | DAMAGED | FINE).items():
        make(root / name)
    (root / "asr.json").write_text("[]")
    return root


def _id(name):
    return name.rpartition(".")[0]


def test_every_bad_file_is_named_and_every_other_clip_intact(root, tmp_path):
    directory = prepare("folder", root=str(root), out=str(tmp_path), recipe=RECIPE, workers=1)
    with open(directory / "problems.csv", encoding="utf-8", newline="") as file:
        problems = {row["video_id"]: row["problem"] for row in csv.DictReader(file)}
    bad = LEFT_OUT | DAMAGED
    # Missing captions of a folder's clips are no problem; that is all that may be listed besides.
    assert set(problems) == {_id(name) for name in bad}
    for name, (_, words) in bad.items():
        assert words in problems[_id(name)], name
        assert _id(name) in problems[_id(name)].replace(str(root), "")
    counts = json.loads((directory / "metadata.json").read_text())["counts"]["test"]
    assert counts["listed"] == len(bad) + len(FINE)
    assert counts["left out"] == len(LEFT_OUT)
    assert counts["prepared"] == len(DAMAGED) + len(FINE)
    assert counts["problems"] >= len(bad)

    records = tfds.builder_from_directory(directory).as_data_source("test")
    clips = {record["video_id"].decode(): record for record in records}
    assert set(clips) == {_id(name) for name in DAMAGED | FINE}
    plain = _frames(clips["plain"])
    for name, (_, num_frames, has_audio) in FINE.items():
        clip = clips[_id(name)]
        assert (clip["num_frames"], bool(clip["has_audio"])) == (num_frames, has_audio), name
        assert clip["fbank"].any() == has_audio, name
        assert _frames(clip).std() > 20, name
        assert bool(clip["has_teacher"]) == (name == "with teacher.mp4"), name
    for name in LIKE_PLAIN:
        assert np.abs(_frames(clips[_id(name)]) - plain).mean() < 8, name
    for name in DAMAGED:
        assert not clips[_id(name)]["has_teacher"]
    assert clips["bad wav"]["has_audio"]  # from the video's own track


@pytest.mark.parametrize("name", [*LEFT_OUT, *DAMAGED])
def test_with_strict_each_of_them_is_an_error(tmp_path, name):
    (tmp_path / "root").mkdir()
    (LEFT_OUT | DAMAGED)[name][0](tmp_path / "root" / name)
    (tmp_path / "root" / "asr.json").write_text("[]")
    with pytest.raises(UserError) as caught:
        prepare(
            "folder",
            root=str(tmp_path / "root"),
            out=str(tmp_path / "out"),
            recipe=RECIPE,
            workers=1,
            strict=True,
        )
    assert _id(name) in str(caught.value)


def test_images_in_place_of_a_video(root, tmp_path):
    """Charades' way: see test_charades for its layout; here, one image of three is damaged."""
    from data_pipelines.datasets.types import Clip
    from data_pipelines.modalities import record as records

    folder = tmp_path / "images"
    folder.mkdir()
    for number, pixels in enumerate(FRAMES[:3]):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "1.png").write_bytes(b"")
    clip = Clip(
        video_id="a",
        video=str(folder),
        audio=None,
        captions=(),
        groups=(),
        teacher_video=None,
        teacher_audio=None,
    )
    record = records.read_record(clip, RECIPE)
    assert record.features["num_frames"] == 2 and not record.features["has_audio"]
    assert len(record.problems) == 1 and f"{folder}: 1.png is not" in record.problems[0]


def _frames(clip):
    shape = (-1, RECIPE.image_size, RECIPE.image_size, 3)
    return np.frombuffer(b"".join(clip["frames"]), np.uint8).reshape(shape).astype(int)
