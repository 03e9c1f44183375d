"""`prepare --verify`: what training would lack, on one screen."""

import json
import shutil

import pytest

from data_pipelines.prepare import main
from tests.support import preparing

FILE = "msrvtt-train.array_record-00001-of-00003"


@pytest.fixture
def places(miniature, tmp_path):
    """A root and what is prepared of it, both of which a test may damage."""
    shutil.copytree(miniature, tmp_path / "root")
    directory = preparing.run(str(tmp_path / "root"), str(tmp_path / "out"))
    return tmp_path / "root", tmp_path / "out" / directory.relative_to(tmp_path / "out")


def verify(places, capsys, *flags, root=True):
    root = [f"--root={places[0]}"] if root else []
    code = main(["msrvtt", *root, f"--out={places[1].parents[2]}", "--verify", *flags])
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) <= 24 and all(len(line) < 240 for line in printed.splitlines())
    return code, printed


def row(printed, column, split="train", after="split"):
    """The number in a column of a table; `after` is a column that only that table has."""
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if column in line and after in line)
    names = [name.strip() for name in lines[start].split("  ") if name.strip()]
    line = next(line for line in lines[start:] if line.split()[0] == split)
    return int(line.split()[names.index(column)])


def test_all_is_well(places, capsys):
    code, printed = verify(places, capsys)
    assert code == 0 and "Nothing stops training." in printed
    assert row(printed, "readable") == 7 and row(printed, "captions") == 140
    assert row(printed, "without teacher") == row(printed, "without audio") == 1
    assert row(printed, "vector absent") == 1 and row(printed, "not transcribed") == 1
    assert "vector absent: video3, video7, video11" in printed
    code, printed = verify(places, capsys, root=False)
    assert code == 0 and "video absent" not in printed


def flip(directory):
    content = bytearray((directory / FILE).read_bytes())
    content[5_000] ^= 255
    (directory / FILE).write_bytes(content)


def misname(directory):
    entries = json.loads((directory / "index-train.json").read_text())
    entries[0]["video_id"], entries[1]["video_id"] = "video1", "video0"
    (directory / "index-train.json").write_text(json.dumps(entries))


@pytest.mark.parametrize(
    ("damage", "words", "readable"),
    [
        (lambda directory: (directory / FILE).unlink(), f"{FILE}: the file is absent", 4),
        (lambda directory: (directory / FILE).write_bytes(b"x" * 999), f"{FILE}: ", 4),
        (lambda directory: shutil.copy(directory / FILE, directory / FILE.replace("1", "2", 1)),
         "expected 1 records, found 3", 6),
        (flip, f"{FILE}: record", 6),
        (misname, "expected the clip 'video1' of the index, found 'video0'", 5),
        (lambda directory: (directory / "index-train.json").unlink(), "index-train.json", None),
        (lambda directory: (directory / "dataset_info.json").write_text("{"), "TFDS", None),
        (lambda directory: (directory / "metadata.json").unlink(), "is not prepared", None),
    ],
)  # fmt: skip
def test_what_is_damaged_is_named(places, capsys, damage, words, readable):
    damage(places[1])
    code, printed = verify(places, capsys)
    assert code == 1 and "stop" in printed and words in printed
    if readable is not None:
        assert row(printed, "readable") == readable


def test_sources_against_each_other(places, capsys):
    root, _ = places
    (root / "VideoData" / "video1.mp4").unlink()
    features = root / "FeatureData" / "ImageBind"
    (features / "VideoFeature" / "video2.pt").unlink()
    (features / "AudioFeature" / "video4.pt").write_bytes(b"x")
    data = json.loads((root / "Annotations" / "MSRVTT_data.json").read_text())
    data["sentences"].append({"video_id": "video12", "caption": "a new one", "sen_id": 0})
    with (root / "Annotations" / "MSRVTT_train.9k.csv").open("a") as file:
        file.write("video12\n")
    (root / "Annotations" / "MSRVTT_data.json").write_text(json.dumps(data))
    code, printed = verify(places, capsys)
    assert code == 0  # what is prepared is complete
    assert [row(printed, name) for name in ("listed", "video absent", "vector bad")] == [8, 2, 1]
    assert row(printed, "vector absent") == 3 and row(printed, "not prepared") == 1
    assert "video absent: video1, video12" in printed and "vector bad: video4" in printed


def test_nothing_to_train_on(places, capsys):
    entries = json.loads((places[1] / "index-train.json").read_text())
    for entry in entries:
        entry["captions"] = []
    (places[1] / "index-train.json").write_text(json.dumps(entries))
    code, printed = verify(places, capsys, root=False)
    assert code == 1 and "there is nothing to train on" in printed
