"""data_pipelines/prepare.py together with datasets/builder.py, which it drives."""

import csv
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
import torch

from data_pipelines import prepare as module
from data_pipelines.prepare import main, prepare
from data_pipelines.recipe import Recipe
from save_jax.errors import UserError
from tests.data_pipelines.conftest import SMALL

FLAGS = [f"--{key}={value}" for key, value in SMALL.items()]
RECIPE = Recipe(**SMALL)


@pytest.fixture
def root(miniature, tmp_path):
    """A copy of the miniature that a test may damage."""
    shutil.copytree(miniature, tmp_path / "root", copy_function=os.link)
    return tmp_path / "root"


def replace(path, content):
    path.unlink()  # it is a hard link to the shared one
    path.write_bytes(content)


def index(directory, split):
    return json.loads((directory / f"index-{split}.json").read_text())


def test_what_is_written(prepared):
    directory = prepared / "msrvtt" / "9k" / "1.0.0"
    builder = tfds.builder_from_directory(directory)
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {
        "train": 7,
        "test": 5,
    }
    records = builder.as_data_source("train")
    entries = index(directory, "train")
    assert [r["video_id"].decode() for r in records] == [f"video{n}" for n in range(7)]
    assert [entry["video_id"] for entry in entries] == [f"video{n}" for n in range(7)]
    record, entry = records[4], entries[4]
    assert record["fbank"].shape == (64, 128) and record["fbank"].dtype == np.float16
    assert record["num_frames"] == len(record["frames"]) == entry["num_frames"] == 3
    assert [c.decode() for c in record["captions"]] == entry["captions"]
    assert len(record["captions"]) == 20  # and the frames once
    assert record["teacher_video"].shape == (1024,) and record["has_teacher"]
    assert [bool(r["has_audio"]) for r in records] == [e["has_audio"] for e in entries]
    assert [e["has_audio"] for e in entries] == [n % 4 != 3 for n in range(7)]


def test_the_recipe_and_the_counts_are_recorded(prepared):
    directory = prepared / "msrvtt" / "9k" / "1.0.0"
    assert module.prepared_by(directory) == Recipe(encoding="png", **SMALL)
    counts = json.loads((directory / "metadata.json").read_text())["counts"]
    assert counts["train"] == {
        "listed": 7,
        "prepared": 7,
        "left out": 0,
        "captions": 140,
        "without audio": 1,
        "without transcript": 3,
        "without teacher": 1,
        "problems": 0,
    }
    assert (directory / "problems.csv").read_text().splitlines() == ["split,video_id,problem"]
    assert sorted(os.listdir(prepared)) == ["msrvtt"]  # nothing is left lying about


def damage(root):
    """Spoils some files of the 9k variant; returns the clips that are to be named, and left out."""
    (root / "VideoData" / "video0.mp4").unlink()
    replace(root / "VideoData" / "video1.mp4", b"")
    replace(root / "VideoData" / "video2.mp4", b"this is text\n" * 100)
    features = root / "FeatureData" / "ImageBind"
    (features / "VideoFeature" / "video4.pt").unlink()
    torch.save(torch.ones(512), features / "VideoFeature" / "video4.pt")
    (features / "AudioFeature" / "video5.pt").unlink()
    torch.save(torch.full((1024,), torch.nan), features / "AudioFeature" / "video5.pt")
    (root / "AudioData" / "video6.wav").write_bytes(b"")
    return ["video0", "video1", "video2", "video4", "video5", "video6"], 3


def test_bad_files_are_counted_and_named(root, tmp_path, caplog, capsys):
    named, left_out = damage(root)
    assert main(["msrvtt", f"--root={root}", "--workers=1", *FLAGS]) == 0
    directory = root / "prepared" / "msrvtt" / "9k" / "1.0.0"
    with (directory / "problems.csv").open() as file:
        problems = list(csv.DictReader(file))
    assert [problem["video_id"] for problem in problems] == named
    assert {problem["split"] for problem in problems} == {"train"}
    entries = {entry["video_id"]: entry for entry in index(directory, "train")}
    assert list(entries) == ["video3", "video4", "video5", "video6"]
    assert not entries["video4"]["has_teacher"] and not entries["video5"]["has_teacher"]
    assert entries["video6"]["has_audio"]  # from the video's own track
    counts = json.loads((directory / "metadata.json").read_text())["counts"]["train"]
    assert (counts["listed"], counts["prepared"], counts["left out"]) == (7, 4, left_out)
    assert counts["problems"] == 6
    assert "6 problems" in caplog.text and "video0.mp4" in caplog.text
    printed = capsys.readouterr().out
    assert str(directory / "problems.csv") in printed and len(printed.splitlines()) < 20
    records = tfds.builder_from_directory(directory).as_data_source("train")
    assert [record["video_id"].decode() for record in records] == list(entries)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda root: (root / "VideoData" / "video1.mp4").unlink(),
        lambda root: replace(root / "FeatureData/ImageBind/VideoFeature/video1.pt", b"x"),
        lambda root: (root / "AudioData" / "video1.wav").write_bytes(b""),
    ],
)
def test_strict_stops_at_a_bad_file(root, spoil, capsys):
    spoil(root)
    assert main(["msrvtt", f"--root={root}", "--workers=1", "--strict", *FLAGS]) == 2
    error = capsys.readouterr().err
    assert "error: msrvtt, split 'train', clip video1" in error and "Traceback" not in error
    assert not list((root / "prepared").rglob("metadata.json"))


def test_strict_accepts_clips_without_sound(miniature, tmp_path):
    prepare("msrvtt", root=str(miniature), out=str(tmp_path), variant="7k", recipe=RECIPE,
            workers=1, strict=True)  # fmt: skip
    counts = json.loads((tmp_path / "msrvtt/7k/1.0.0/metadata.json").read_text())["counts"]
    assert {split: its["prepared"] for split, its in counts.items()} == {
        "train": 5, "val": 2, "test": 5,
    }  # fmt: skip


def test_a_split_without_any_usable_clip(root):
    for video in (root / "VideoData").iterdir():
        replace(video, b"")
    with pytest.raises(UserError, match=r"split 'train'.* none usable among 7.*0 bytes"):
        prepare("msrvtt", root=str(root), recipe=RECIPE, workers=1)
    assert not list((root / "prepared").rglob("index-*.json"))


def test_doing_it_again(prepared, miniature, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "data_pipelines.datasets.builder", None)  # not needed again
    again = ["msrvtt", f"--root={miniature}", f"--out={prepared}", "--encoding=png", *FLAGS]
    assert main(again) == 0
    assert "Already prepared" in capsys.readouterr().out
    assert main([*again, "--image_size=48"]) == 2
    error = capsys.readouterr().err
    assert "image_size: wanted 48, prepared with 32" in error and "max_frames" not in error


def test_an_unfinished_directory(tmp_path):
    (tmp_path / "out" / "msrvtt" / "9k" / "1.0.0").mkdir(parents=True)
    with pytest.raises(UserError, match=r"metadata\.json.*Remove it"):
        prepare("msrvtt", root=str(tmp_path), out=str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["nosuch", "--root=."], "found 'nosuch'"),
        (["msrvtt"], "--root=DIR"),
        (["demo"], "--out=DIR is enough"),
        (["msrvtt", "--root=/nowhere"], "--root=/nowhere, found none"),
        (["msrvtt", "--root=.", "--variant=8k"], "found '8k'"),
        (["msrvtt", "--root=.", "--image_size=0"], "--image_size of at least 1"),
        (["msrvtt", "--root=.", "--workers=-1"], "--workers of at least 0"),
    ],
)
def test_mistakes_on_the_command_line(arguments, found, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert found in printed.err and printed.err.startswith("error: ") and not printed.out


def test_an_out_that_cannot_be_written(miniature, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"--out=.*file"):
        prepare("msrvtt", root=str(miniature), out=str(tmp_path / "file" / "out"), recipe=RECIPE)


def test_records_keep_their_order_when_they_do_not_fit_in_memory(miniature, tmp_path, monkeypatch):
    from tensorflow_datasets.core import shuffle

    from data_pipelines.datasets import builder

    buckets = []
    number_of = shuffle.get_bucket_number
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 0)
    monkeypatch.setattr(
        shuffle, "get_bucket_number", lambda **kw: buckets.append(number_of(**kw)) or buckets[-1]
    )
    splits = builder.read_records  # read each clip once, then list it many times
    clips = module.datasets.load_dataset("msrvtt").read_annotations(str(miniature), "9k")["test"]
    first = next(splits(clips, RECIPE, 1))
    many = [f"clip{n}" for n in range(250)]

    def copies(clips, recipe, workers):
        for name in clips:
            yield type(first)(first.clip, {**first.features, "video_id": name}, ())

    monkeypatch.setattr(builder, "read_records", copies)
    builder.ClipsBuilder(
        out=str(tmp_path), dataset="many", variant="all", recipe=RECIPE, splits={"train": many},
        workers=1, strict=False,
    ).build()  # fmt: skip
    directory = tmp_path / "many" / "all" / "1.0.0"
    records = tfds.builder_from_directory(directory).as_data_source("train")
    assert [record["video_id"].decode() for record in records] == many
    assert len(set(buckets)) > 50  # not all in one, which would hold the whole split in memory


def test_the_command(miniature, tmp_path):
    command = [sys.executable, "-m", "data_pipelines.prepare", "msrvtt", f"--root={miniature}",
               f"--out={tmp_path}", "--workers=2", "--variant=7k-1ka", *FLAGS]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert "7k-1ka" in found.stdout and "train" in found.stdout
    assert len(index(tmp_path / "msrvtt" / "7k-1ka" / "1.0.0", "train")) == 7
    assert "Traceback" not in found.stderr and "oneDNN" not in found.stderr


def test_the_demo_corpus_is_made_or_completed(tmp_path, monkeypatch):
    """The generator itself knows what is there already; see test_demo_corpus.py."""
    from data_pipelines import demo_corpus

    calls = []
    monkeypatch.setattr(demo_corpus, "generate", lambda root, **kw: calls.append((root, kw)))
    module._make_demo_corpus(str(tmp_path), workers=3)
    assert calls == [(str(tmp_path), {"seed": 0, "workers": 3})]
    assert module._places("demo", None, "somewhere") == ("somewhere/corpus", "somewhere")
