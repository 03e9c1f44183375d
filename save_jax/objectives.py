"""The two losses, over the global batch (spec section 6).

Everything here is float32. Under `jax.jit` with the batch sharded over devices, "the batch" is the
global one: the compiler inserts the gathers, and the gradient is the true global gradient. Each
device scores its own videos with all captions, block by block, so that the memory for scores of
captions, videos and frames (B × B × F of them) is bounded, whatever the batch.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from save_jax import sharding
from save_jax.microbatch import fewest_blocks, map_blocks
from save_jax.models.save import VideoEmbedding
from save_jax.similarity import MASKED, PRECISION, global_vector, normalise, similarity

SOFT_LABEL_SCALE = 5.0  # of both softmaxes in soft-ALBEF
# Scores of captions with frames that a device holds at once: 32 MiB.
MOST_SCORES = 2**23
# A softmax that is uniform up to float32's rounding correlates with nothing: distance 1. This is
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
    text: Float[Array, "batch dim"],
    visual: Float[Array, "batch dim"],
    other_text: Float[Array, "others dim"],
    other_visual: Float[Array, "others dim"],
    own: Bool[Array, "batch others"],
    beta: float,
    delta: float,
) -> Float[Array, "batch others"]:
    """Returns min(β(1 − (t_i·t_j + g_i·g_j)/2), δ), 0 where i is j, without gradient.

    Args:
        text, visual: unit vectors of captions and of what their videos show.
        other_text, other_visual: the same of those that they are compared with.
        own: True where both are the same pair.
        beta, delta: see LossConfig.
    """
    alike = (
        jnp.matmul(text, other_text.T, precision=PRECISION)
        + jnp.matmul(visual, other_visual.T, precision=PRECISION)
    ) / 2
    return jax.lax.stop_gradient(jnp.minimum(beta * (1 - alike), delta) * ~own)


def contrastive_loss(
    text: Float[Array, "batch dim"],
    video: VideoEmbedding,
    logit_scale: Float[Array, ""],
    config: LossConfig,
    blocks: int = 1,
) -> Float[Array, ""]:
    """Returns the mean of both directions' cross-entropies, with the adaptive margin.

    Args:
        text: caption embeddings, row i the caption of video i; not normalised.
        video: what `SAVE.encode_video` returned.
        logit_scale: log of the similarity's scale.
        config: constants.
        blocks: in how many blocks of videos to score all captions.
    """
    scale = jnp.exp(logit_scale)
    text = normalise(text)
    visual = global_vector(video.visual, video.mask)
    all_text, all_visual = sharding.replicate((text, visual))
    index = jnp.arange(len(text))

    def against_all_captions(block: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        frames, mask, text, visual, column = block
        own = index[:, None] == column
        logits = similarity(all_text, frames, mask, scale, config.local_weight)
        if config.margin_delta:
            logits = logits + scale * adaptive_margin(
                all_text, all_visual, text, visual, own, config.margin_beta, config.margin_delta
            )
        return (
            jnp.where(own, logits, 0).sum(axis=0),
            jax.nn.logsumexp(logits, axis=0),
            jax.nn.logsumexp(logits, axis=1),
        )

    matches, of_videos, of_captions = map_blocks(
        against_all_captions, (video.fused, video.mask, text, visual, index), blocks
    )
    of_captions = jax.nn.logsumexp(of_captions, axis=0)
    return (of_captions.mean() + of_videos.mean()) / 2 - matches.mean()


def soft_albef_loss(
    visual: Float[Array, "batch dim"],
    audio: Float[Array, "batch dim"],
    teacher_visual: Float[Array, "batch teacher"],
    teacher_audio: Float[Array, "batch teacher"],
    usable: Bool[Array, " batch"],
    blocks: int = 1,
) -> Float[Array, ""]:
    """Returns the loss that aligns vision and audio, before fusion, by the teacher's soft labels.

    Row by row, and column by column, the student's distribution over the batch follows the
    teacher's in Pearson correlation. Rows and columns of unusable clips take no part; with fewer
    than two usable clips the loss is 0.

    Args:
        visual, audio: unit vectors of the student, ḡ and r̄.
        teacher_visual, teacher_audio: the teacher's vectors; normalised here.
        usable: True for clips with an audio track (and teacher vectors).
        blocks: in how many blocks of rows (and then of columns) to compare.
    """
    teacher_visual, teacher_audio = normalise(teacher_visual), normalise(teacher_audio)
    all_usable = sharding.replicate(usable)
    count = all_usable.sum()

    def mean_distance(student: tuple[Array, Array], teacher: tuple[Array, Array]) -> Array:
        all_student, all_teacher = sharding.replicate((student[1], teacher[1]))

        def centred_softmax(rows: Array, columns: Array) -> Array:
            x = SOFT_LABEL_SCALE * jnp.matmul(rows, columns.T, precision=PRECISION)
            p = jax.nn.softmax(jnp.where(all_usable, x, MASKED), axis=1)
            # Times the count, p is near 1 whatever the batch: float32 keeps its digits.
            return jnp.where(all_usable, p * count - 1, 0.0)

        def distances(block: tuple[Array, Array, Array]) -> Array:
            student_rows, teacher_rows, usable_rows = block
            p = centred_softmax(student_rows, all_student)
            q = centred_softmax(teacher_rows, all_teacher)
            p_squares, q_squares = (p * p).sum(1), (q * q).sum(1)
            defined = jnp.minimum(p_squares, q_squares) > count * SPREAD_FLOOR**2
            # The inner `where` keeps 0 out of the root: its gradient there would be infinite.
            root = jnp.sqrt(jnp.where(defined, p_squares * q_squares, 1.0))
            correlation = jnp.where(defined, (p * q).sum(1) / root, 0.0)
            return jnp.where(usable_rows, 1 - correlation, 0.0)

        rows = (student[0], teacher[0], usable)
        return map_blocks(distances, rows, blocks).sum() / jnp.maximum(count, 1)

    loss = mean_distance((visual, audio), (teacher_visual, teacher_audio))
    loss += mean_distance((audio, visual), (teacher_audio, teacher_visual))
    return jnp.where(count >= 2, loss, 0.0)


def losses(
    text: Float[Array, "batch dim"],
    video: VideoEmbedding,
    teacher_video: Float[Array, "batch teacher"] | None,
    teacher_audio: Float[Array, "batch teacher"] | None,
    usable: Bool[Array, " batch"] | None,
    logit_scale: Float[Array, ""],
    config: LossConfig,
    shards: int = 1,
) -> Losses:
    """Computes both losses of a batch (spec section 6).

    Args:
        text: caption embeddings, row i the caption of video i; not normalised.
        video: what `SAVE.encode_video` returned.
        teacher_video, teacher_audio, usable: as in `soft_albef_loss`; None where its weight is 0.
        logit_scale: log of the similarity's scale.
        config: constants.
        shards: devices that the batch is spread over: how much memory there is for a block.
    """
    batch, frames = video.mask.shape
    blocks = fewest_blocks(batch, shards, MOST_SCORES // (batch * frames))
    contrastive = contrastive_loss(text, video, logit_scale, config, blocks)
    soft_albef = jnp.zeros(())
    if config.soft_albef_weight:
        assert video.audio is not None and usable is not None  # configs without sound are refused
        assert teacher_video is not None and teacher_audio is not None
        soft_albef = soft_albef_loss(
            normalise(normalise(video.visual).mean(axis=1)),
            normalise(normalise(video.audio).mean(axis=1)),
            teacher_video,
            teacher_audio,
            usable,
            blocks,
        )
    return Losses(contrastive + config.soft_albef_weight * soft_albef, contrastive, soft_albef)
