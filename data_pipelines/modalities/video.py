"""Video files in, small square frames out (spec section 1, row "frames")."""

import contextlib
import errno
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import av
import av.stream
import numpy as np
from av.video.reformatter import VideoReformatter
from etils import epath
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipelines import outages
from data_pipelines.recipe import Recipe
from save_jax.files import is_remote

# Candidate frames beyond this go to a temporary file: an hour at 224 pixels is half a gigabyte.
_CANDIDATES_IN_MEMORY = 64 * 2**20

# Beyond this ratio of sides, the part that a crop would throw away is never made.
_STRIP = 32

# A track that ends this much before its file says it does has been cut: nothing of a second can be
# missed by less, and what files say of themselves is not exact.
_CUT_SECONDS = 1.0

# What a folder of frames may hold beside them is left alone.
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

# And what is read of these, whatever they are called. Pillow knows formats that are programs, such
# as PostScript, and has them run.
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")

# FFmpeg's names of what holds picture and sound itself. Others, whatever the file is called, only
# name files and addresses that it would then read: lists to concatenate, playlists, sessions.
_CONTAINERS = (
    "mov,matroska,avi,flv,mpegts,mpeg,asf,ogg,nut,mxf,dv,rm,ivf,gif,"
    "mpegvideo,m4v,h264,hevc,av1,obu,"  # a video track alone
    "wav,w64,aiff,au,caf,flac,mp3,aac,ac3,eac3,amr,ape,wv"
)
# Nor may these have FFmpeg open anything: no protocol is called so.
_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"}

# Told, in words, what is wrong with a file that can be read in part.
Damage = Callable[[str], None]


class MediaError(Exception):
    """A file that cannot be read as what it should be; the message is one line, without a path."""


def decode_frames(
    path: str | os.PathLike, recipe: Recipe, damage: Damage = lambda reason: None
) -> np.ndarray:
    """Decodes some frames a second, upright, resized and cropped (spec section 1).

    The file is decoded once, front to back, without seeking: seeking lands on the wrong frame in
    variable-rate and damaged files. A damaged file gives the frames that decode.

    Args:
        path: the video file, or a folder of images, each of which is a candidate, in the order of
            their names.
        recipe: its `frames_per_second` says how many candidates there are, its `image_size` is the
            height and width of a frame, its `max_frames` the most frames kept; of more, evenly
            spaced ones are.
        damage: called for what does not decode of a file that otherwise does.

    Returns:
        uint8 [frames, image_size, image_size, 3], RGB, 1 <= frames <= max_frames.

    Raises:
        MediaError: no frame can be decoded.
        OutageError: it cannot be read now, or there is no room for its frames.
    """
    size = recipe.image_size
    # How many candidates there are is known only at the end, and so is which ones are kept.
    with (
        outages.temporary(),
        tempfile.SpooledTemporaryFile(max_size=_CANDIDATES_IN_MEMORY) as candidates,
    ):
        count = 0
        for image in _candidates(path, recipe.frames_per_second, damage):
            candidates.write(fit(image, size))
            count += 1
        if count == 0:
            raise MediaError("no frame of its video track can be decoded")
        frames = np.empty((min(count, recipe.max_frames), size, size, 3), np.uint8)
        for frame, position in zip(frames, keep_evenly(count, recipe.max_frames), strict=True):
            candidates.seek(position * frame.nbytes)
            frame.data.cast("B")[:] = candidates.read(frame.nbytes)
    return frames


def decode_evenly(path: str | os.PathLike, count: int, size: int) -> np.ndarray:
    """Decodes `count` frames at even distances, from the first frame of a video to its last.

    The file is decoded once, without seeking, as it says itself how many frames it has; where that
    turns out wrong, it is decoded once more. A video of fewer than `count` frames repeats some.

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
    raise MediaError("it changes while it is read: its frames were counted and are others now")


def frame_step(fps: float, frames_per_second: int = 1) -> int:
    """The distance, in decoded frames, of one candidate frame from the next."""
    return max(1, int(fps / frames_per_second))


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
    """Stores a frame, uint8 [height, width, 3], as "jpeg" (quality 95) or "raw" (its bytes)."""
    if encoding == "raw":
        return frame.tobytes()
    if encoding != "jpeg":
        raise ValueError(f"expected encoding 'jpeg' or 'raw', found {encoding!r}")
    buffer = io.BytesIO()
    # Colour at full resolution: at 224 pixels, halving it costs more than it saves.
    Image.fromarray(frame).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def read_binary(path: str | os.PathLike) -> bytes:
    """Reads all of a file, here or remote.

    Raises:
        UserError, OutageError, OSError: see `outages.reaching`.
    """
    with outages.reaching(path):
        return epath.Path(path).read_bytes()


@contextlib.contextmanager
def open_media(path: str | os.PathLike) -> Iterator[av.container.InputContainer]:
    """Opens a media file, here or remote.

    Raises:
        MediaError: it cannot be opened; says why.
        OutageError: it cannot be read now. This may be found while it is open, and is then raised
            at the end, whatever FFmpeg made of it.
    """
    with contextlib.ExitStack() as opened:
        try:
            source = opened.enter_context(_Source(path))
        except FileNotFoundError:
            raise MediaError("the file does not exist") from None
        except OSError as error:
            raise MediaError(f"it cannot be read ({_reason(error)})") from error
        if source.size == 0:
            raise MediaError("the file is empty (0 bytes)")
        try:
            container = opened.enter_context(av.open(source, options=dict(_OPTIONS)))
        except (av.error.FFmpegError, ValueError) as error:
            source.check()
            outages.pass_on(error, path)
            if getattr(error, "errno", None) == errno.EINVAL:  # its word for what is not among them
                raise MediaError(
                    "FFmpeg takes it for none of the containers of video or sound that are read "
                    "here (MP4, Matroska, AVI, WAV, …); a text that names other files, such as a "
                    "playlist, is not opened"
                ) from error
            raise MediaError(f"not a media file that FFmpeg can read ({_reason(error)})") from error
        try:
            yield container
        finally:
            source.check()


class _Source:
    """A file, here or remote, that FFmpeg reads through us.

    By itself it would take some names for those of a network's protocols (a colon is enough), know
    no object stores, and tell a disk that fails by the words it has for a damaged file.

    Attributes:
        size: of the file, in bytes.

    Raises:
        UserError, OutageError, OSError: see `outages.reaching`.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = path
        self._failure: Exception | None = None
        with outages.reaching(path):
            if is_remote(path):
                self._file: BinaryIO = epath.Path(path).open("rb")
                self.size = self._file.seek(0, os.SEEK_END)
                self._file.seek(0)
            else:
                self.size = os.path.getsize(path)
                # A pipe has none, and opening it would wait for a writer.
                self._file = io.FileIO(path) if self.size else io.BytesIO()

    def __enter__(self) -> "_Source":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    @property
    def name(self) -> str:
        return os.path.basename(self._path)

    def read(self, size: int) -> bytes:
        """Reads some bytes; once that has failed, the file has ended, and `check` says why."""
        if self._failure:
            return b""
        try:
            return self._file.read(size)
        except Exception as error:
            self._failure = error
            return b""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def check(self) -> None:
        """Raises OutageError when something could not be read."""
        if self._failure:
            raise outages.outage(self._path, self._failure) from self._failure


def decodable(
    container: av.container.InputContainer,
    stream: av.stream.Stream,
    damage: Damage = lambda reason: None,
) -> Iterator:
    """Yields the frames of a stream that decode, in order, stepping over what does not.

    Args:
        container: the open file.
        stream: one of its streams.
        damage: called at the end when something did not decode, or the stream was cut short.
    """
    packets = container.demux(stream)
    failed, broken, end = 0, "", 0
    while not broken:
        try:
            packet = next(packets)
        except StopIteration:  # the last packet was the empty one that empties the decoder
            break
        except av.error.FFmpegError as error:
            outages.pass_on(error, stream.container.name)
            # The container ends here, but the decoder may still hold frames: None empties it.
            packet, broken = None, _reason(error)
        try:
            frames = stream.codec_context.decode(packet)
        except av.error.FFmpegError as error:
            outages.pass_on(error, stream.container.name)
            failed += 1  # a damaged packet spoils only itself
            continue
        for frame in frames:
            if frame.pts is not None:
                end = max(end, frame.pts + frame.duration)
            yield frame
    seconds = float(end * stream.time_base)
    if broken:
        damage(f"its {stream.type} track breaks off after {seconds:.1f} s ({broken})")
    elif seconds + _CUT_SECONDS < (declared := _declared_end(container, stream)):
        damage(f"its {stream.type} track breaks off after {seconds:.1f} of {declared:.1f} s")
    elif failed:
        damage(f"{failed} packets of its {stream.type} track are damaged")


def _declared_end(container: av.container.InputContainer, stream: av.stream.Stream) -> float:
    """When a stream ends, in seconds, as the file says; 0 when it does not say."""
    if container.format.name == "avi":  # whose duration FFmpeg works out from what there is
        rate = stream.average_rate if stream.type == "video" else None
        return float(stream.frames / rate) if rate else 0.0
    if stream.duration is not None:
        return float((stream.duration + (stream.start_time or 0)) * stream.time_base)
    # Matroska says it in a tag, hours:minutes:seconds.
    hours, _, rest = stream.metadata.get("DURATION", "").partition(":")
    try:
        minutes, seconds = rest.split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        return 0.0


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
            damage(f"{name} is not an image that can be read ({_reason(error)})")
        else:
            yield upright


def _image_names(folder: epath.Path) -> list[str]:
    try:
        with outages.reaching(folder):
            names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise MediaError(f"a folder that cannot be listed ({_reason(error)})") from error
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
        # Preparation runs one process a core; threads in each would only get in the way.
        stream.codec_context.thread_count = 1
        # The average is what OpenCV calls the rate, and so what the reference goes by.
        step = frame_step(float(stream.average_rate or stream.guessed_rate or 1), frames_per_second)
        converter = VideoReformatter()  # a frame's own would be set up again for each frame
        for index, frame in enumerate(decodable(container, stream, damage)):
            if index % step:
                continue
            yield _upright(frame, converter)


def _upright(frame: av.VideoFrame, converter: VideoReformatter) -> Image.Image:
    """A decoded frame as a picture, turned the way a player would show it."""
    converted = converter.reformat(frame, format="rgb24", interpolation="BICUBIC", threads=1)
    quarter_turns = round(frame.rotation / 90) % 4
    pixels = np.rot90(converted.to_ndarray(), quarter_turns)
    return Image.fromarray(np.ascontiguousarray(pixels))


def _decode_at(
    path: str | os.PathLike, positions: set[int], size: int
) -> tuple[dict[int, np.ndarray], int]:
    """The frames at these positions, as `fit` makes them, and how many frames decode in all."""
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
    """How many frames there should be, without decoding any."""
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
            pass  # damaged there: decoding will tell what there is
        return packets


def _video_stream(container: av.container.InputContainer) -> av.stream.Stream:
    """The first video track that is not a cover picture."""
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return stream
    kinds = sorted({stream.type for stream in container.streams})
    if not kinds:
        raise MediaError("no track can be found in it: the file is not complete")
    raise MediaError(f"it has no video track (only: {', '.join(kinds)})")


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
