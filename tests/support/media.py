"""Makes small real media files, so that tests read what the pipelines read: files."""

import os
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

# Clockwise turns as the matrix of an MP4 track header (ISO 14496-12: a b u c d v x y w, where a
# point becomes x' = a·x + c·y, y' = b·x + d·y, y pointing down).
_TURNS = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}


def numbered_frames(count: int, size: int = 64) -> list[np.ndarray]:
    """Frames, uint8 [size, size, 3], that say their own number in stripes: see `number_of`."""
    frames = []
    for number in range(count):
        bits = [(number >> bit) & 1 for bit in range(8)]
        row = np.repeat(np.array(bits, np.uint8) * 255, size // 8)
        frames.append(np.ascontiguousarray(np.broadcast_to(row[None, :, None], (size, size, 3))))
    return frames


def number_of(frame: np.ndarray) -> int:
    """The number of a frame made by `numbered_frames`, of any size and after compression."""
    stripe = frame.shape[1] / 8
    centres = [int((bit + 0.5) * stripe) for bit in range(8)]
    return sum(int(frame[frame.shape[0] // 2, x].mean() > 127) << b for b, x in enumerate(centres))


def write_video(
    path: str | os.PathLike,
    frames: list[np.ndarray],
    fps: Fraction | int = 10,
    *,
    codec: str = "mpeg4",
    sound: np.ndarray | None = None,
    sound_rate: int = 16000,
    sound_layout: str = "mono",
    options: dict[str, str] | None = None,
    clockwise: int = 0,
    pixel_format: str = "yuv420p",
    times: Sequence[int] | None = None,
) -> Path:
    """Writes a video file.

    Args:
        path: where to; its ending decides the container.
        frames: uint8 [height, width, 3] each, of even sides if the pixel format halves colours.
        fps: frames a second.
        codec: name of FFmpeg's video encoder; "" = no video track.
        sound: float32 [channels, samples] in [-1, 1], or None for no audio track.
        sound_rate: samples a second.
        sound_layout: "mono", "stereo", …, of as many channels.
        options: options of the container, such as movflags.
        clockwise: degrees by which a player should turn the picture, for MP4.
        pixel_format: how the codec is to store pixels.
        times: when each frame is shown, in 1/fps; none means one after the other.
    """
    with av.open(str(path), "w", options=options or {}) as container:
        streams = []
        if codec:
            video = container.add_stream(codec, rate=Fraction(fps))
            video.height, video.width = frames[0].shape[:2]
            video.pix_fmt = pixel_format
            video.bit_rate = 2_000_000
            streams.append((video, _timed(frames, Fraction(fps), times)))
        if sound is not None:
            opus = str(path).endswith(".webm")
            audio = container.add_stream(
                "libopus" if opus else "aac", rate=sound_rate, layout=sound_layout
            )
            whole = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(sound, np.float32), format="fltp", layout=sound_layout
            )
            whole.sample_rate = sound_rate
            streams.append((audio, [whole]))
        for stream, its_frames in streams:
            for frame in its_frames:
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    if clockwise:
        _turn(Path(path), clockwise)
    return Path(path)


def write_wav(path: str | os.PathLike, sound: np.ndarray, rate: int = 16000) -> Path:
    """Writes float [channels, samples] in [-1, 1] as 16-bit PCM, by hand: exact and independent."""
    samples = np.round(np.clip(sound, -1, 1 - 2**-15) * 2**15).astype("<i2").T.tobytes()
    channels = len(sound)
    head = struct.pack("<HHIIHH", 1, channels, rate, rate * channels * 2, channels * 2, 16)
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head
    body += b"data" + struct.pack("<I", len(samples)) + samples
    Path(path).write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    return Path(path)


def tone(seconds: float, hertz: float = 440.0, rate: int = 16000) -> np.ndarray:
    """A tone of amplitude 0.5: float32 [samples]."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def _timed(
    frames: list[np.ndarray], fps: Fraction, times: Sequence[int] | None
) -> Iterator[av.VideoFrame]:
    for number, pixels in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        if times is not None:
            frame.pts, frame.time_base = times[number], 1 / fps
        yield frame


def _turn(path: Path, clockwise: int) -> None:
    """Writes a rotation into the first track header of an MP4 file."""
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # version 0: 40 bytes lie between name and matrix
    a, b, c, d = (value << 16 for value in _TURNS[clockwise])
    data[matrix : matrix + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
