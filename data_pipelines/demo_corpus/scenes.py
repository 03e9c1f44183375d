"""What the demo's clips show: one coloured shape that moves on a dark background.

The picture is a long exposure: the shape leaves a fading trail. Models look at one frame a second,
in no particular order, and a trail is how a single frame shows which way something moves.
"""

import numpy as np

SIZE = 64  # pixels, height and width
FPS = 12  # frames a second
_STEPS = 3  # positions drawn per frame, which make up the trail
_TRAIL_SECONDS = 0.25  # time in which the trail fades to 1/e
_TRAIL_LIGHT = 0.55  # brightness of a trail when it is left, against the shape's own

SHAPES = ("square", "triangle", "cross", "crescent")
COLOURS = {
    "red": (225, 25, 30),
    "orange": (250, 130, 10),
    "yellow": (245, 230, 50),
    "green": (25, 165, 45),
    "turquoise": (50, 215, 205),
    "blue": (45, 75, 240),
    "pink": (250, 110, 190),
    "white": (240, 240, 240),
}
MOTIONS = ("slide", "bounce", "spin", "pulse")


def draw(
    rng: np.random.Generator, shape: str, colour: str, motion: str, num_frames: int
) -> np.ndarray:
    """Draws a clip's frames: uint8 [num_frames, SIZE, SIZE, 3], RGB.

    Size, position, speed, phase, shade, background and noise vary with rng.
    """
    lead = FPS // 2  # frames before the first one, so that it has a trail too
    t = np.arange(-lead * _STEPS, num_frames * _STEPS, dtype=np.float32) / (FPS * _STEPS)
    x, y, angle, size = _path(rng, motion, t)
    cover = _coverage(shape, x, y, angle, size)  # [T, SIZE, SIZE]

    fade = np.float32(np.exp(-1 / (FPS * _STEPS * _TRAIL_SECONDS)))
    trail = np.zeros_like(cover[0])
    light = np.empty((num_frames, SIZE, SIZE), np.float32)
    for step, mask in enumerate(cover):
        trail = np.maximum(trail * fade, mask)
        frame, rest = divmod(step - (lead * _STEPS), _STEPS)
        if frame >= 0 and rest == 0:
            light[frame] = np.maximum(mask, _TRAIL_LIGHT * trail)

    ink = np.array(COLOURS[colour], np.float32) * rng.uniform(0.92, 1.0)
    ground = rng.uniform(12, 45) + rng.uniform(-6, 6, size=3)
    light = light[..., None]
    frames = light * ink + (1 - light) * ground.astype(np.float32)
    frames += rng.normal(0, 3, size=(*frames.shape[:-1], 1)).astype(np.float32)
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def _path(rng: np.random.Generator, motion: str, t: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns the shape's centre x and y, angle (radians) and size at times t (seconds), each [T].

    Lengths are in half pictures: x and y run from -1 to 1, y downwards; size is half a side.
    """
    still = np.zeros_like(t)
    x, y = still + rng.uniform(-0.12, 0.12), still + rng.uniform(-0.12, 0.12)
    angle, size = still + rng.uniform(-0.2, 0.2), still + rng.uniform(0.40, 0.50)
    phase = rng.uniform()
    if motion == "slide":
        x = x + 0.5 * _zigzag(t * rng.uniform(0.55, 0.85) + phase)
    elif motion == "bounce":
        hop = (t * rng.uniform(1.15, 1.45) + phase) % 1
        y = y + 0.5 - 4.4 * hop * (1 - hop)
    elif motion == "spin":
        turns = rng.choice([-1, 1]) * rng.uniform(0.55, 0.85) * t + phase
        angle = angle + 2 * np.pi * turns
    elif motion == "pulse":
        size = size * (1.05 + 0.5 * _zigzag(t * rng.uniform(0.6, 0.9) + phase))
    else:
        raise ValueError(f"motion {motion!r} is none of {MOTIONS}")
    return x, y, angle.astype(np.float32), size.astype(np.float32)


def _zigzag(turns: np.ndarray) -> np.ndarray:
    """Returns a triangular wave in [-1, 1] with one period per turn."""
    return 1 - 4 * np.abs(turns % 1 - 0.5)


def _coverage(
    shape: str, x: np.ndarray, y: np.ndarray, angle: np.ndarray, size: np.ndarray
) -> np.ndarray:
    """Computes each pixel's share that the shape covers: float32 [T, SIZE, SIZE], from [T]."""
    axis = (np.arange(SIZE, dtype=np.float32) + 0.5) * (2 / SIZE) - 1
    x, y, size = (a.astype(np.float32)[:, None, None] for a in (x, y, size))
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    dx, dy = (axis[None, None, :] - x) / size, (axis[None, :, None] - y) / size
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    # Distance to the edge in units of the size, negative inside.
    if shape == "square":
        edge = np.maximum(np.abs(u), np.abs(v)) - 0.85
    elif shape == "triangle":
        edge = np.maximum(v, 0.866 * np.abs(u) - 0.5 * v) - 0.58
    elif shape == "cross":
        bars = np.maximum(np.abs(u) - 0.27, np.abs(v) - 1.1)
        edge = np.minimum(bars, np.maximum(np.abs(v) - 0.27, np.abs(u) - 1.1))
    elif shape == "crescent":
        edge = np.maximum(np.hypot(u, v) - 1.05, 0.85 - np.hypot(u - 0.5, v))
    else:
        raise ValueError(f"shape {shape!r} is none of {SHAPES}")
    return np.clip(0.5 - edge * size * (SIZE / 2), 0, 1)
