import io
import os
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from data_pipelines.modalities import audio
from data_pipelines.modalities import video as video_files
from data_pipelines.modalities.container import MediaError
from data_pipelines.recipe import Recipe
from save_jax.errors import UserError
from tests.support import media as synthetic
from tests.support import object_store

SMALL = Recipe(image_size=32)


@pytest.mark.parametrize(
    ("fps", "count", "expected"),
    [
        (24, 100, [0, 24, 48, 72, 96]),
        (25, 76, [0, 25, 50, 75]),
        (25, 75, [0, 25, 50]),
        (Fraction(30000, 1001), 90, [0, 29, 58, 87]),
        (30, 90, [0, 30, 60]),
        (60, 121, [0, 60, 120]),
        (Fraction(25, 2), 30, [0, 12, 24]),
        (1, 3, [0, 1, 2]),
        (Fraction(1, 2), 3, [0, 1, 2]),  # less than one a second: every frame
        (10, 1, [0]),
    ],
)
def test_one_frame_a_second(tmp_path, fps, count, expected):
    path = synthetic.write_video(tmp_path / "a.mp4", synthetic.numbered_frames(count), fps)
    frames = video_files.decode_frames(path, SMALL)
    assert frames.dtype == np.uint8
    assert frames.shape == (len(expected), 32, 32, 3)
    assert [synthetic.number_of(frame) for frame in frames] == expected


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.webm", "libvpx")])
def test_frames_are_counted_in_the_order_they_are_shown(tmp_path, name, codec):
    frames = synthetic.numbered_frames(45)
    path = synthetic.write_video(tmp_path / name, frames, 10, codec=codec)
    found = [synthetic.number_of(frame) for frame in video_files.decode_frames(path, SMALL)]
    assert found == [0, 10, 20, 30, 40]


def test_of_too_many_frames_evenly_spaced_ones_are_kept(tmp_path):
    path = synthetic.write_video(tmp_path / "a.mp4", synthetic.numbered_frames(40), 2)
    found = [synthetic.number_of(frame) for frame in video_files.decode_frames(path, SMALL)]
    # 20 seconds, 12 kept: i·19/11 without its fraction.
    assert found == [2 * s for s in [0, 1, 3, 5, 6, 8, 10, 12, 13, 15, 17, 19]]


@pytest.mark.parametrize(("count", "most", "expected"), [(4, 4, [0, 1, 2, 3]), (9, 1, [0])])
def test_keep_evenly_at_its_limits(count, most, expected):
    assert video_files.keep_evenly(count, most) == expected


def test_candidates_on_disk_are_the_same_frames(tmp_path, monkeypatch):
    path = synthetic.write_video(tmp_path / "a.mp4", synthetic.numbered_frames(30), 1)
    in_memory = video_files.decode_frames(path, SMALL)
    monkeypatch.setattr(video_files, "_CANDIDATES_IN_MEMORY", 1000)
    np.testing.assert_array_equal(video_files.decode_frames(path, SMALL), in_memory)


@pytest.mark.parametrize(
    ("clockwise", "shown_at"),
    [(0, (0, 0)), (90, (0, -1)), (180, (-1, -1)), (270, (-1, 0))],
)
def test_rotation_metadata_is_applied(tmp_path, clockwise, shown_at):
    frame = np.zeros((64, 64, 3), np.uint8)
    frame[:32, :32] = 255  # top left
    path = synthetic.write_video(tmp_path / "a.mp4", [frame] * 3, clockwise=clockwise)
    shown = video_files.decode_frames(path, SMALL)[0]
    corners = {
        (y, x): shown[y * 8 + (4 if y == 0 else 0), x * 8 + (4 if x == 0 else 0)].mean()
        for y in (0, -1)
        for x in (0, -1)
    }
    assert [corner for corner, mean in corners.items() if mean > 127] == [shown_at]


def test_rotation_comes_before_the_crop(tmp_path):
    frame = np.zeros((64, 128, 3), np.uint8)
    frame[:, :32] = 255  # outside the centre square
    path = synthetic.write_video(tmp_path / "a.mp4", [frame] * 3, clockwise=90)
    assert video_files.decode_frames(path, SMALL)[0, 2:-2, 2:-2].max() < 40


@pytest.mark.parametrize(("width", "first"), [(4, 0), (5, 0), (6, 1), (7, 2), (8, 2), (9, 2)])
def test_crop_offset_is_rounded_to_even(width, first):
    columns = np.arange(width, dtype=np.uint8)
    pixels = np.broadcast_to(columns[None, :, None], (4, width, 3)).copy()
    fitted = video_files.fit(Image.fromarray(pixels), 4)
    assert fitted[0, :, 0].tolist() == list(range(first, first + 4))
    upright = video_files.fit(Image.fromarray(pixels.transpose(1, 0, 2).copy()), 4)
    np.testing.assert_array_equal(upright, fitted.transpose(1, 0, 2))


@pytest.mark.parametrize(
    ("width", "height", "resized"),
    [(320, 240, (298, 224)), (240, 320, (224, 298)), (101, 100, (226, 224)), (50, 50, (224, 224))],
)
def test_long_side_is_truncated(width, height, resized):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    whole = np.asarray(image.resize(resized, Image.Resampling.BICUBIC))
    top, left = round((resized[1] - 224) / 2), round((resized[0] - 224) / 2)
    np.testing.assert_array_equal(
        video_files.fit(image, 224), whole[top : top + 224, left : left + 224]
    )


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (1, 1), (2, 5000)])
def test_strips(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    assert video_files.fit(Image.fromarray(pixels), 32).shape == (32, 32, 3)


@pytest.mark.parametrize("size", [(4, 400), (400, 4)])
def test_strips_are_fitted_as_other_images_are(monkeypatch, size):
    y, x = np.mgrid[: size[1], : size[0]]
    waves = [128 + 80 * np.sin(0.3 * x + 0.4 * y + phase) for phase in range(3)]
    image = Image.fromarray(np.stack(waves, -1).astype(np.uint8))
    as_strip = video_files.fit(image, 16).astype(int)
    monkeypatch.setattr(video_files, "_STRIP", 1000)
    plain = video_files.fit(image, 16).astype(int)
    assert plain.std() > 10
    assert np.abs(as_strip - plain).max() <= 1


def test_a_file_cut_in_the_middle_gives_what_decodes(tmp_path):
    path = synthetic.write_video(tmp_path / "a.mkv", synthetic.numbered_frames(100), 10)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    found = [synthetic.number_of(frame) for frame in video_files.decode_frames(path, SMALL)]
    assert found == [10 * s for s in range(len(found))]
    assert 4 <= len(found) <= 7


def test_a_damaged_stretch_does_not_end_the_video(tmp_path):
    frames = synthetic.numbered_frames(60)
    path = synthetic.write_video(
        tmp_path / "a.mp4", frames, 5, codec="libx264", options={"movflags": "faststart"}
    )
    data = bytearray(path.read_bytes())
    middle = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2
    data[middle : middle + 200] = b"\xff" * 200
    path.write_bytes(data)
    assert len(video_files.decode_frames(path, SMALL)) >= 8


def told(path, recipe=SMALL):
    """The frames of a file, and what is said to be wrong with it."""
    reasons = []
    return video_files.decode_frames(path, recipe, reasons.append), reasons


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"movflags": "faststart"}),
        ("a.mkv", "libx264", {}),
        ("a.webm", "libvpx", {}),
        ("a.avi", "mpeg4", {}),
    ],
)
def test_a_file_that_was_cut_is_told_of(tmp_path, name, codec, options):
    path = synthetic.write_video(
        tmp_path / name, synthetic.numbered_frames(100), 10, codec=codec, options=options,
        sound=synthetic.tone(10, rate=48000)[None], sound_rate=48000,
    )  # fmt: skip
    assert told(path)[1] == []
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    frames, reasons = told(path)
    assert 1 < len(frames) < 10
    (reason,) = reasons
    assert "video track breaks off after" in reason or "damaged" in reason


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.avi"])
@pytest.mark.parametrize("seconds", [1, 7])
def test_sound_that_is_longer_or_shorter_is_no_damage(tmp_path, name, seconds):
    path = synthetic.write_video(
        tmp_path / name, synthetic.numbered_frames(40), 10,
        codec="libvpx" if name == "a.webm" else "mpeg4",
        sound=synthetic.tone(seconds, rate=48000)[None], sound_rate=48000,
    )  # fmt: skip
    frames, reasons = told(path)
    assert ([synthetic.number_of(frame) for frame in frames], reasons) == ([0, 10, 20, 30], [])
    waveform = audio.read_waveform(path, reasons.append)
    assert (abs(len(waveform) - seconds * 16000) < 2000, reasons) == (True, [])


def test_variable_frame_rates(tmp_path):
    # Five seconds of 30 frames a second, then five pictures that stay for a second each.
    times = [*range(150), *range(150, 300, 30)]
    path = synthetic.write_video(
        tmp_path / "a.mp4", synthetic.numbered_frames(155), 30, codec="libx264", times=times
    )
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert int(stream.average_rate) < int(stream.guessed_rate)
        step = int(stream.average_rate)
    frames, reasons = told(path)
    # By the number of a frame, not by the clock (spec section 1); none repeated, none left out.
    assert [synthetic.number_of(frame) for frame in frames] == list(range(0, 155, step))
    assert reasons == []


@pytest.mark.parametrize(
    ("width", "height", "pixel_format", "codec"),
    [
        (63, 65, "yuv444p", "libx264"),
        (65, 63, "yuv420p", "ffv1"),
        (1, 64, "yuv444p", "libx264"),
        (64, 1, "yuv444p", "libx264"),
        (1, 1, "yuv444p", "libx264"),
        (64, 64, "yuv420p10le", "libx264"),
        (64, 64, "yuv422p10le", "libx264"),
        (64, 64, "yuv444p10le", "ffv1"),
        (64, 64, "gray", "ffv1"),
        (64, 64, "bgra", "ffv1"),
    ],
)
def test_sizes_and_pixel_formats(tmp_path, width, height, pixel_format, codec):
    pixels = np.full((height, width, 3), 60, np.uint8)
    pixels[: (height + 1) // 2] = 200
    path = synthetic.write_video(
        tmp_path / "a.mkv", [pixels] * 3, 1, codec=codec, pixel_format=pixel_format
    )
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.pix_fmt == pixel_format
    frames, reasons = told(path)
    assert frames.shape == (3, 32, 32, 3) and reasons == []
    if height > 2 * width:  # the middle of it is where the two halves meet
        assert frames.min() < 140 < frames.max()
        return
    assert abs(int(frames[0, 2, 16].mean()) - 200) < 12
    if height > 1:
        assert abs(int(frames[0, -3, 16].mean()) - 60) < 12


@pytest.mark.parametrize(
    ("fps", "wanted", "expected"),
    [(24, 2, range(0, 60, 12)), (25, 2, range(0, 60, 12)), (2, 3, range(12)), (24, 1, [0, 24, 48])],
)
def test_several_frames_a_second(tmp_path, fps, wanted, expected):
    frames = synthetic.numbered_frames(12 if fps == 2 else 60)
    path = synthetic.write_video(tmp_path / "a.mp4", frames, fps)
    recipe = Recipe(image_size=32, frames_per_second=wanted)
    found = [synthetic.number_of(frame) for frame in video_files.decode_frames(path, recipe)]
    assert found == list(expected)


def write_images(folder, count, ending=".png"):
    folder.mkdir()
    for number, pixels in enumerate(synthetic.numbered_frames(count)):
        Image.fromarray(pixels).save(folder / f"clip-{number + 1:06d}{ending}")
    return folder


@pytest.mark.parametrize("ending", [".png", ".jpg", ".JPEG"])
def test_a_folder_of_images(tmp_path, ending):
    folder = write_images(tmp_path / "clip.mp4", 8, ending)  # whatever the folder is called
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.png").write_bytes(b"")
    frames, reasons = told(folder)
    assert [synthetic.number_of(frame) for frame in frames] == list(range(8))
    assert (frames.shape, reasons) == ((8, 32, 32, 3), [])


def test_of_many_images_evenly_spaced_ones_are_kept_whatever_their_rate(tmp_path):
    folder = write_images(tmp_path / "clip", 20)
    frames, _ = told(folder, Recipe(image_size=32, frames_per_second=2, max_frames=3))
    assert [synthetic.number_of(frame) for frame in frames] == [0, 9, 19]


def test_images_that_cannot_be_read_are_told_of_and_left_out(tmp_path):
    folder = write_images(tmp_path / "clip", 4)
    (folder / "clip-000002.png").write_bytes(b"")
    data = (folder / "clip-000003.png").read_bytes()
    (folder / "clip-000003.png").write_bytes(data[: len(data) // 2])
    frames, reasons = told(folder)
    assert [synthetic.number_of(frame) for frame in frames] == [0, 3]
    assert [reason.split()[0] for reason in reasons] == ["clip-000002.png", "clip-000003.png"]


def test_an_image_that_is_a_program_is_not_run(tmp_path, monkeypatch):
    """PostScript would be: by Ghostscript."""
    folder = write_images(tmp_path / "clip", 2)
    (folder / "clip-000003.jpg").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
    )
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # not looked for yet
    frames, reasons = told(folder)
    assert not (tmp_path / "ran").exists()
    assert len(frames) == 2
    assert reasons == ["clip-000003.jpg is not an image that can be read (no JPEG, PNG, WEBP, BMP)"]


def test_remote_files(tmp_path):
    bucket = object_store.register()
    video = synthetic.write_video(
        tmp_path / "a.mp4", synthetic.numbered_frames(30), sound=synthetic.tone(3)[None]
    )
    images = write_images(tmp_path / "images", 3)
    bucket.put(str(video), "gs://media/a.mp4")
    bucket.put(str(images), "gs://media/images", recursive=True)
    bucket.pipe_file("gs://media/empty.mp4", b"")
    bucket.pipe_file("gs://media/text.mp4", b"not a video\n" * 100)
    for here, there in ((video, "gs://media/a.mp4"), (images, "gs://media/images")):
        np.testing.assert_array_equal(
            video_files.decode_frames(there, SMALL), video_files.decode_frames(here, SMALL)
        )
    np.testing.assert_array_equal(
        audio.read_waveform("gs://media/a.mp4"), audio.read_waveform(video)
    )
    for name, reason in (("empty", "empty"), ("text", "FFmpeg"), ("absent", "does not exist")):
        with pytest.raises(MediaError, match=reason):
            video_files.decode_frames(f"gs://media/{name}.mp4", SMALL)


def test_a_store_that_this_installation_cannot_reach(monkeypatch):
    def without(path):
        raise ImportError("Install adlfs to access Azure")

    monkeypatch.setattr(video_files.epath, "Path", without)
    with pytest.raises(UserError, match=r"az://bucket/a\.mp4.*not installed"):
        video_files.decode_frames("az://bucket/a.mp4", SMALL)


def _cut_video(path):
    synthetic.write_video(path, synthetic.numbered_frames(20), options={"movflags": "faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"mdat") + 8])


BAD_FILES = {
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "text": (lambda path: path.write_text("not a video at all\n" * 50), "FFmpeg"),
    "zeros": (lambda path: path.write_bytes(bytes(5000)), "FFmpeg"),
    "absent": (lambda path: None, "does not exist"),
    "empty folder": (lambda path: path.mkdir(), "folder without images"),
    "no frame": (_cut_video, "can be decoded"),
    "sound only": (
        lambda path: synthetic.write_video(path, [], codec="", sound=synthetic.tone(1)[None]),
        "no video track",
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_unreadable_files_say_why(tmp_path, kind):
    make, reason = BAD_FILES[kind]
    make(tmp_path / "bad.mp4")
    with pytest.raises(MediaError, match=reason) as caught:
        video_files.decode_frames(tmp_path / "bad.mp4", SMALL)
    assert "\n" not in str(caught.value)


def test_encodings():
    frame = np.zeros((32, 32, 3), np.uint8)
    frame[8:24, 8:24] = (255, 0, 0)
    raw, jpeg = (video_files.encode_frame(frame, encoding) for encoding in ("raw", "jpeg"))
    np.testing.assert_array_equal(np.frombuffer(raw, np.uint8).reshape(frame.shape), frame)
    with Image.open(io.BytesIO(jpeg)) as image:
        assert image.format == "JPEG"
        assert np.abs(np.asarray(image).astype(int) - frame).mean() < 3
    with pytest.raises(ValueError, match="'gif'"):
        video_files.encode_frame(frame, "gif")


def test_reading_media_needs_neither_tensorflow_nor_torch():
    code = (
        "import sys, data_pipelines.modalities.record, save_jax.tokenizer, data_pipelines.prepare;"
        "print(sorted({'tensorflow', 'torch', 'jax'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
