import json
import os
import shutil

import pytest

from data_pipelines.datasets import vatex
from save_jax.errors import UserError


@pytest.fixture
def root(miniature_of, tmp_path):
    """Annotations that a test may change."""
    shutil.copytree(miniature_of("vatex") / "Annotations", tmp_path / "Annotations")
    return tmp_path


def test_splits_and_clips(miniature_of):
    root = miniature_of("vatex")
    splits, problems = vatex.read_annotations(str(root), "default")
    assert {split: len(clips) for split, clips in splits.items()} == {
        "train": 4, "val": 2, "test": 2,
    }  # fmt: skip
    assert {len(clip.captions) for clips in splits.values() for clip in clips} == {3}
    first, second = splits["train"][:2]
    assert first.video_id == "-clip_0_000010_000020"
    assert first.captions[1] == "a cat is cooking in the street"
    assert first.video == str(root / "VideoData" / "-clip_0_000010_000020.mp4")
    assert second.video == str(root / "VideoData" / "-clip_1_000010_000020.webm")
    assert os.path.exists(first.teacher_video) and os.path.exists(first.teacher_audio)
    assert os.path.exists(vatex.asr_file(str(root)))
    assert not problems


def test_lists_that_do_not_quite_fit(root):
    """Windows line ends, a byte-order mark, ids listed twice, in two splits, without captions."""
    path = root / "Annotations" / "train_list.txt"
    ids = path.read_text().split()
    path.write_text("\ufeff" + "\r\n".join([*ids, ids[0], "stranger", ids[1]]) + "\r\n")
    val = root / "Annotations" / "val_list.txt"
    val.write_text(val.read_text() + ids[2])
    splits, problems = vatex.read_annotations(str(root), "default")
    assert [clip.video_id for clip in splits["train"]] == [*ids, "stranger"]
    assert splits["train"][-1].captions == ()
    lists = str(path)
    assert problems == (
        ("", lists, f"line 5 left out: {ids[0]} is listed before"),
        ("", lists, f"line 7 left out: {ids[1]} is listed before"),
        ("train", "stranger", f"no captions in {root / 'Annotations' / 'ref_captions.json'}"),
        ("val", ids[2], "it is in the split 'train' too"),
    )


def test_absent_files(tmp_path):
    with pytest.raises(UserError, match="VATEX") as caught:
        vatex.read_annotations(str(tmp_path), "default")
    for name in ("train_list.txt", "val_list.txt", "test_list.txt", "ref_captions.json"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("[]", "found a list"),
        ('{"a": "one"}', "something else for 'a'"),
        ('{"a": [1]}', "something else for 'a'"),
        ('{"a": ["one"}', "line 1, column 13"),
        (json.dumps({"other": ["one"]}), "'-clip_0_000010_000020' first. Do the two files"),
    ],
)
def test_captions_that_stop(root, content, found):
    (root / "Annotations" / "ref_captions.json").write_text(content)
    with pytest.raises(UserError, match=found) as caught:
        vatex.read_annotations(str(root), "default")
    assert "ref_captions.json" in str(caught.value)
