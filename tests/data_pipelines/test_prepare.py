"""The command with what it drives: preparation.py, sidecars.py, build.py, shards.py."""

import csv
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import weakref

import numpy as np
import pytest
import tensorflow_datasets as tfds
import torch

from data_pipelines import datasets, preparation
from data_pipelines import prepare as module
from data_pipelines.datasets.types import Clip
from data_pipelines.modalities import whisper
from data_pipelines.modalities.record import Record, read_record
from data_pipelines.preparation import prepare
from data_pipelines.prepare import main
from data_pipelines.prepared import metadata, prepared_by
from data_pipelines.recipe import Recipe
from data_pipelines.storage import shards
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
    assert prepared_by(directory) == Recipe(encoding="raw", **SMALL)
    counts = json.loads((directory / "metadata.json").read_text())["counts"]
    assert counts["train"] == {
        "listed": 7,
        "prepared": 7,
        "left out": 0,
        "captions": 140,
        "without audio": 1,
        "without transcript": 3,
        "not transcribed": 1,
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
    with pytest.raises(UserError, match=r"split 'train'.* none among 7\n.*0 bytes"):
        prepare("msrvtt", root=str(root), recipe=RECIPE, workers=1)
    assert not list((root / "prepared").rglob("index-*.json"))


def test_doing_it_again(prepared, miniature, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "data_pipelines.storage.build", None)  # not needed again
    again = ["msrvtt", f"--root={miniature}", f"--out={prepared}", "--encoding=raw", *FLAGS]
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
        (["msrvtt", "--root=/nowhere"], "--root=/nowhere: no such directory"),
        (["msrvtt", "--root=.", "--variant=8k"], "found '8k'"),
        (["msrvtt", "--root=.", "--image_size=0"], "--image_size of at least 1"),
        (["msrvtt", "--root=.", "--workers=-1"], "--workers of at least 0"),
        (["msrvtt", "--root=.", "--frames_per_second=0"], "--frames_per_second of at least 1"),
        (["msrvtt", "--root=.", "--transcripts=file"], "expected MSR-VTT's annotation files"),
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


def test_many_shards_keep_the_order_of_the_clips(miniature, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "CLIPS_PER_SHARD", 2)
    directory = prepare("msrvtt", str(miniature), str(tmp_path), recipe=RECIPE, workers=1)
    builder = tfds.builder_from_directory(directory)
    assert builder.info.splits["train"].shard_lengths == [2, 2, 2, 1]
    names = [record["video_id"].decode() for record in builder.as_data_source("train")]
    assert names == [f"video{n}" for n in range(7)]
    assert [entry["video_id"] for entry in index(directory, "train")] == names
    assert len(list(directory.glob("msrvtt-train.array_record-*-of-00004"))) == 4


def test_a_large_split_has_few_enough_files_to_keep_open(monkeypatch):
    clip = Clip("", "", None, (), (), None, None)
    cut = shards.cut(
        {"train": [clip] * 101_079, "none": []},
        directory="", notes="", dataset="lsmdc", recipe=RECIPE,
    )  # fmt: skip
    assert 256 < len(cut) <= 512 and sum(len(shard.clips) for shard in cut) == 101_079


def test_a_shard_is_not_held_in_memory(miniature, tmp_path):
    """Its records are taken one by one, and each is let go once it is written."""
    clip = datasets.load_dataset("msrvtt").read_annotations(str(miniature), "9k")
    shard = shards.Shard(str(tmp_path), str(tmp_path), "x", "train", 0, 1, RECIPE, ())
    features = read_record(clip.splits["test"][0], RECIPE).features
    made, most = [], 0

    def records():
        nonlocal most
        for number in range(20):
            record = Record(clip.splits["test"][0], {**features, "video_id": str(number)}, ())
            made.append(weakref.ref(record))
            most = max(most, sum(reference() is not None for reference in made))
            yield record
            del record

    shards.write(shard, "", records())
    assert len(shards.note_if_done(shard, "").index) == 20 and most <= 2


def test_a_shard_without_any_usable_clip(root, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "CLIPS_PER_SHARD", 2)
    for name in ("video2", "video3"):
        replace(root / "VideoData" / f"{name}.mp4", b"")
    directory = prepare("msrvtt", str(root), str(tmp_path), recipe=RECIPE, workers=1)
    builder = tfds.builder_from_directory(directory)
    assert builder.info.splits["train"].shard_lengths == [2, 0, 2, 1]
    names = [record["video_id"].decode() for record in builder.as_data_source("train")]
    assert names == ["video0", "video1", "video4", "video5", "video6"]


def test_tfds_finds_it_by_its_name(prepared):
    (record, *_), shapes = (
        tfds.data_source("msrvtt/9k", data_dir=prepared, split="test"),
        tfds.builder("msrvtt/9k", data_dir=prepared).info.features.shape,
    )
    assert record["video_id"] == b"video7"
    assert shapes["fbank"] == (64, 128) and shapes["teacher_video"] == (1024,)
    assert tfds.builder("msrvtt/9k", data_dir=prepared).info.metadata["recipe"]["image_size"] == 32


def test_the_command(miniature, tmp_path):
    command = [sys.executable, "-m", "data_pipelines.prepare", "msrvtt", f"--root={miniature}",
               f"--out={tmp_path}", "--workers=2", "--variant=7k-1ka", *FLAGS]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert "7k-1ka" in found.stdout and "train" in found.stdout
    assert len(index(tmp_path / "msrvtt" / "7k-1ka" / "1.0.0", "train")) == 7
    assert "Traceback" not in found.stderr and "oneDNN" not in found.stderr


def test_the_demo_corpus_is_made_and_completed(tmp_path, monkeypatch):
    from data_pipelines import demo_corpus

    small = functools.partial(demo_corpus.generate, n_train=4, n_test=2)
    monkeypatch.setattr(demo_corpus, "generate", small)
    command = ["demo", f"--out={tmp_path}", "--workers=1", *FLAGS]
    assert main(command) == 0
    videos = sorted((tmp_path / "corpus/VideoData").glob("*.mp4"))
    assert len(videos) == 6
    made = {video: (video.read_bytes(), video.stat().st_mtime_ns) for video in videos}
    lost = videos[2]
    lost.unlink()
    shutil.rmtree(tmp_path / "demo")  # what is prepared needs no corpus
    assert main(command) == 0
    assert lost.read_bytes() == made[lost][0]
    kept = {video: made[video][1] for video in videos if video != lost}
    assert {video: video.stat().st_mtime_ns for video in kept} == kept
    assert preparation.places("demo", None, "somewhere") == ("somewhere/corpus", "somewhere")


def test_the_demo_is_made_and_prepared_below_a_root_alone(tmp_path, monkeypatch):
    from data_pipelines import demo_corpus

    small = functools.partial(demo_corpus.generate, n_train=2, n_test=2)
    monkeypatch.setattr(demo_corpus, "generate", small)
    assert main(["demo", f"--root={tmp_path / 'corpus'}", "--workers=1", *FLAGS]) == 0
    directory = tmp_path / "corpus" / "prepared" / "demo" / "default" / "1.0.0"
    assert metadata(directory)["counts"]["train"]["prepared"] == 2


def test_what_is_not_given_is_as_usual_for_the_data_set(monkeypatch):
    from data_pipelines.datasets import msrvtt

    monkeypatch.setattr(msrvtt, "RECIPE", {"max_frames": 32, "frames_per_second": 2})
    found = preparation.usual_recipe("msrvtt", max_frames=5)
    assert found == Recipe(max_frames=5, frames_per_second=2)
    asked = {}
    monkeypatch.setattr(module, "prepare", lambda *_, recipe, **__: asked.update(r=recipe) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["msrvtt", "--root=x", "--image_size=8"])
    assert asked["r"] == Recipe(image_size=8, max_frames=32, frames_per_second=2)


def transcripts(directory, split="train"):
    return {entry["video_id"]: entry["transcript"] for entry in index(directory, split)}


def test_without_transcripts(miniature, tmp_path):
    directory = prepare(
        "msrvtt", str(miniature), str(tmp_path), recipe=RECIPE, workers=1, transcripts="none"
    )
    assert set(transcripts(directory).values()) == {""}
    counts = metadata(directory)["counts"]
    assert counts["train"]["not transcribed"] == counts["train"]["without transcript"] == 7
    with pytest.raises(UserError, match="wanted 'file', found 'none'"):
        prepare("msrvtt", str(miniature), str(tmp_path), recipe=RECIPE, transcripts="file")


def test_whisper_runs_where_there_is_no_file_and_what_it_writes_is_read(
    root, tmp_path, monkeypatch, capsys
):
    """Whisper itself is tried in test_whisper.py."""
    (root / "msrvtt10k_asr_text.json").unlink()
    asked = []

    def transcribe(clips, path, *, model, translate, strict, workers):
        asked.append(([clip.video_id for clip in clips], path, model, translate, strict))
        entries = [{"key": f"{clip.video_id}.mp4", "text": f"I am {clip.video_id}"}
                   for clip in clips if clip.video_id != "video8"]  # fmt: skip
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            json.dump(entries, file)
        return whisper.WhisperSummary({"speech": len(entries)}, (("", "video8", "no audio"),))

    monkeypatch.setattr(whisper, "transcribe", transcribe)
    arguments = ["msrvtt", f"--root={root}", f"--out={tmp_path}", "--workers=1", *FLAGS]
    assert main([*arguments, "--whisper=someone/tiny", "--translate"]) == 0
    path = str(tmp_path / "msrvtt" / "whisper-someone--tiny-translated.json")
    assert asked == [([f"video{n}" for n in range(12)], path, "someone/tiny", True, False)]
    assert path in capsys.readouterr().out
    directory = tmp_path / "msrvtt" / "9k" / "1.0.0"
    assert transcripts(directory)["video3"] == "I am video3"
    with (directory / "problems.csv").open() as file:
        assert list(csv.reader(file))[1:] == [["test", "video8", "no audio"]]
    counts = metadata(directory)["counts"]["test"]
    assert (counts["not transcribed"], counts["problems"]) == (1, 1)
    assert metadata(directory)["transcripts"] == "whisper someone--tiny, translated"


def test_imagebind_computes_the_vectors_that_are_not_there(miniature, tmp_path, monkeypatch):
    """ImageBind itself is tried in test_teacher.py."""
    from data_pipelines.modalities import teacher
    from save_jax.models import imagebind

    def compute(clips, directory, embed, *, workers, strict):
        assert embed == (imagebind.VARIANTS["huge"], "w.pth")
        made = []
        for clip in clips:
            if not clip.teacher_audio:
                os.makedirs(directory, exist_ok=True)
                path = os.path.join(directory, f"{clip.video_id}.npy")
                np.save(path, np.full(1024, 2, np.float32))
                clip = dataclasses.replace(clip, teacher_audio=path)
            made.append(clip)
        return made, (("", "video0", "a problem"),)

    monkeypatch.setattr(teacher, "compute", compute)
    monkeypatch.setattr(imagebind, "make_embed", lambda *made_of: made_of)
    monkeypatch.setattr("save_jax.weights.names.imagebind.loader", lambda path: path)
    directory = prepare(
        "msrvtt", str(miniature), str(tmp_path), recipe=RECIPE, workers=1, imagebind="w.pth"
    )
    records = tfds.builder_from_directory(directory).as_data_source("train")
    assert all(record["has_teacher"] for record in records)
    assert records[3]["teacher_audio"].tolist() == [2] * 1024
    assert metadata(directory)["counts"]["train"]["problems"] == 1


def test_problems_of_the_annotations_are_counted_and_with_strict_an_error(
    miniature, tmp_path, monkeypatch, capsys
):
    from data_pipelines.datasets import msrvtt

    read = msrvtt.read_annotations
    problems = (("test", "video7", "it is odd"), ("", "stray.mp4", "nobody knows it"))
    monkeypatch.setattr(msrvtt, "read_annotations", lambda *_: read(*_)._replace(problems=problems))
    arguments = ["msrvtt", f"--root={miniature}", f"--out={tmp_path}", "--workers=1", *FLAGS]
    assert main([*arguments, "--strict"]) == 2
    assert "split 'test', clip video7: expected usable files, found: it is odd" in (
        capsys.readouterr().err
    )
    assert main(arguments) == 0
    directory = tmp_path / "msrvtt" / "9k" / "1.0.0"
    with (directory / "problems.csv").open() as file:
        assert [tuple(row) for row in list(csv.reader(file))[1:]] == list(problems)
    assert f"2 problems, listed in {directory}" in capsys.readouterr().out


def test_strict_does_not_pass_over_shards_that_were_written_without_it(root, tmp_path, monkeypatch):
    replace(root / "VideoData" / "video1.mp4", b"")
    arguments = ["msrvtt", f"--root={root}", f"--out={tmp_path}", "--workers=1", *FLAGS]
    with monkeypatch.context() as patch:
        patch.setattr("data_pipelines.storage.build._describe", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(arguments)
    assert main([*arguments, "--strict"]) == 2
    assert main(arguments) == 0


def test_a_package_that_is_not_installed_is_named(tmp_path):
    code = (
        "import sys; sys.modules['tensorflow_datasets'] = None\n"
        "from data_pipelines.prepare import main\n"
        f"sys.exit(main(['folder', '--root={tmp_path}', '--transcripts=none']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "the package 'tensorflow_datasets': pip install" in done.stderr
