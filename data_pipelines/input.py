"""Prepared clips in, batches out: shuffled, sharded, resumable (tf.data).

The order of training is a function of (seed, epoch) alone. The numbers of processes and threads,
and where a run was interrupted, do not change it.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from array_record.python import array_record_data_source

from data_pipelines.recipe import Recipe
from data_pipelines.splits import Split, caption_table
from save_jax.batch import Batch
from save_jax.errors import UserError
from save_jax.messages import counted
from save_jax.tokenizer import Tokenizer

# TensorFlow only reads and decodes here, but would reserve the whole GPU when it is first used. If
# it was used before, this setting can no longer be changed.
with contextlib.suppress(RuntimeError):
    tf.config.set_visible_devices([], "GPU")


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """Returns the number of batches of `batch_size` pairs per epoch, dropping an incomplete one.

    Raises:
        UserError: the split has fewer pairs than a batch.
    """
    steps = split.num_pairs // batch_size
    if steps == 0:
        raise UserError(
            f"expected at least one batch of {batch_size} captions in the split {split.name!r}, "
            f"found {counted(split.num_pairs, 'caption')} of {counted(split.num_clips, 'clip')}. "
            "Lower --config.batch_size."
        )
    return steps


def train_batches(
    split: Split,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    total_steps: int,
    max_words: int,
    sound: bool,
    speech: bool,
    teacher: bool,
    tokenizer: Tokenizer,
    frames: bool = True,
    share: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Yields this process's share of the batches of steps start_step … total_steps − 1.

    Every (clip, caption) pair occurs once per epoch, except the last few, which do not fill a
    batch. Steps before `start_step` cost nothing.

    Args:
        split: what to train on.
        batch_size: pairs in the global batch.
        seed: decides the order.
        start_step: the first step, counted from 0 over all epochs.
        total_steps: the step to stop before.
        max_words: L, ids per text.
        sound: whether to read filterbanks.
        speech: whether to include transcripts.
        teacher: whether to read the teacher's vectors.
        tokenizer: turns texts into ids.
        frames: whether to read frames.
        share: int [rows], the rows of the global batch that this process reads; None = all.

    Raises:
        UserError: the split is smaller than a batch.
    """
    per_epoch = steps_per_epoch(split, batch_size)
    share = np.arange(batch_size) if share is None else share
    table = caption_table(split)
    caption_ids = tokenizer(table.texts, max_words)
    transcript_ids = tokenizer(split.transcripts, max_words) if speech else None

    @functools.lru_cache(maxsize=2)  # prefetching may be in the next epoch already
    def order(epoch: int) -> np.ndarray:
        return epoch_order(seed, epoch, split.num_pairs)

    def pairs_of(step: int) -> np.ndarray:
        epoch, step_in_epoch = divmod(step, per_epoch)
        return order(epoch)[step_in_epoch * batch_size + share]

    def batches() -> Iterator[Batch]:
        steps = range(start_step, total_steps)
        wanted = {"frames": frames, "sound": sound, "teacher": teacher}
        read = _read(split, steps, lambda step: table.video_rows[pairs_of(step)], **wanted)
        for step, arrays in zip(steps, read, strict=True):
            pairs = pairs_of(step)
            rows = table.video_rows[pairs]
            batch = _batch(split, arrays, rows, caption_ids[pairs], transcript_ids, sound, teacher)
            yield batch._replace(caption_index=pairs.astype(np.int32))

    return batches()


def epoch_order(seed: int, epoch: int, num_pairs: int) -> np.ndarray:
    """Returns the order of all pairs in an epoch, int [num_pairs], a function of the arguments."""
    return np.random.default_rng(np.random.SeedSequence([seed, epoch])).permutation(num_pairs)


def clip_batches(
    split: Split, *, batch_size: int, share: np.ndarray | None = None, **reading: Any
) -> Iterator[Batch]:
    """Yields this process's share of all clips, each once, in order, for embedding.

    The last batch is padded with rows whose `index` is -1, so that every process yields the same
    number of batches of the same size.

    Args:
        split: the clips.
        batch_size: clips in the global batch.
        share: int [rows], the rows of the global batch that this process reads; None = all.
        reading: what to read of them, as in `chosen_clips`.
    """
    steps = -(-split.num_clips // batch_size)
    rows = np.arange(steps * batch_size, dtype=np.int32).reshape(steps, batch_size)
    index = np.where(rows < split.num_clips, rows, -1)
    return chosen_clips(split, index if share is None else index[:, share], **reading)


def chosen_clips(
    split: Split,
    index: np.ndarray,
    *,
    max_words: int,
    sound: bool,
    speech: bool,
    tokenizer: Tokenizer,
    teacher: bool = False,
    frames: bool = True,
) -> Iterator[Batch]:
    """Yields batches of chosen clips, for embedding.

    Args:
        split: the clips.
        index: int32 [batches, rows], the clips of each batch; -1 fills up.
        max_words: L, ids per transcript.
        sound: whether to read filterbanks.
        speech: whether to include transcripts.
        tokenizer: turns texts into ids.
        teacher: whether to read the teacher's vectors.
        frames: whether to read frames.
    """
    transcript_ids = tokenizer(split.transcripts, max_words) if speech else None

    def rows_of(step: int) -> np.ndarray:
        return np.maximum(index[step], 0)

    def batches() -> Iterator[Batch]:
        steps = range(len(index))
        read = _read(split, steps, rows_of, frames=frames, sound=sound, teacher=teacher)
        for step, arrays in zip(steps, read, strict=True):
            rows = rows_of(step)
            batch = _batch(split, arrays, rows, None, transcript_ids, sound, teacher)
            yield batch._replace(index=index[step])

    return batches()


def _batch(
    split: Split,
    arrays: dict[str, np.ndarray],
    rows: np.ndarray,
    caption_ids: np.ndarray | None,
    transcript_ids: np.ndarray | None,
    sound: bool,
    teacher: bool,
) -> Batch:
    """Joins the arrays that were read for each row with those that are in memory already."""
    return Batch(
        frames=arrays.get("frames"),
        frame_mask=arrays.get("frame_mask"),
        caption_ids=caption_ids,
        transcript_ids=None if transcript_ids is None else transcript_ids[rows],
        fbank=arrays.get("fbank"),
        has_audio=split.has_audio[rows] if sound else None,
        teacher_video=arrays.get("teacher_video"),
        teacher_audio=arrays.get("teacher_audio"),
        has_teacher=split.has_teacher[rows] if teacher else None,
        index=rows,
    )


def _read(
    split: Split,
    steps: range,
    rows_of: Callable[[int], np.ndarray],
    *,
    frames: bool,
    sound: bool,
    teacher: bool,
) -> Iterator[dict[str, np.ndarray]]:
    """Reads, decodes and prefetches the heavy arrays of each step's clips.

    Args:
        split: the clips.
        steps: the steps, contiguous.
        rows_of: returns the rows of a step's clips, equally many for each step.
        frames: whether to read frames.
        sound: whether to read filterbanks.
        teacher: whether to read the teacher's vectors.
    """
    if not steps:
        return
    if not (frames or sound or teacher):
        yield from ({} for _ in steps)
        return
    records = array_record_data_source.ArrayRecordDataSource(split.record_paths)
    # TensorFlow keeps `read`, and so `records`, alive for as long as the process lives: unless this
    # pass closes its files, they stay open, and a long run ends in "Too many open files".
    lock, over = threading.Lock(), False

    def read(step: np.int64) -> np.ndarray:
        with lock:
            if over:  # the pass ended while it was prefetching
                raise RuntimeError("this pass over the records is over")
            return np.array([records[row] for row in rows_of(int(step))], object)

    def read_step(step: tf.Tensor) -> tf.Tensor:
        serialized = tf.numpy_function(read, [step], tf.string, stateful=False)
        return tf.ensure_shape(serialized, [batch_size])

    batch_size = len(rows_of(steps.start))
    options = tf.data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = max(2, os.cpu_count() or 1)
    options.threading.max_intra_op_parallelism = 1  # clips are decoded in parallel already
    dataset = (
        tf.data.Dataset.range(steps.start, steps.stop)
        .map(read_step)
        .prefetch(1)
        .unbatch()
        .map(
            functools.partial(
                _parse, recipe=split.recipe, frames=frames, sound=sound, teacher=teacher
            ),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
        .batch(batch_size, drop_remainder=True)
        .prefetch(2)
        .with_options(options)
    )
    try:
        yield from dataset.as_numpy_iterator()
    finally:
        with lock:
            over = True
            records.__exit__(None, None, None)


def _parse(
    serialized: tf.Tensor, *, recipe: Recipe, frames: bool, sound: bool, teacher: bool
) -> dict[str, tf.Tensor]:
    """Decodes the wanted features of a record (storage/tfds_format.py)."""
    wanted = {}
    if frames:
        wanted["frames"] = tf.io.FixedLenSequenceFeature([], tf.string, allow_missing=True)
    if sound:
        wanted["fbank"] = tf.io.FixedLenFeature([], tf.string)
    if teacher:
        vector = tf.io.FixedLenFeature([recipe.teacher_size], tf.float32)
        wanted |= {"teacher_video": vector, "teacher_audio": vector}
    record = tf.io.parse_single_example(serialized, wanted)

    if frames:
        count = tf.size(record["frames"])
        record["frames"] = _decode_frames(record["frames"], recipe)
        record["frame_mask"] = tf.range(recipe.max_frames) < count
    if sound:
        record["fbank"] = tf.reshape(
            tf.io.decode_raw(record["fbank"], tf.float16), [recipe.fbank_frames, recipe.mel_bins]
        )
    return record


def _decode_frames(stored: tf.Tensor, recipe: Recipe) -> tf.Tensor:
    """Decodes the frames of a clip, string [frames], and adds black ones up to max_frames."""
    size, most = recipe.image_size, recipe.max_frames
    missing = most - tf.size(stored)
    if recipe.encoding == "raw":
        absent = tf.zeros([missing * size * size * 3], tf.uint8)
        joined = tf.io.decode_raw(tf.strings.reduce_join(stored), tf.uint8)
        return tf.reshape(tf.concat([joined, absent], 0), [most, size, size, 3])
    frames = tf.map_fn(
        # The default method may be an approximation.
        functools.partial(tf.io.decode_jpeg, channels=3, dct_method="INTEGER_ACCURATE"),
        stored,
        fn_output_signature=tf.TensorSpec([size, size, 3], tf.uint8),
    )
    frames = tf.pad(frames, [[0, missing], [0, 0], [0, 0], [0, 0]])
    return tf.ensure_shape(frames, [most, size, size, 3])
