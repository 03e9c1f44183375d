"""The folders of a data set: which files belong to which clip, and what is named instead."""

import os

from data_pipelines.datasets import layout
from tests.support import object_store


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def find(root, **options):
    problems = []
    files = layout.find(str(root), str(root / "VideoData"), problems, **options)
    return files, problems


def test_the_files_of_a_clip(tmp_path):
    touch(
        tmp_path,
        "VideoData/film/0001.50-00.51.avi",
        "VideoData/B.MP4",
        "VideoData/notes.txt",
        "AudioData/B.WAV",
        "FeatureData/ImageBind/VideoFeature/B.pt",
        "FeatureData/ImageBind/AudioFeature/B.npy",
        "FeatureData/ImageBind/AudioFeature/B.pt",
    )
    files, problems = find(tmp_path)
    assert files.videos == {
        "0001.50-00.51": str(tmp_path / "VideoData/film/0001.50-00.51.avi"),
        "B": str(tmp_path / "VideoData/B.MP4"),
    }
    clip = layout.clip_of(files, "B", ["one"], ["sound"])
    assert clip.video == files.videos["B"] and clip.audio == str(tmp_path / "AudioData/B.WAV")
    assert clip.teacher_video.endswith("VideoFeature/B.pt")
    assert clip.teacher_audio.endswith("AudioFeature/B.npy")
    assert (clip.captions, clip.groups) == (("one",), ("sound",))
    absent = layout.clip_of(files, "C", [], [], absent="where/C.mp4")
    assert (absent.video, absent.audio, absent.teacher_video) == ("where/C.mp4", None, None)
    assert not problems


def test_two_files_with_one_id(tmp_path):
    touch(tmp_path, "VideoData/a.webm", "VideoData/a.mp4", "VideoData/z/a.avi", "VideoData/A.mp4")
    files, problems = find(tmp_path)
    assert files.videos == {
        "A": str(tmp_path / "VideoData/A.mp4"),
        "a": str(tmp_path / "VideoData/a.mp4"),
    }
    assert [(split, os.path.basename(path)) for split, path, _ in problems] == [
        ("", "a.webm"),
        ("", "a.avi"),
    ]
    assert "VideoData/a.mp4 has the same id, 'a'" in problems[0][2]
    files, problems = find(tmp_path, paths_are_ids=True)
    assert sorted(files.videos) == ["A", "a", "z/a"] and len(problems) == 1


def test_links(tmp_path):
    touch(tmp_path, "VideoData/a/one.mp4", "elsewhere/two.mp4", "other/three.mp4")
    videos = tmp_path / "VideoData"
    for name, target in {
        "again": "a",  # another name for the same folder: followed
        "outside": "../elsewhere",
        "a/three.mp4": "../../other/three.mp4",
        "itself": ".",
        "a/up": "..",
        "a/root": "/",
        "a/parent": "../..",
        "loop.mp4": "loop.mp4",
        "gone.mp4": "nowhere",
    }.items():
        (videos / name).symlink_to(target)
    (tmp_path / "elsewhere" / "back").symlink_to(videos / "outside")
    (tmp_path / "other" / "there").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "here").symlink_to(tmp_path / "other")
    files, problems = find(tmp_path, paths_are_ids=True)
    # Links that lead nowhere are files that cannot be read: preparation names them.
    assert sorted(files.videos) == [
        "a/one", "a/three", "again/one", "again/three",
        "gone", "loop", "outside/here/three", "outside/two",
    ]  # fmt: skip
    assert not problems


def test_names(tmp_path):
    names = ['it\'s "two"', "три четыре", "五", "a\nb", "100%", "-x", "a.b c"]
    touch(tmp_path, *(f"VideoData/{name}.mp4" for name in names))
    touch(tmp_path, "VideoData/.hidden.mp4", "VideoData/.cache/in.mp4", "VideoData/._a.mp4")
    (tmp_path / "VideoData" / "folder.mp4").mkdir()
    with open(os.fsencode(tmp_path) + b"/VideoData/caf\xe9.mp4", "wb") as file:
        file.write(b"x")
    os.mkfifo(tmp_path / "VideoData" / "pipe.mp4")
    files, problems = find(tmp_path)
    assert sorted(files.videos) == sorted(names)
    assert sorted((os.path.basename(path), what) for _, path, what in problems) == [
        (r"caf\udce9.mp4", "not used: its name is not UTF-8; rename it"),
        ("pipe.mp4", "not used: it is a pipe or a device"),
    ]


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    touch(tmp_path, "VideoData/a.mp4", "VideoData/closed/b.mp4")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    files, problems = find(tmp_path)
    assert list(files.videos) == ["a"]
    assert problems == [
        (
            "",
            str(tmp_path / "VideoData/closed"),
            "not used: it cannot be listed (Permission denied)",
        )
    ]


def test_no_folders_at_all(tmp_path):
    files, problems = find(tmp_path)
    assert not any(files) and not problems


def test_a_remote_root(tmp_path):
    store = object_store.register()
    names = [
        "VideoData/x.mp4", "VideoData/sub/two.webm", "VideoData/.hidden/three.mp4",
        "ImageData/x/1.jpg", "AudioData/x.wav", "FeatureData/ImageBind/VideoFeature/x.npy",
    ]  # fmt: skip
    touch(tmp_path, *names)
    (tmp_path / "Annotations").mkdir()
    (tmp_path / layout.GROUPS).write_text("video_id,caption,group\nx,a,sound\n")
    store.put(str(tmp_path), "s3://bucket/data", recursive=True)
    captions = {"test": {"x": ["a", "b"], "two": ["c"], "absent": ["d"]}}
    expected = layout.annotate(str(tmp_path), captions, [], images=True)
    found = layout.annotate("s3://bucket/data", captions, [], images=True)
    local = str(tmp_path)
    assert str(found).replace("s3://bucket/data", local) == str(expected)
    x, two, absent = found.splits["test"]
    assert (x.video, x.groups) == ("s3://bucket/data/ImageData/x", ("sound", ""))
    assert two.video == "s3://bucket/data/VideoData/sub/two.webm"
    assert absent.video == "s3://bucket/data/VideoData/absent.mp4"
    assert not any(layout.find("s3://bucket/none", "s3://bucket/none/VideoData", []))
