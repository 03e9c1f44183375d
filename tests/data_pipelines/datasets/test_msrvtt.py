import json
import os
import shutil

import pytest

from data_pipelines import datasets
from data_pipelines.datasets import msrvtt
from save_jax.errors import UserError


@pytest.fixture
def root(miniature, tmp_path):
    """A copy of the miniature's annotations and folders that a test may change."""
    shutil.copytree(miniature, tmp_path / "root", copy_function=os.link)
    return tmp_path / "root"


def ids(clips):
    return [clip.video_id for clip in clips]


@pytest.mark.parametrize("variant", ["9k", "7k-1ka"])
def test_splits_by_csv(miniature, variant):
    splits = msrvtt.read_annotations(str(miniature), variant).splits
    assert list(splits) == ["train", "test"]
    assert ids(splits["train"]) == [f"video{n}" for n in range(7)]
    assert ids(splits["test"]) == [f"video{n}" for n in range(7, 12)]
    assert {len(clip.captions) for clip in splits["train"]} == {20}
    assert {len(clip.captions) for clip in splits["test"]} == {1}


def test_the_official_split(miniature):
    splits = msrvtt.read_annotations(str(miniature), "7k").splits
    assert ids(splits["train"]) == ["video0", "video1", "video3", "video4", "video6"]
    assert ids(splits["val"]) == ["video2", "video5"]
    assert ids(splits["test"]) == [f"video{n}" for n in range(7, 12)]
    assert {len(clip.captions) for split in splits.values() for clip in split} == {20}


def test_a_clip(miniature):
    splits, problems = msrvtt.read_annotations(str(miniature), "9k")
    assert problems == ()
    spoken, silent = splits["train"][0], splits["train"][3]
    assert spoken.video == str(miniature / "VideoData" / "video0.mp4")
    assert spoken.captions[1] == "a cat is cooking in the street"
    assert spoken.groups == ("",) * 20
    assert spoken.audio is None
    assert spoken.teacher_video.endswith("ImageBind/VideoFeature/video0.pt")
    assert spoken.teacher_audio.endswith("ImageBind/AudioFeature/video0.pt")
    assert silent.teacher_audio is None
    assert {clip.transcript for clips in splits.values() for clip in clips} == {""}
    assert msrvtt.asr_file(str(miniature)) == str(miniature / "msrvtt10k_asr_text.json")


def test_wav_and_webm_are_found(root):
    (root / "AudioData" / "video1.wav").write_bytes(b"x")
    (root / "VideoData" / "video1.mp4").rename(root / "VideoData" / "video1.webm")
    (root / "VideoData" / "video2.mp4").unlink()
    clips = msrvtt.read_annotations(str(root), "9k").splits["train"]
    assert clips[1].video == str(root / "VideoData" / "video1.webm")
    assert clips[1].audio == str(root / "AudioData" / "video1.wav")
    assert clips[2].video == str(root / "VideoData" / "video2.mp4")  # absent: preparation says so


@pytest.mark.parametrize(
    ("variant", "names"),
    [
        ("9k", ["MSRVTT_data.json", "MSRVTT_train.9k.csv", "MSRVTT_JSFUSION_test.csv"]),
        ("7k", ["MSRVTT_data.json"]),
        ("7k-1ka", ["MSRVTT_data.json", "MSRVTT_train.7k.csv", "MSRVTT_JSFUSION_test.csv"]),
    ],
)
def test_every_absent_file_is_named(tmp_path, variant, names):
    with pytest.raises(UserError) as caught:
        msrvtt.read_annotations(str(tmp_path), variant)
    listed = [line for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert sorted(os.path.basename(line) for line in listed) == sorted(names)


def replace(path, text):
    path.unlink()  # it is a hard link to the shared one
    path.write_text(text)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("MSRVTT_train.9k.csv", "id\nvideo0\n", "columns video_id.* found id"),
        ("MSRVTT_train.9k.csv", "", "found nothing"),
        ("MSRVTT_train.9k.csv", "video_id\n", "found none"),
        ("MSRVTT_train.9k.csv", "video_id\nvideo99\n", "found none of any, 'video99' first"),
        (
            "MSRVTT_JSFUSION_test.csv",
            "video_id,sentence\nvideo7\n",
            "line 2 left out: it has no sentence",
        ),
        ("MSRVTT_data.json", '{"videos": [', "line 1, column"),
        ("MSRVTT_data.json", '{"videos": []}', "no list 'sentences'"),
        ("MSRVTT_data.json", "[]", "no list 'videos'"),
        ("MSRVTT_data.json", '{"videos": [], "sentences": [{"video_id": "v"}]}', "entry 0"),
    ],
)
def test_other_contents(root, name, content, found):
    replace(root / "Annotations" / name, content)
    with pytest.raises(UserError, match=found) as caught:
        msrvtt.read_annotations(str(root), "9k")
    assert name in str(caught.value)


def test_an_incomplete_official_split(root):
    path = root / "Annotations" / "MSRVTT_data.json"
    data = json.loads(path.read_text())
    data["videos"] = [video for video in data["videos"] if video["split"] != "validate"]
    replace(path, json.dumps(data))
    with pytest.raises(UserError, match="'validate'"):
        msrvtt.read_annotations(str(root), "7k")


def test_the_registry():
    assert datasets.load_dataset("msrvtt") is msrvtt
    assert datasets.check_variant("msrvtt", "") == "9k"
    with pytest.raises(UserError, match=r"'nosuch'"):
        datasets.load_dataset("nosuch")
    with pytest.raises(UserError, match=r"7k-1ka.* found '8k'"):
        datasets.check_variant("msrvtt", "8k")


def test_what_stops_nothing_is_named(root):
    replace(root / "Annotations" / "MSRVTT_train.9k.csv", "video_id\nvideo0\nvideo99\nvideo7\n")
    replace(
        root / "Annotations" / "MSRVTT_JSFUSION_test.csv",
        "video_id,sentence\nvideo7,a dog, running\nvideo7,a boat\nvideo8\nvideo9,a horse\n",
    )
    (root / "VideoData" / "homemade.mp4").write_bytes(b"x")
    splits, problems = msrvtt.read_annotations(str(root), "9k")
    assert ids(splits["train"]) == ["video0", "video99", "video7"]
    assert ids(splits["test"]) == ["video7", "video9"]
    named = [(split, os.path.basename(name), what) for split, name, what in problems]
    test = "MSRVTT_JSFUSION_test.csv"
    assert [(split, name) for split, name, _ in named] == [
        ("train", "video99"), ("", test), ("", test), ("test", "video7"), ("", "homemade.mp4"),
    ]  # fmt: skip
    for (_, _, what), part in zip(
        named,
        ["no captions in", "line 2 left out: 3 cells", "line 4 left out: it has no sentence",
         "in the split 'train' too", "do not mention it"],
        strict=True,
    ):  # fmt: skip
        assert part in what


def test_query_groups(root):
    splits, _ = msrvtt.read_annotations(str(root), "9k")
    first, second = splits["test"][:2]
    path = root / "Annotations" / "query_groups.csv"
    rows = [
        f"video7,{first.captions[0]},sound",
        f"video8, {second.captions[0]} ,sound+speech",
        f"video8,{second.captions[0]},speech",
        "video9,no such caption,vision",
        "video99,a cat,vision",
    ]
    path.write_text("\n".join(["video_id,caption,group", *rows]))
    splits, problems = msrvtt.read_annotations(str(root), "9k")
    assert [clip.groups for clip in splits["test"]] == [
        ("sound",), ("sound+speech",), ("",), ("",), ("",),
    ]  # fmt: skip
    assert [what.split(":")[0] for _, _, what in problems] == [
        f"line {line} not used" for line in (4, 5, 6)
    ]
    assert {name for _, name, _ in problems} == {str(path)}
