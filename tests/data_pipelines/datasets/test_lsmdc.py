import os
import shutil

import pytest

from data_pipelines.datasets import lsmdc
from save_jax.errors import UserError


def test_splits_and_clips(miniature_of):
    root = miniature_of("lsmdc")
    splits, problems = lsmdc.read_annotations(str(root), "default")
    assert {split: len(clips) for split, clips in splits.items()} == {
        "train": 3, "val": 2, "test": 2,
    }  # fmt: skip
    first, second = splits["train"][:2]
    assert first.video_id == "0001_A_Film_00.00.50.926-00.00.53.129"
    assert first.captions == (
        'SOMEONE says "a cat is running in the kitchen.',
        'SOMEONE says "a cat is dancing in the studio.',
    )
    assert len(second.captions) == len(second.groups) == 1
    assert first.video == str(root / "VideoData" / "0001_A_Film" / f"{first.video_id}.avi")
    assert os.path.exists(second.video) and os.path.exists(second.teacher_video)
    assert os.path.exists(lsmdc.asr_file(str(root)))
    assert not problems


def test_val_and_test_are_not_confused(miniature_of):
    splits, _ = lsmdc.read_annotations(str(miniature_of("lsmdc")), "default")
    ids = {split: [clip.video_id for clip in clips] for split, clips in splits.items()}
    for split, name in (("val", "annos_val"), ("test", "challenge_1000_publictect")):
        path = miniature_of("lsmdc") / "Annotations" / f"LSMDC16_{name}.csv"
        assert ids[split] == [line.split("\t")[0] for line in path.read_text().splitlines()]


def test_rows_that_stop_nothing(miniature_of, tmp_path):
    shutil.copytree(miniature_of("lsmdc") / "Annotations", tmp_path / "Annotations")
    path = tmp_path / "Annotations" / "LSMDC16_annos_val.csv"
    lines = path.read_text().splitlines()
    path.write_bytes("\ufeff{}\r\n{}\r\nbroken\r\n".format(*lines).encode())
    splits, problems = lsmdc.read_annotations(str(tmp_path), "default")
    assert len(splits["val"]) == 2
    assert splits["val"][1].captions[0].endswith(".")  # and no line end after it
    assert problems[0][1] == str(path) and problems[0][2].startswith("line 3 left out")
    with pytest.raises(UserError, match=r"(?s)LSMDC's.*_val\.csv.*publictect\.csv"):
        lsmdc.read_annotations(str(tmp_path / "nowhere"), "default")
