"""Video files in, small square frames out (spec section 1, row "frames")."""

import io
import os
import tempfile
from collections.abc import Iterator

import av
import av.stream
import numpy as np
from av.video.reformatter import VideoReformatter
from etils import epath
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipelines import outages
from data_pipelines.modalities.container import (
    Damage,
    MediaError,
    decodable,
    open_media,
    reason_of,
)
from data_pipelines.recipe import JPEG_QUALITY, Recipe

# Candidate frames beyond this go to a temporary file: an hour at 224 pixels is half a gigabyte.
_CANDIDATES_IN_MEMORY = 64 * 2**20

# Beyond this ratio of sides, the part that the crop would discard is never computed.
_STRIP = 32

# Other files in a folder of frames are ignored.
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

# The formats that are read, whatever a file is called. Pillow also knows formats that are programs,
# such as PostScript, and would run them.
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


def decode_frames(
    path: str | os.PathLike, recipe: Recipe, damage: Damage = lambda reason: None
) -> np.ndarray:
    """Decodes a few frames per second, upright, resized and cropped (spec section 1).

    The file is decoded once, front to back, without seeking: seeking lands on the wrong frame in
    variable-rate and damaged files. A damaged file gives the frames that decode.

    Args:
        path: the video file, or a folder of images, each of which is a candidate, in the order of
            their names.
        recipe: its `frames_per_second` says how many candidates there are, its `image_size` is the
            height and width of a frame, its `max_frames` the most frames kept; of more candidates,
            evenly spaced ones are kept.
        damage: called with a description of the parts that do not decode, if others do.

    Returns:
        uint8 [frames, image_size, image_size, 3], RGB, 1 <= frames <= max_frames.

    Raises:
        MediaError: no frame can be decoded.
        OutageError: it cannot be read now, or there is no room for its frames.
    """
    size = recipe.image_size
    # The number of candidates, and so which ones are kept, is known only at the end.
    with (
        outages.temporary(),
        tempfile.SpooledTemporaryFile(max_size=_CANDIDATES_IN_MEMORY) as candidates,
    ):
        count = 0
        for image in _candidates(path, recipe.frames_per_second, damage):
            candidates.write(fit(image, size).data)
            count += 1
        if count == 0:
            raise MediaError("no frame of its video track can be decoded")
        frames = np.empty((min(count, recipe.max_frames), size, size, 3), np.uint8)
        for frame, position in zip(frames, keep_evenly(count, recipe.max_frames), strict=True):
            candidates.seek(position * frame.nbytes)
            frame.data.cast("B")[:] = candidates.read(frame.nbytes)
    return frames


def decode_evenly(path: str | os.PathLike, count: int, size: int) -> np.ndarray:
    """Decodes `count` evenly spaced frames, from the first frame of a video to its last.

    The file is decoded once, without seeking, with the number of frames that it declares; if that
    proves wrong, it is decoded once more. A video of fewer than `count` frames repeats some.

    Args:
        path: the video file, or a folder of images.
        count: frames wanted.
        size: height and width of a frame in pixels; see `fit`.

    Returns:
        uint8 [count, size, size, 3], RGB.

    Raises:
        MediaError: no frame can be decoded.
        OutageError: it cannot be read now.
    """
    expected = max(_declared_frames(path), 1)
    for _ in range(2):
        positions = np.linspace(0, expected - 1, count).astype(int).tolist()
        frames, decoded = _decode_at(path, set(positions), size)
        if decoded == expected:
            return np.stack([frames[position] for position in positions])
        if decoded == 0:
            raise MediaError("no frame of its video track can be decoded")
        expected = decoded
    raise MediaError("its number of frames changed while it was read")


def frame_step(fps: float, frames_per_second: int = 1) -> int:
    """Returns the distance between candidate frames, in decoded frames."""
    return max(1, int(fps / frames_per_second))


def keep_evenly(count: int, most: int) -> list[int]:
    """Returns which of `count` frames are kept: all, or `most`, evenly from first to last."""
    if count <= most:
        return list(range(count))
    return np.linspace(0, count - 1, most).astype(int).tolist()


def fit(image: Image.Image, size: int) -> np.ndarray:
    """Resizes the short side to `size` (bicubic) and crops the centre square.

    Returns:
        uint8 [size, size, 3].
    """
    width, height = image.size
    short, long = min(width, height), max(width, height)
    resized_long = int(size * long / short)
    offset = round((resized_long - size) / 2)
    wide = width >= height
    if long > _STRIP * short:
        # The same samples as below, to rounding, without ever holding a strip of size × 100,000.
        start, length = offset * long / resized_long, size * long / resized_long
        box = (start, 0, start + length, height) if wide else (0, start, width, start + length)
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    image = image.resize(
        (resized_long, size) if wide else (size, resized_long), Image.Resampling.BICUBIC
    )
    left, top = (offset, 0) if wide else (0, offset)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def encode_frame(frame: np.ndarray, encoding: str) -> bytes:
    """Encodes a frame, uint8 [height, width, 3], as "jpeg" (JPEG_QUALITY) or "raw" (its bytes)."""
    if encoding == "raw":
        return frame.tobytes()
    if encoding != "jpeg":
        raise ValueError(f"expected encoding 'jpeg' or 'raw', found {encoding!r}")
    buffer = io.BytesIO()
    # Colour at full resolution: at 224 pixels, halving it costs more than it saves.
    Image.fromarray(frame).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def read_binary(path: str | os.PathLike) -> bytes:
    """Reads all of a file, here or remote.

    Raises:
        UserError, OutageError, OSError: see `outages.reaching`.
    """
    with outages.reaching(path):
        return epath.Path(path).read_bytes()


def _candidates(
    path: str | os.PathLike, frames_per_second: int, damage: Damage
) -> Iterator[Image.Image]:
    """Yields the images that may be kept, in order, upright, at full size."""
    if outages.is_folder(path):
        yield from _images(epath.Path(path), damage)
    else:
        yield from _sampled(path, frames_per_second, damage)


def _images(folder: epath.Path, damage: Damage) -> Iterator[Image.Image]:
    """Yields the images of a folder that can be read, in the order of their names."""
    for name in _image_names(folder):
        try:
            content = io.BytesIO(read_binary(folder / name))
            with Image.open(content, formats=_IMAGE_FORMATS) as image:
                upright = ImageOps.exif_transpose(image).convert("RGB")
        except UnidentifiedImageError:
            damage(f"{name} is not an image that can be read (no {', '.join(_IMAGE_FORMATS)})")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            damage(f"{name} is not an image that can be read ({reason_of(error)})")
        else:
            yield upright


def _image_names(folder: epath.Path) -> list[str]:
    try:
        with outages.reaching(folder):
            names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise MediaError(f"a folder that cannot be listed ({reason_of(error)})") from error
    names = [name for name in names if name.lower().endswith(_IMAGES) and name[0] != "."]
    if not names:
        raise MediaError(f"a folder without images (*{', *'.join(_IMAGES)})")
    return names


def _sampled(
    path: str | os.PathLike, frames_per_second: int, damage: Damage
) -> Iterator[Image.Image]:
    """Yields the frames of a video at index s·max(1, int(fps/frames_per_second)), s = 0, 1, …"""
    with open_media(path) as container:
        stream = _video_stream(container)
        # Preparation runs one process per core; more threads would only compete for them.
        stream.codec_context.thread_count = 1
        # OpenCV, which the reference uses, calls the average the rate.
        step = frame_step(float(stream.average_rate or stream.guessed_rate or 1), frames_per_second)
        converter = VideoReformatter()  # one for all frames: each frame's own would be set up anew
        for index, frame in enumerate(decodable(container, stream, damage)):
            if index % step:
                continue
            yield _upright(frame, converter)


def _upright(frame: av.VideoFrame, converter: VideoReformatter) -> Image.Image:
    """Converts a decoded frame to an image, rotated as a player would show it."""
    converted = converter.reformat(frame, format="rgb24", interpolation="BICUBIC", threads=1)
    quarter_turns = round(frame.rotation / 90) % 4
    pixels = np.rot90(converted.to_ndarray(), quarter_turns)
    return Image.fromarray(np.ascontiguousarray(pixels))


def _decode_at(
    path: str | os.PathLike, positions: set[int], size: int
) -> tuple[dict[int, np.ndarray], int]:
    """Returns the frames at these positions, made by `fit`, and how many frames decode in all."""
    frames, decoded = {}, 0
    if outages.is_folder(path):
        for image in _images(epath.Path(path), lambda reason: None):
            if decoded in positions:
                frames[decoded] = fit(image, size)
            decoded += 1
        return frames, decoded
    with open_media(path) as container:
        stream = _video_stream(container)
        stream.codec_context.thread_count = 1  # as above
        converter = VideoReformatter()
        for frame in decodable(container, stream):
            if decoded in positions:
                frames[decoded] = fit(_upright(frame, converter), size)
            decoded += 1
    return frames, decoded


def _declared_frames(path: str | os.PathLike) -> int:
    """Returns how many frames there should be, without decoding any."""
    if outages.is_folder(path):
        return len(_image_names(epath.Path(path)))
    with open_media(path) as container:
        stream = _video_stream(container)
        if stream.frames:
            return stream.frames
        packets = 0
        try:
            for packet in container.demux(stream):
                packets += packet.size > 0
        except av.error.FFmpegError:
            pass  # damaged there: decoding will show how many there are
        return packets


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """Returns the first video track that is not a cover picture."""
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return stream
    kinds = sorted({stream.type for stream in container.streams})
    if not kinds:
        raise MediaError("no track can be found in it: the file is not complete")
    raise MediaError(f"it has no video track (only: {', '.join(kinds)})")
