"""A tiny model and random data in memory: what tests of training and evaluation run on."""

from collections.abc import Iterator

import jax
import numpy as np

from save_jax import sharding
from save_jax.batch import Batch
from save_jax.evaluate import EvaluationSet
from save_jax.models.ast import ASTConfig
from save_jax.models.clip import CLIPConfig
from save_jax.models.save import SAVEConfig
from save_jax.train import TrainingSet

FRAMES, WORDS, CLIPS = 3, 8, 32

MODEL = SAVEConfig(
    clip=CLIPConfig(
        embed_dim=16,
        image_size=16,
        patch_size=8,
        vision_width=16,
        vision_layers=1,
        vision_heads=2,
        vocab_size=64,
        text_width=16,
        text_layers=1,
        text_heads=2,
    ),
    ast=ASTConfig(fbank_frames=32, mel_bins=32, stride=16, width=16, layers=1, heads=2),
    fusion_layers=1,
    audio_queries=4,
)


def clips(seed: int = 0, count: int = CLIPS) -> Batch:
    """`count` random clips with one caption each; some lack frames, sound or a transcript."""
    rng = np.random.default_rng(seed)

    def ids() -> np.ndarray:
        tokens = rng.integers(1, 62, (count, WORDS)).astype(np.int32)
        tokens[:, 0], tokens[:, -1] = 62, 63
        return tokens

    mask = np.arange(FRAMES) < rng.integers(1, FRAMES + 1, count)[:, None]
    has_audio = rng.random(count) < 0.8
    transcripts = ids() * (rng.random(count) < 0.7)[:, None]
    fbank = rng.normal(size=(count, 32, 32)) * has_audio[:, None, None]
    return Batch(
        frames=rng.integers(0, 256, (count, FRAMES, 16, 16, 3)).astype(np.uint8),
        frame_mask=mask,
        caption_ids=ids(),
        transcript_ids=transcripts.astype(np.int32),
        fbank=fbank.astype(np.float16),
        has_audio=has_audio,
        teacher_video=rng.normal(size=(count, 24)).astype(np.float32),
        teacher_audio=rng.normal(size=(count, 24)).astype(np.float32),
        has_teacher=np.ones(count, bool),
        index=np.arange(count, dtype=np.int32),
    )


def rows(batch: Batch, order: np.ndarray) -> Batch:
    """The same clips in another order, or some of them."""
    return Batch(*[None if a is None else a[order] for a in batch])


def share(order: np.ndarray) -> np.ndarray:
    """This process's rows of a global batch, as `save_jax.data` has them read."""
    if jax.process_count() == 1:
        return order
    return order[sharding.process_rows(sharding.make_mesh({"data": -1}), len(order))]


def training_set(batch_size: int, data: Batch | None = None) -> TrainingSet:
    """Batches whose order is a function of the epoch."""
    data = clips() if data is None else data
    per_epoch = len(data.index) // batch_size

    def batches(start: int, steps: int) -> Iterator[Batch]:
        for step in range(start, steps):
            epoch, within = divmod(step, per_epoch)
            order = np.random.default_rng([7, epoch]).permutation(len(data.index))
            yield rows(data, share(order[within * batch_size : (within + 1) * batch_size]))

    return TrainingSet(batches, per_epoch, lambda row: f"clip{row}")


def evaluation_set(batch_size: int, count: int = 11) -> EvaluationSet:
    """`count` clips in padded batches; every third clip has a second caption."""
    data = clips(1, count)
    second = np.arange(0, count, 3)
    video_of_caption = np.concatenate([np.arange(count), second]).astype(np.int32)
    caption_ids = np.concatenate([data.caption_ids, clips(2, count).caption_ids[second]])

    def batches() -> Iterator[Batch]:
        for start in range(0, count, batch_size):
            order = share(np.arange(start, start + batch_size))
            batch = rows(data, order % count)._replace(caption_ids=None)
            yield batch._replace(index=np.where(order < count, order, -1).astype(np.int32))

    names = [f"clip{i}" for i in range(count)]
    return EvaluationSet(
        "test",
        batches,
        names,
        [f"caption {i}" for i in range(len(caption_ids))],
        caption_ids,
        video_of_caption,
        ["sound" if i % 2 else "" for i in range(len(caption_ids))],
    )
