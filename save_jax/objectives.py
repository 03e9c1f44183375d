"""The two losses, over the global batch (spec section 6).

Everything here is float32. Under `jax.jit` with the batch sharded over devices, "the batch" is the
global one: the compiler inserts the gathers, and the gradient is the true global gradient.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from save_jax.models.save import VideoEmbedding
from save_jax.similarity import MASKED, PRECISION, global_vector, normalise, similarity

SOFT_LABEL_SCALE = 5.0  # of both softmaxes in soft-ALBEF
# A softmax that is uniform but for float32's rounding correlates with nothing: distance 1. This is
# the smallest standard deviation, relative to the mean, that counts as more than rounding.
SPREAD_FLOOR = 1e-6


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Constants of the objective.

    Attributes:
        margin_beta, margin_delta: β and δ of the adaptive margin; δ = 0 switches it off.
        soft_albef_weight: weight of the soft-ALBEF loss; 0 switches it off.
        local_weight: share of the local score in the similarity.
    """

    margin_beta: float = 0.2
    margin_delta: float = 0.1
    soft_albef_weight: float = 1.0
    local_weight: float = 0.5


class Losses(NamedTuple):
    """Scalars: the total and its two parts, each before weighting."""

    total: Float[Array, ""]
    contrastive: Float[Array, ""]
    soft_albef: Float[Array, ""]


def adaptive_margin(
    text: Float[Array, "batch dim"], visual: Float[Array, "batch dim"], beta: float, delta: float
) -> Float[Array, "batch batch"]:
    """min(β(1 − (t_i·t_j + g_i·g_j)/2), δ), 0 on the diagonal, without gradient.

    Args:
        text, visual: unit vectors of the batch's captions and of what their videos show.
    """
    alike = (
        jnp.matmul(text, text.T, precision=PRECISION)
        + jnp.matmul(visual, visual.T, precision=PRECISION)
    ) / 2
    margin = jnp.minimum(beta * (1 - alike), delta) * (1 - jnp.eye(len(text)))
    return jax.lax.stop_gradient(margin)


def contrastive_loss(logits: Float[Array, "batch batch"]) -> Float[Array, ""]:
    """Mean of the text→video and video→text cross-entropies against the diagonal."""
    matches = jnp.diagonal(logits)
    rows = jax.nn.logsumexp(logits, axis=1) - matches
    columns = jax.nn.logsumexp(logits, axis=0) - matches
    return (rows.mean() + columns.mean()) / 2


def soft_albef_loss(
    visual: Float[Array, "batch dim"],
    audio: Float[Array, "batch dim"],
    teacher_visual: Float[Array, "batch teacher"],
    teacher_audio: Float[Array, "batch teacher"],
    usable: Bool[Array, " batch"],
) -> Float[Array, ""]:
    """Soft-label alignment of vision and audio before they are fused.

    Row by row, and column by column, the student's distribution over the batch follows the
    teacher's in Pearson correlation. Rows and columns of unusable clips take no part; with fewer
    than two usable clips the loss is 0.

    Args:
        visual, audio: unit vectors of the student, ḡ and r̄.
        teacher_visual, teacher_audio: the teacher's vectors; normalised here.
        usable: True for clips with an audio track (and teacher vectors).
    """
    student = jnp.matmul(visual, audio.T, precision=PRECISION)
    teacher = jnp.matmul(normalise(teacher_visual), normalise(teacher_audio).T, precision=PRECISION)
    count = usable.sum()

    def mean_distance(student: Array, teacher: Array) -> Array:
        def centred_softmax(x: Array) -> Array:
            p = jax.nn.softmax(jnp.where(usable, SOFT_LABEL_SCALE * x, MASKED), axis=1)
            # Times the count, p is near 1 whatever the batch: float32 keeps its digits.
            return jnp.where(usable, p * count - 1, 0.0)

        p, q = centred_softmax(student), centred_softmax(teacher)
        p_squares, q_squares = (p * p).sum(1), (q * q).sum(1)
        defined = jnp.minimum(p_squares, q_squares) > count * SPREAD_FLOOR**2
        # The inner `where` keeps 0 out of the root: its gradient there would be infinite.
        root = jnp.sqrt(jnp.where(defined, p_squares * q_squares, 1.0))
        correlation = jnp.where(defined, (p * q).sum(1) / root, 0.0)
        return jnp.sum(jnp.where(usable, 1 - correlation, 0.0)) / jnp.maximum(count, 1)

    loss = mean_distance(student, teacher) + mean_distance(student.T, teacher.T)
    return jnp.where(count >= 2, loss, 0.0)


def losses(
    text: Float[Array, "batch dim"],
    video: VideoEmbedding,
    teacher_video: Float[Array, "batch teacher"] | None,
    teacher_audio: Float[Array, "batch teacher"] | None,
    usable: Bool[Array, " batch"] | None,
    logit_scale: Float[Array, ""],
    config: LossConfig,
) -> Losses:
    """Both losses of a batch (spec section 6).

    Args:
        text: caption embeddings, row i the caption of video i; not normalised.
        video: what `SAVE.encode_video` returned.
        teacher_video, teacher_audio, usable: as in `soft_albef_loss`; None where its weight is 0.
        logit_scale: log of the similarity's scale.
        config: constants.
    """
    scale = jnp.exp(logit_scale)
    logits = similarity(text, video.fused, video.mask, scale, config.local_weight)
    if config.margin_delta:
        margin = adaptive_margin(
            normalise(text),
            global_vector(video.visual, video.mask),
            config.margin_beta,
            config.margin_delta,
        )
        logits = logits + scale * margin
    contrastive = contrastive_loss(logits)
    soft_albef = jnp.zeros(())
    if config.soft_albef_weight:
        soft_albef = soft_albef_loss(
            normalise(normalise(video.visual).mean(axis=1)),
            normalise(normalise(video.audio).mean(axis=1)),
            teacher_video,
            teacher_audio,
            usable,
        )
    return Losses(contrastive + config.soft_albef_weight * soft_albef, contrastive, soft_albef)
