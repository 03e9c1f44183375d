"""Mistakes in preparing a folder of one's own videos: what the command says and leaves behind."""

import csv

import pytest

from data_pipelines.prepare import main

CLIPS = 7


@pytest.fixture
def videos(tmp_path):
    """A folder of files that are no videos: enough for every mistake that precedes reading them."""
    (tmp_path / "videos").mkdir()
    for number in range(CLIPS):
        (tmp_path / "videos" / f"clip{number}.mp4").write_bytes(b"not a video")
    return tmp_path / "videos"


@pytest.fixture
def refused(videos, capsys):
    """Runs the command, which must end with exit code 2; returns its message."""

    def run(*flags, root=videos):
        usual = ["folder", f"--root={root}", "--transcripts=none", "--workers=1"]
        assert main([*usual, *flags]) == 2
        message = capsys.readouterr().err
        _, error, message = message.rpartition("error: ")  # what precedes it is a progress bar
        assert error and "Traceback" not in message
        return message

    return run


def captions(videos, *lines):
    (videos / "captions.csv").write_text("\n".join(lines) + "\n")
    return videos / "captions.csv"


def test_a_column_that_captions_csv_does_not_have(videos, refused):
    path = captions(videos, "video_id,caption,splt", "clip0,a cat,train")
    assert (
        f"{path}: expected the columns video_id, caption and optionally group, split in its first "
        "line, found the unknown column 'splt'. Did you mean split?"
    ) in refused()


def test_a_split_that_there_is_not(videos, refused):
    path = captions(videos, "video_id,caption,split", "clip0,a cat,train", "clip1,a dog,trian")
    assert (
        f"{path}: expected a split out of train, val, test, found 'trian' in line 3. Did you mean "
        "train?"
    ) in refused()


def test_no_usable_clip(videos, tmp_path, refused):
    captions(videos, "video_id,caption,split", *(f"clip{n},a cat,train" for n in range(CLIPS)))
    message = refused(f"--out={tmp_path / 'out'}")
    path = tmp_path / "out" / "folder" / "default" / "1.0.0.incomplete" / "problems.csv"
    assert f"split 'train': expected usable clips, found none among {CLIPS}" in message
    assert all(f"  clip{n}: left out: {videos}/clip{n}.mp4: " in message for n in range(5))
    assert "  and 2 more\n" in message and "clip5" not in message and str(path) in message
    with path.open() as file:
        problems = list(csv.DictReader(file))
    assert [problem["video_id"] for problem in problems] == [f"clip{n}" for n in range(CLIPS)]


def test_verify_counts_what_prevents_preparing(videos, capsys):
    path = captions(videos, "video,caption", "clip0,a cat")
    assert main(["folder", f"--root={videos}", "--verify"]) == 1
    printed = capsys.readouterr().out
    assert "2 things stop training:" in printed and printed.count(str(path)) == 1
    assert "correct the file first, then run without --verify" in printed


@pytest.mark.parametrize(("flag", "missed"), [("", True), ("none", False)])
def test_verify_misses_no_transcripts_that_are_not_wanted(videos, capsys, flag, missed):
    assert main(["folder", f"--root={videos}", "--verify", f"--transcripts={flag or 'whisper'}"])
    printed = capsys.readouterr().out
    assert ("no file of transcripts" in printed) is missed
    assert "not transcribed" not in printed  # nothing says which are
    assert "teacher, vector: ImageBind's" in printed  # what the columns are about


def test_a_root_that_is_no_directory(videos, refused):
    for flags in ((), ("--verify",)):
        message = refused(*flags, root=videos / "none")
        assert f"--root={videos / 'none'}: no such directory" in message
        message = refused(*flags, root=videos / "clip0.mp4")
        assert f"--root={videos / 'clip0.mp4'} is a file, not a directory" in message
        assert message.rstrip().endswith("Give the folder of your videos.")


@pytest.mark.parametrize("below", ["", "/sub"])
def test_an_out_that_is_a_file(videos, tmp_path, refused, below):
    (tmp_path / "file").write_text("x")
    message = refused(f"--out={tmp_path}/file{below}")
    assert f"--out={tmp_path}/file{below}: {tmp_path}/file is a file, not a directory" in message


def test_what_is_refused_leaves_nothing(videos, tmp_path, refused):
    captions(videos, "video,caption", "clip0,a cat")
    refused(f"--out={tmp_path / 'some' / 'out'}")
    assert not (tmp_path / "some").exists()
    (tmp_path / "mine").mkdir()
    refused(f"--out={tmp_path / 'mine'}")
    assert not list((tmp_path / "mine").iterdir())  # and what was there before stays


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("larg-v3", "no such model or directory. Did you mean large-v3?"),
        ("./models/tiny", "no such model or directory"),
    ],
)
def test_a_whisper_that_there_is_not(videos, capsys, model, found):
    assert main(["folder", f"--root={videos}", f"--whisper={model}"]) == 2
    printed = capsys.readouterr()
    assert f"--whisper={model}: {found}" in printed.err and not printed.out


def test_without_network_whisper_can_be_avoided(videos, capsys, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("the network cannot be reached")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    assert main(["folder", f"--root={videos}", "--workers=1"]) == 2
    printed = capsys.readouterr()
    assert "--transcripts=none" in printed.out and str(videos / "asr.json") in printed.out
    assert "made by" not in printed.out  # nothing is made yet
    assert "cannot be reached" in printed.err and "--transcripts=none" in printed.err


def test_help_says_what_no_workers_are(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "0, the default: one per processor" in " ".join(capsys.readouterr().out.split())
