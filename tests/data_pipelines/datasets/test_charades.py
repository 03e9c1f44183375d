import os
import shutil

import pytest

from data_pipelines.datasets import charades
from data_pipelines.recipe import Recipe
from save_jax.errors import UserError


def test_splits_and_clips(miniature_of):
    root = miniature_of("charades")
    splits, problems = charades.read_annotations(str(root), "default")
    assert {split: len(clips) for split, clips in splits.items()} == {"train": 4, "test": 2}
    assert splits["train"][0].captions == ("a cat is running in the kitchen, then leaves.",)
    both = splits["train"] + splits["test"]
    found = [(clip.video, clip.audio) for clip in both]
    relative = [
        tuple(path and os.path.relpath(path, root) for path in its_paths) for its_paths in found
    ]
    assert relative == [
        ("ImageData/46GP8", "AudioData/46GP8.wav"),
        ("ImageData/N11GT", "VideoData/N11GT.mp4"),
        ("ImageData/0IH69", "VideoData/0IH69.mp4"),
        ("VideoData/KRF68.mp4", None),
        ("VideoData/MJO7C.mp4", None),
        ("VideoData/015XE.mp4", None),
    ]
    assert os.path.exists(charades.asr_file(str(root)))
    assert not problems


def test_its_recipe():
    recipe = Recipe(**charades.RECIPE)
    assert (recipe.max_frames, recipe.frames_per_second) == (32, 2)


def test_images_without_a_video_and_without_sound(miniature_of, tmp_path):
    shutil.copytree(miniature_of("charades") / "Annotations", tmp_path / "Annotations")
    for name in ("46GP8", "stray", ".hidden", "N11GT"):
        (tmp_path / "ImageData" / name).mkdir(parents=True)
        if name != "N11GT":
            (tmp_path / "ImageData" / name / "000001.jpg").write_bytes(b"x")
    splits, problems = charades.read_annotations(str(tmp_path), "default")
    clip = splits["train"][0]
    assert (clip.video, clip.audio) == (str(tmp_path / "ImageData" / "46GP8"), None)
    assert splits["train"][1].video == str(tmp_path / "VideoData" / "N11GT.mp4")  # no image
    stray = str(tmp_path / "ImageData" / "stray")
    assert problems == (("", stray, "not used: the annotations do not mention it"),)


def test_annotations_that_stop(tmp_path):
    with pytest.raises(UserError, match=r"(?s)Charades.*_train\.csv.*_test\.csv"):
        charades.read_annotations(str(tmp_path), "default")
    (tmp_path / "Annotations").mkdir()
    for split in ("train", "test"):
        (tmp_path / "Annotations" / f"Charades_v1_{split}.csv").write_text("id,actions\na,c1\n")
    with pytest.raises(UserError, match=r"_train\.csv: expected the columns id, script"):
        charades.read_annotations(str(tmp_path), "default")
