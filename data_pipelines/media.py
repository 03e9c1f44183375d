"""Video files in, small square frames out (spec section 1, row "frames")."""

import io
import os
import tempfile
from collections.abc import Iterator

import av
import av.stream
import numpy as np
from PIL import Image

from data_pipelines.recipe import Recipe

# Candidate frames beyond this go to a temporary file: an hour at 224 pixels is half a gigabyte.
_CANDIDATES_IN_MEMORY = 64 * 2**20

# Beyond this ratio of sides, the part that a crop would throw away is never made.
_STRIP = 32


class MediaError(Exception):
    """A file that cannot be read as what it should be; the message is one line, without a path."""


def decode_frames(path: str | os.PathLike, recipe: Recipe) -> np.ndarray:
    """Decodes one frame a second, upright, resized and cropped (spec section 1).

    The file is decoded once, front to back, without seeking: seeking lands on the wrong frame in
    variable-rate and damaged files. A damaged file gives the frames that decode.

    Args:
        path: the video file.
        recipe: its `image_size` is the height and width of a frame, its `max_frames` the most
            frames kept; of more, evenly spaced ones are.

    Returns:
        uint8 [frames, image_size, image_size, 3], RGB, 1 <= frames <= max_frames.

    Raises:
        MediaError: no frame can be decoded.
    """
    size = recipe.image_size
    # How many candidates there are is known only at the end, and so is which ones are kept.
    with tempfile.SpooledTemporaryFile(max_size=_CANDIDATES_IN_MEMORY) as candidates:
        count = 0
        for image in _one_a_second(path):
            candidates.write(fit(image, size).tobytes())
            count += 1
        if count == 0:
            raise MediaError("no frame of its video track can be decoded")
        frames = []
        for position in keep_evenly(count, recipe.max_frames):
            candidates.seek(position * size * size * 3)
            frames.append(np.frombuffer(candidates.read(size * size * 3), np.uint8))
    return np.stack(frames).reshape(-1, size, size, 3)


def frame_step(fps: float) -> int:
    """The distance, in decoded frames, of one candidate frame from the next."""
    return max(1, int(fps))


def keep_evenly(count: int, most: int) -> list[int]:
    """Which of `count` frames are kept: all, or `most` of them from the first to the last."""
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
    """Compresses a frame, uint8 [height, width, 3], as "jpeg" (quality 95) or "png" (lossless)."""
    buffer = io.BytesIO()
    image = Image.fromarray(frame)
    if encoding == "jpeg":
        # Colour at full resolution: at 224 pixels, halving it costs more than it saves.
        image.save(buffer, "JPEG", quality=95, subsampling=0)
    elif encoding == "png":
        image.save(buffer, "PNG")
    else:
        raise ValueError(f"expected encoding 'jpeg' or 'png', found {encoding!r}")
    return buffer.getvalue()


def open_media(path: str | os.PathLike) -> av.container.InputContainer:
    """Opens a media file; MediaError with the reason when that fails."""
    try:
        if os.path.getsize(path) == 0:
            raise MediaError("the file is empty (0 bytes)")
        return av.open(os.fspath(path))
    except FileNotFoundError:
        raise MediaError("the file does not exist") from None
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"not a media file that FFmpeg can read ({_reason(error)})") from error


def decodable(container: av.container.InputContainer, stream: av.stream.Stream) -> Iterator:
    """Yields the frames of a stream that decode, in order, stepping over what does not."""
    packets = container.demux(stream)
    damaged = False
    while not damaged:
        try:
            packet = next(packets)
        except StopIteration:  # the last packet was the empty one that empties the decoder
            return
        except av.error.FFmpegError:
            # The container ends here, but the decoder may still hold frames: None empties it.
            packet, damaged = None, True
        try:
            frames = stream.codec_context.decode(packet)
        except av.error.FFmpegError:
            continue  # a damaged packet spoils only itself
        yield from frames


def _one_a_second(path: str | os.PathLike) -> Iterator[Image.Image]:
    """Yields the frames at index s·max(1, int(fps)) for s = 0, 1, …, upright, at full size."""
    with open_media(path) as container:
        stream = _video_stream(container)
        # Preparation runs one process a core; threads in each would only get in the way.
        stream.codec_context.thread_count = 1
        step = frame_step(float(stream.guessed_rate or stream.average_rate or 1))
        for index, frame in enumerate(decodable(container, stream)):
            if index % step:
                continue
            pixels = frame.to_ndarray(format="rgb24", interpolation="BICUBIC")
            quarter_turns = round(frame.rotation / 90) % 4
            yield Image.fromarray(np.ascontiguousarray(np.rot90(pixels, quarter_turns)))


def _video_stream(container: av.container.InputContainer) -> av.stream.Stream:
    """The first video track that is not a cover picture."""
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return stream
    kinds = sorted({stream.type for stream in container.streams})
    raise MediaError(f"it has no video track (only: {', '.join(kinds) or 'nothing'})")


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
