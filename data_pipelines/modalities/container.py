"""Opens media files, local or remote, and decodes them past damaged parts."""

import contextlib
import errno
import io
import os
from collections.abc import Callable, Generator, Iterator
from typing import IO, Any, overload

import av
from etils import epath

from data_pipelines import outages
from save_jax.files import is_remote

# A track that ends this many seconds before its declared end has been cut off. Smaller differences
# are normal, because declared durations are not exact.
_CUT_SECONDS = 1.0

# FFmpeg's names of the formats that hold picture and sound themselves. Others, whatever the file is
# called, only name files and addresses for FFmpeg to read: lists to concatenate, playlists.
_CONTAINERS = (
    "mov,matroska,avi,flv,mpegts,mpeg,asf,ogg,nut,mxf,dv,rm,ivf,gif,"
    "mpegvideo,m4v,h264,hevc,av1,obu,"  # a video track alone
    "wav,w64,aiff,au,caf,flac,mp3,aac,ac3,eac3,amr,ape,wv"
)
# Nor may these make FFmpeg open anything else: no protocol has this name.
_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"}

# Called with a description of what is wrong with a file that can be read in part.
Damage = Callable[[str], None]


class MediaError(Exception):
    """A file that cannot be read as what it should be; the message is one line, without a path."""


@contextlib.contextmanager
def open_media(path: str | os.PathLike) -> Generator[av.container.InputContainer]:
    """Opens a media file, here or remote.

    Raises:
        MediaError: it cannot be opened; says why.
        OutageError: it cannot be read now. If reading fails while it is open, this is raised at the
            end, whatever FFmpeg made of the failure.
    """
    with contextlib.ExitStack() as opened:
        try:
            source = opened.enter_context(_Source(path))
        except FileNotFoundError:
            raise MediaError("the file does not exist") from None
        except OSError as error:
            raise MediaError(f"it cannot be read ({reason_of(error)})") from error
        if source.size == 0:
            raise MediaError("the file is empty (0 bytes)")
        try:
            container = opened.enter_context(av.open(source, "r", options=dict(_OPTIONS)))
        except (av.error.FFmpegError, ValueError) as error:
            source.check()
            outages.pass_on(error, path)
            if getattr(error, "errno", None) == errno.EINVAL:  # its error for all other formats
                raise MediaError(
                    "FFmpeg recognises none of the accepted containers of video or sound in it "
                    "(MP4, Matroska, AVI, WAV, …); a text that names other files, such as a "
                    "playlist, is not opened"
                ) from error
            raise MediaError(
                f"not a media file that FFmpeg can read ({reason_of(error)})"
            ) from error
        try:
            yield container
        finally:
            source.check()


class _Source:
    """A file, local or remote, that FFmpeg reads through Python.

    By itself, FFmpeg would take some names for network protocols (a colon is enough), cannot read
    object stores, and reports a failing disk in the same words as a damaged file.

    Attributes:
        size: size of the file, in bytes.

    Raises:
        UserError, OutageError, OSError: see `outages.reaching`.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = path
        self._failure: Exception | None = None
        with outages.reaching(path):
            if is_remote(path):
                self._file: IO[bytes] = epath.Path(path).open("rb")
                self.size = self._file.seek(0, os.SEEK_END)
                self._file.seek(0)
            else:
                self.size = os.path.getsize(path)
                # A pipe has size 0, and opening it would wait for a writer.
                self._file = io.FileIO(path) if self.size else io.BytesIO()

    def __enter__(self) -> "_Source":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    @property
    def name(self) -> str:
        return os.path.basename(self._path)

    def read(self, size: int) -> bytes:
        """Reads up to `size` bytes; returns none after a failure, which `check` then raises."""
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


@overload
def decodable(
    container: av.container.InputContainer, stream: av.VideoStream, damage: Damage = ...
) -> Iterator[av.VideoFrame]: ...


@overload
def decodable(
    container: av.container.InputContainer, stream: av.AudioStream, damage: Damage = ...
) -> Iterator[av.AudioFrame]: ...


def decodable(
    container: av.container.InputContainer,
    stream: av.VideoStream | av.AudioStream,
    damage: Damage = lambda reason: None,
) -> Iterator[av.VideoFrame | av.AudioFrame]:
    """Yields the frames of a stream that decode, in order, skipping what does not.

    Args:
        container: the open file.
        stream: one of its streams.
        damage: called at the end if something did not decode, or the stream was cut short.
    """
    packets = container.demux(stream)
    failed, broken, end = 0, "", 0
    while not broken:
        try:
            packet = next(packets)
        except StopIteration:  # the last packet was the empty one that flushes the decoder
            break
        except av.error.FFmpegError as error:
            outages.pass_on(error, stream.container.name)
            # The container ends here, but the decoder may still hold frames: None flushes it.
            packet, broken = None, reason_of(error)
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
    seconds = _seconds(end, stream)
    if broken:
        damage(f"its {stream.type} track breaks off after {seconds:.1f} s ({broken})")
    elif seconds + _CUT_SECONDS < (declared := _declared_end(container, stream)):
        damage(f"its {stream.type} track breaks off after {seconds:.1f} of {declared:.1f} s")
    elif failed:
        damage(f"{failed} packets of its {stream.type} track are damaged")


def _declared_end(
    container: av.container.InputContainer, stream: av.VideoStream | av.AudioStream
) -> float:
    """Returns when a stream ends according to its file, in seconds; 0 when that is not declared."""
    if container.format.name == "avi":  # whose duration FFmpeg computes from the data present
        rate = stream.average_rate if isinstance(stream, av.VideoStream) else None
        return float(stream.frames / rate) if rate else 0.0
    if stream.duration is not None:
        return _seconds(stream.duration + (stream.start_time or 0), stream)
    # Matroska declares it in a tag, hours:minutes:seconds.
    hours, _, rest = stream.metadata.get("DURATION", "").partition(":")
    try:
        minutes, seconds = rest.split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        return 0.0


def _seconds(ticks: int, stream: av.VideoStream | av.AudioStream) -> float:
    """Converts a time in a stream's own units to seconds."""
    assert stream.time_base is not None  # FFmpeg's demuxers set it
    return float(ticks * stream.time_base)


def reason_of(error: Exception) -> str:
    """Returns the first line of what an error says is wrong."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
