import contextlib
import os
import pathlib
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

from data_pipelines import input as pipeline
from data_pipelines.modalities import video
from data_pipelines.preparation import prepare
from data_pipelines.recipe import Recipe
from data_pipelines.splits import caption_table, open_split, records_sample
from save_jax.batch import Batch
from save_jax.errors import UserError
from save_jax.tokenizer import Tokenizer
from tests.data_pipelines.conftest import SMALL

EVERYTHING = {"sound": True, "speech": True, "teacher": True}
NOTHING = {"sound": False, "speech": False, "teacher": False}
# What only a cache gives.
FROM_A_CACHE = set(Batch._field_defaults)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer()


@pytest.fixture(scope="module")
def train(prepared):
    return open_split(str(prepared), "msrvtt", "9k", "train", SMALL)


@pytest.fixture(scope="module")
def test_split(prepared):
    return open_split(str(prepared), "msrvtt", "9k", "test", {})


def batches(split, tokenizer, *, stop, start=0, batch_size=16, seed=3, fields=NOTHING, **kwargs):
    return list(
        pipeline.train_batches(
            split, batch_size=batch_size, seed=seed, start_step=start, total_steps=stop,
            max_words=12, tokenizer=tokenizer, **fields, **kwargs,
        )
    )  # fmt: skip


def pairs(batch):
    """(row, caption's ids) of each row of a batch."""
    return [(int(row), tuple(ids)) for row, ids in zip(batch.index, batch.caption_ids.tolist(),
                                                       strict=True)]  # fmt: skip


def given(batch):
    """The arrays that a batch has, by name."""
    return {name: array for name, array in batch._asdict().items() if array is not None}


def test_a_split(train):
    assert (train.num_clips, train.num_pairs, train.name) == (7, 140, "train")
    assert train.video_ids == [f"video{n}" for n in range(7)]
    assert train.captions[2][0] == "a drummer is talking in the kitchen"
    assert train.groups[2] == [""] * 20
    assert train.transcripts[3] == "" and train.transcripts[0].startswith("a cat")
    assert train.has_audio.tolist() == [True, True, True, False, True, True, True]
    assert train.recipe == Recipe(encoding="raw", **SMALL)


def test_a_training_batch(train, tokenizer, miniature):
    (batch,) = batches(train, tokenizer, stop=1, fields=EVERYTHING)
    expected = {
        "frames": ((16, 4, 32, 32, 3), np.uint8),
        "frame_mask": ((16, 4), np.bool_),
        "caption_ids": ((16, 12), np.int32),
        "transcript_ids": ((16, 12), np.int32),
        "fbank": ((16, 64, 128), np.float16),
        "has_audio": ((16,), np.bool_),
        "teacher_video": ((16, 1024), np.float32),
        "teacher_audio": ((16, 1024), np.float32),
        "has_teacher": ((16,), np.bool_),
        "index": ((16,), np.int32),
        "caption_index": ((16,), np.int32),
    }
    found = {name: (array.shape, array.dtype) for name, array in given(batch).items()}
    assert found == expected
    captions = {tuple(tokenizer([c], 12)[0]): row for row in range(7) for c in train.captions[row]}
    for i, row in enumerate(batch.index):
        frames = video.decode_frames(
            miniature / "VideoData" / f"{train.video_ids[row]}.mp4", train.recipe
        )
        np.testing.assert_array_equal(batch.frames[i, :3], frames)  # stored raw: exactly
        assert not batch.frames[i, 3:].any()
        assert batch.frame_mask[i].tolist() == [True, True, True, False]
        assert captions[tuple(batch.caption_ids[i])] == row
        np.testing.assert_array_equal(
            batch.transcript_ids[i], tokenizer([train.transcripts[row]], 12)[0]
        )
        assert batch.has_audio[i] == batch.fbank[i].any() == (row % 4 != 3)
        assert batch.has_teacher[i] == batch.teacher_audio[i].any() == (row % 4 != 3)


def test_what_is_not_wanted_is_none(train, tokenizer):
    (batch,) = batches(train, tokenizer, stop=1)
    assert set(given(batch)) == {"frames", "frame_mask", "caption_ids", "index", "caption_index"}


def test_each_pair_once_an_epoch(train, tokenizer):
    assert pipeline.steps_per_epoch(train, 20) == 7
    found = batches(train, tokenizer, stop=14, batch_size=20)
    whole = Counter(
        (row, tuple(ids))
        for row, captions in enumerate(train.captions)
        for ids in tokenizer(captions, 12).tolist()
    )
    epochs = [[p for batch in found[e * 7 : e * 7 + 7] for p in pairs(batch)] for e in (0, 1)]
    assert Counter(epochs[0]) == Counter(epochs[1]) == whole
    assert epochs[0] != epochs[1]


def test_the_last_incomplete_batch_is_dropped(train, tokenizer):
    assert pipeline.steps_per_epoch(train, 16) == 8  # of 140
    found = batches(train, tokenizer, stop=9)
    order = pipeline.epoch_order(3, 1, 140)
    rows = caption_table(train).video_rows
    np.testing.assert_array_equal(found[8].index, rows[order[:16]])


def test_the_order_depends_on_the_seed_only(train, tokenizer):
    one, same, other = (
        [pairs(b) for b in batches(train, tokenizer, stop=3, seed=seed)] for seed in (1, 1, 2)
    )
    assert one == same != other


# Which rows of a global batch each process reads: blocks in order, and as on a TPU slice.
SHARES = [
    lambda rows: np.split(rows, 2),
    lambda rows: np.split(rows, 4),
    lambda rows: [rows[::2], rows[1::2]],
    lambda rows: [rows[rows % 4 % 3 == 0], rows[rows % 4 % 3 != 0]],
]


@pytest.mark.parametrize("cut", SHARES)
def test_processes_share_the_same_batches(train, tokenizer, cut):
    whole = batches(train, tokenizer, stop=10, fields=EVERYTHING)
    for share in cut(np.arange(16)):
        own = batches(train, tokenizer, stop=10, fields=EVERYTHING, share=share)
        for part, batch in zip(own, whole, strict=True):
            for name in set(batch._fields) - FROM_A_CACHE | {"caption_index"}:
                expected = getattr(batch, name)[share]
                np.testing.assert_array_equal(getattr(part, name), expected, err_msg=name)


@pytest.mark.parametrize("start", [1, 8, 11])
def test_going_on_is_as_if_never_stopped(train, tokenizer, start):
    whole = batches(train, tokenizer, stop=13, fields=EVERYTHING)
    rest = batches(train, tokenizer, start=start, stop=13, fields=EVERYTHING)
    assert len(rest) == 13 - start
    for expected, found in zip(whole[start:], rest, strict=True):
        for name, array in expected._asdict().items():
            np.testing.assert_array_equal(getattr(found, name), array, err_msg=name)


def test_skipped_steps_are_not_read(train, tokenizer, monkeypatch):
    read = []
    source = pipeline.array_record_data_source.ArrayRecordDataSource
    original = source.__getitem__
    monkeypatch.setattr(
        source, "__getitem__", lambda self, row: read.append(row) or original(self, row)
    )
    batches(train, tokenizer, start=100_000, stop=100_002)
    assert len(read) == 2 * 16


def test_reading_ahead_is_bounded(train, tokenizer, monkeypatch):
    read = []
    source = pipeline.array_record_data_source.ArrayRecordDataSource
    original = source.__getitem__
    monkeypatch.setattr(
        source, "__getitem__", lambda self, row: read.append(row) or original(self, row)
    )
    taken = pipeline.train_batches(
        train, batch_size=16, seed=0, start_step=0, total_steps=10_000, max_words=12,
        tokenizer=tokenizer, **EVERYTHING,
    )  # fmt: skip
    for batch in range(1, 4):
        next(taken)
        time.sleep(1)  # it would have read many hundreds
        assert len(read) <= (batch + 16) * 16
    taken.close()


def test_reading_needs_no_decoder_of_videos():
    code = "import sys; sys.modules['av'] = None; import data_pipelines.input"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_left_to_do(train, tokenizer):
    assert batches(train, tokenizer, start=5, stop=5) == []


@pytest.mark.parametrize("cut", [lambda rows: [rows], *SHARES])
def test_clips_for_embedding(test_split, tokenizer, cut):
    shares = cut(np.arange(4))
    parts = [
        list(
            pipeline.clip_batches(
                test_split, batch_size=4, max_words=12, sound=True, speech=True,
                tokenizer=tokenizer, share=share,
            )
        )
        for share in shares
    ]  # fmt: skip
    assert {len(part) for part in parts} == {2}
    index = np.full((2, 4), -2)
    for share, part in zip(shares, parts, strict=True):
        for step, batch in enumerate(part):
            index[step, share] = batch.index
            assert batch.frames.shape == (len(share), 4, 32, 32, 3)
            # What fills up is a clip like others: no empty mask.
            assert batch.frame_mask.any(axis=1).all()
            assert batch.caption_ids is None and batch.teacher_video is None
            for row, its_index in enumerate(batch.index):
                if its_index >= 0:
                    assert batch.has_audio[row] == test_split.has_audio[its_index]
                    assert batch.fbank[row].any() == test_split.has_audio[its_index]
    assert index.tolist() == [[0, 1, 2, 3], [4, -1, -1, -1]]


def test_batches_that_cannot_be(train):
    with pytest.raises(UserError, match=r"batch of 141 .* found 140 captions of 7 clips"):
        pipeline.steps_per_epoch(train, 141)


def test_frames_stored_as_jpeg(miniature, tmp_path, train, tokenizer):
    prepare("msrvtt", root=str(miniature), out=str(tmp_path), recipe=Recipe(**SMALL), workers=1)
    split = open_split(str(tmp_path), "msrvtt", "9k", "train", SMALL)
    (lossy,) = batches(split, tokenizer, stop=1)
    (exact,) = batches(train, tokenizer, stop=1)
    assert 0 < np.abs(lossy.frames.astype(int) - exact.frames).mean() < 3


def open_records(split) -> int:
    """How many of a split's files this process has open."""
    links = []
    for descriptor in pathlib.Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            links.append(os.readlink(descriptor))
    return sum(links.count(path) for path in split.record_paths)


def test_every_pass_closes_its_files(train, tokenizer):
    before = open_records(train)
    for _ in range(3):
        batches(train, tokenizer, stop=2, fields=EVERYTHING)
        list(pipeline.clip_batches(train, batch_size=2, max_words=12, tokenizer=tokenizer,
                                   **EVERYTHING))  # fmt: skip
        records_sample(train, 2)
    assert open_records(train) == before


def test_a_pass_that_is_left_closes_its_files_too(train, tokenizer):
    before = open_records(train)
    for _ in range(3):
        passing = pipeline.train_batches(
            train, batch_size=16, seed=3, start_step=0, total_steps=1000, max_words=12,
            tokenizer=tokenizer, **EVERYTHING,
        )  # fmt: skip
        next(passing)
        passing.close()
    assert open_records(train) == before
