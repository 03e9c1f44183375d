"""Similarity of captions and videos: local and global (spec section 5)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Similarities are sums over ≤ 1024 products, then multiplied by up to 100: worth full float32
# even where the encoders compute in bfloat16 (and where a GPU would use TF32).
PRECISION = jax.lax.Precision.HIGHEST

NORM_FLOOR = 1e-12  # a vector shorter than this has no direction; it stays near zero
MASKED = -1e9  # score of a padding frame: exp gives exactly 0, and no infinity meets a gradient


def normalise(x: Float[Array, "... dim"]) -> Float[Array, "... dim"]:
    """Returns x / ‖x‖ along the last axis, in float32; safe, gradient included, at x = 0."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), NORM_FLOOR**2))


def masked_mean(
    x: Float[Array, "batch frames dim"], mask: Bool[Array, "batch frames"]
) -> Float[Array, "batch dim"]:
    """Returns the mean of the frames whose mask is True; zero where there is none."""
    weight = mask.astype(jnp.float32)[..., None]
    return (x * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1)


def global_vector(
    frames: Float[Array, "batch frames dim"], mask: Bool[Array, "batch frames"]
) -> Float[Array, "batch dim"]:
    """Returns a unit vector per video: the normalised masked mean of its normalised frames."""
    return normalise(masked_mean(normalise(frames), mask))


def similarity(
    text: Float[Array, "captions dim"],
    frames: Float[Array, "videos frames dim"],
    mask: Bool[Array, "videos frames"],
    scale: Float[Array, ""],
    local_weight: float = 0.5,
) -> Float[Array, "captions videos"]:
    """Returns the similarity of every caption with every video, times `scale`.

    Args:
        text: caption embeddings; normalised here.
        frames: fused frame embeddings ṽ; normalised here.
        mask: True where a frame is real.
        scale: exp(logit_scale).
        local_weight: share of the local score, the rest is global: 0.5 in SAVE and AVIGATE,
            0 for CLIP4Clip's mean pooling.
    """
    text, unit = normalise(text), normalise(frames)
    score = (
        (1 - local_weight)
        * scale
        * jnp.einsum("td,vd->tv", text, normalise(masked_mean(unit, mask)), precision=PRECISION)
    )
    if local_weight:
        per_frame = scale * jnp.einsum("td,vfd->tvf", text, unit, precision=PRECISION)
        local = jax.nn.logsumexp(jnp.where(mask, per_frame, MASKED), axis=-1)
        score = score + local_weight * local
    return score
