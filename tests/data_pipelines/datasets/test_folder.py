import os
import unicodedata

import pytest

from data_pipelines.datasets import folder
from save_jax.errors import UserError


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def read(root):
    splits, problems = folder.read_annotations(str(root), "default")
    return {split: [clip.video_id for clip in clips] for split, clips in splits.items()}, problems


def test_splits_and_clips(miniature_of):
    root = miniature_of("folder")
    splits, problems = folder.read_annotations(str(root), "default")
    ids = {split: [clip.video_id for clip in clips] for split, clips in splits.items()}
    assert ids == {
        "test": ["a/deep/six", "five", "unlisted"],
        "train": ['a/it\'s "two", 2', "a/one", "b c/три", "b c/四"],
    }
    clips = {clip.video_id: clip for its in splits.values() for clip in its}
    one, quoted, unlisted = clips["a/one"], clips['a/it\'s "two", 2'], clips["unlisted"]
    assert one.captions == ("a cat is running in the kitchen", "a cat is cooking in the street")
    assert one.groups == ("", "vision")
    assert quoted.video == str(root / "a" / 'it\'s "two", 2.MP4') and len(quoted.captions) == 2
    assert unlisted.captions == unlisted.groups == ()
    assert all(os.path.exists(clip.video) for clip in clips.values())
    assert os.path.samefile(one.teacher_video, root / "FeatureData/ImageBind/VideoFeature/a/one.pt")
    assert os.path.exists(folder.asr_file(str(root)))
    assert not problems


def test_every_ending_in_any_case(tmp_path):
    endings = ("mp4", "m4v", "mov", "mkv", "webm", "avi", "MP4", "Mkv", "AVI")
    touch(tmp_path, *(f"{ending}.{ending}" for ending in endings))
    touch(tmp_path, "AudioData/mp4.wav", "note.txt", "mp4", "movie.mp4.part")
    splits, problems = folder.read_annotations(str(tmp_path), "default")
    assert {clip.video_id for clip in splits["test"]} == set(endings)
    by_id = {clip.video_id: clip for clip in splits["test"]}
    assert by_id["mp4"].audio == str(tmp_path / "AudioData" / "mp4.wav")
    assert by_id["AVI"].audio is None
    assert list(splits) == ["test"] and not problems


def test_two_files_with_one_id(tmp_path):
    touch(tmp_path, "sub/a.mp4", "sub/a.MKV", "a.mp4")
    ids, problems = read(tmp_path)
    assert ids == {"test": ["a", "sub/a"]}
    assert problems == (
        ("", str(tmp_path / "sub/a.mp4"),
         f"not used: {tmp_path / 'sub/a.MKV'} has the same id, 'sub/a'"),
    )  # fmt: skip


def test_captions(tmp_path):
    """A byte-order mark, Windows line ends, letters spelt in another way, absent clips."""
    decomposed = unicodedata.normalize("NFD", "café/ü")
    touch(tmp_path, f"{decomposed}.mp4", "b.mp4", "c.mp4", "d.mp4")
    rows = [
        "\ufeffsplit,video_id,caption",
        "train,café/ü,one",
        ",b,two",
        "train,b.mp4,three",
        "val,c,",
        ",c,",
        "train,gone,four",
        "val,gone,five",
        "val,b,six",
        "train,d,seven, eight",
    ]
    (tmp_path / "captions.csv").write_bytes("\r\n".join(rows).encode())
    splits, problems = folder.read_annotations(str(tmp_path), "default")
    found = {s: [(clip.video_id, clip.captions) for clip in clips] for s, clips in splits.items()}
    assert found == {
        "test": [("b", ("two",)), ("d", ())],
        "train": [(decomposed, ("one",))],
        "val": [("b", ("six",)), ("c", ())],
    }
    assert problems == (
        ("", str(tmp_path / "captions.csv"),
         "line 10 left out: 4 cells for 3 columns; a text with a comma needs quotes around it"),
        ("", str(tmp_path / "captions.csv"), "line 6 left out: it has no caption and no split"),
        ("", "b.mp4", "no such video, listed in captions.csv, line 4; an id has no ending: b"),
        ("", "gone", "no such video, listed in captions.csv, line 7, 8"),
        ("val", "b", "it is in the split 'test' too"),
    )  # fmt: skip


def test_without_captions(tmp_path):
    touch(tmp_path, "a.mp4", "sub/b.mov", ".hidden/c.mp4")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    assert read(tmp_path) == ({"test": ["a", "sub/b"]}, ())


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("video_id\na\n", "columns video_id, caption"),
        ("", "found nothing"),
        ("video_id,caption,split\na,x,all\n", "found 'all' in line 2"),
        ("video_id,caption,split\na,x,my split\n", "found 'my split' in line 2"),
        ("video_id,caption,split\na,x,../b\n", "found '../b' in line 2"),
    ],
)
def test_captions_that_stop(tmp_path, content, found):
    touch(tmp_path, "a.mp4")
    (tmp_path / "captions.csv").write_text(content)
    with pytest.raises(UserError, match=found) as caught:
        folder.read_annotations(str(tmp_path), "default")
    assert str(tmp_path / "captions.csv") in str(caught.value)


def test_no_videos(tmp_path):
    touch(tmp_path, "a.txt")
    with pytest.raises(UserError, match=r"expected videos \(\.avi .*found none"):
        folder.read_annotations(str(tmp_path), "default")
