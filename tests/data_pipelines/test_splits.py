import json
import shutil

import numpy as np
import pytest

from data_pipelines import splits
from save_jax.errors import UserError
from tests.data_pipelines.conftest import SMALL


def test_the_caption_table(prepared):
    train, test_split = (
        splits.open_split(str(prepared), "msrvtt", "9k", name, {}) for name in ("train", "test")
    )
    table = splits.caption_table(test_split)
    assert table.texts == [captions[0] for captions in test_split.captions]
    assert table.video_rows.tolist() == [0, 1, 2, 3, 4] and table.video_rows.dtype == np.int32
    assert table.groups == [""] * 5
    assert splits.caption_table(train).video_rows.tolist() == [n // 20 for n in range(140)]


def test_an_absent_directory(tmp_path):
    with pytest.raises(UserError) as caught:
        splits.open_split(str(tmp_path), "msrvtt", "7k", "train", {**SMALL, "mel_bins": 128})
    message = str(caught.value)
    assert (
        f"python -m data_pipelines.prepare msrvtt --root=ROOT --out={tmp_path} --variant=7k "
        "--image_size=32 --max_frames=4 --fbank_frames=64"
    ) in message
    assert str(tmp_path / "msrvtt" / "7k" / "1.0.0" / "metadata.json") in message


def test_another_recipe(prepared):
    wanted = {"image_size": 224, "max_frames": 12, "mel_bins": 128, "fbank_frames": 64}
    with pytest.raises(UserError, match="image_size: wanted 224, prepared with 32") as caught:
        splits.open_split(str(prepared), "msrvtt", "9k", "train", wanted)
    message = str(caught.value)
    assert "--image_size=224 --max_frames=12 --fbank_frames=64" in message
    assert "config.model.clip.image_size = 32, config.data.max_frames = 4" in message
    assert "config.model.ast" not in message and "configs/README.md" in message


def test_an_absent_split(prepared):
    with pytest.raises(UserError, match=r"split 'val'.*there: test, train"):
        splits.open_split(str(prepared), "msrvtt", "9k", "val", {})


def test_lost_files(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "copy")
    directory = tmp_path / "copy" / "msrvtt" / "9k" / "1.0.0"
    (record,) = directory.glob("*test*array_record*")
    record.unlink()
    with pytest.raises(UserError, match=record.name):
        splits.open_split(str(tmp_path / "copy"), "msrvtt", "9k", "test", {})
    text = (directory / "index-train.json").read_text()
    (directory / "index-train.json").write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match=r"index-train\.json.*malformed"):
        splits.open_split(str(tmp_path / "copy"), "msrvtt", "9k", "train", {})
    assert json.loads(text)
