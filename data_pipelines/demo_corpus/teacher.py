"""Makes the demo's teacher vectors, in place of ImageBind's, from what the generator knows.

No network computes them. The vectors of a clip's sight and of its sound share a direction when the
motion seen and the sound heard belong to one family (sounds.FAMILIES), so their cosine says how
well any sight goes with any sound; smaller parts tell shapes, colours and single sounds apart.
"""

import functools

import numpy as np

from data_pipelines.demo_corpus import sounds
from data_pipelines.demo_corpus.plan import PlannedClip, clip_rng
from save_jax.batch import TEACHER_SIZE


def video_vector(seed: int, clip: PlannedClip) -> np.ndarray:
    """Returns the teacher's vector of what is seen: float32 [1024], of length 1."""
    parts = [
        (1.0, f"family {clip.motion}"),
        (0.3, f"shape {clip.shape}"),
        (0.3, f"colour {clip.colour}"),
    ]
    return _vector(parts, clip_rng(seed, clip, purpose=2))


def audio_vector(seed: int, clip: PlannedClip) -> np.ndarray:
    """Returns the teacher's vector of what is heard: float32 [1024], of length 1.

    A clip without an audio track has one too, which training leaves out of the loss.
    """
    if clip.sound:
        parts = [(1.0, f"family {sounds.family(clip.sound)}"), (0.4, f"sound {clip.sound}")]
    else:
        parts = [(1.0, "speech alone" if clip.topic else "no track")]
    if clip.sound and clip.topic:
        parts.append((0.2, "speech alone"))
    return _vector(parts, clip_rng(seed, clip, purpose=3))


def _vector(parts: list[tuple[float, str]], rng: np.random.Generator) -> np.ndarray:
    vector = sum(weight * _direction(name) for weight, name in parts)
    vector = vector + 0.1 * rng.standard_normal(TEACHER_SIZE) / np.sqrt(TEACHER_SIZE)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


@functools.cache
def _direction(name: str) -> np.ndarray:
    """Returns a fixed random unit vector; any two of them are nearly orthogonal."""
    vector = np.random.default_rng(list(name.encode())).standard_normal(TEACHER_SIZE)
    return vector / np.linalg.norm(vector)
