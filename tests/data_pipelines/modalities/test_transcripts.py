import json
import logging

import pytest

from data_pipelines.modalities.transcripts import read_asr, write_asr
from save_jax.errors import UserError


def write(path, entries):
    path.write_text(json.dumps(entries))
    return path


def test_ids_are_keys_without_their_ending(tmp_path):
    entries = [
        {"key": "video1.mp4", "text": " Hello there."},
        {"key": "a.b.mp4", "text": "", "language": "en"},
    ]
    found = read_asr(write(tmp_path / "asr.json", entries))
    assert found == {"video1": " Hello there.", "a.b": ""}


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi", "webm", "WEBM", "mpeg"])
def test_other_endings_of_keys(tmp_path, ending):
    entries = [{"key": f"a.web.{ending}", "text": "x"}, {"key": f"folder/b.{ending}", "text": "y"}]
    found = read_asr(write(tmp_path / "asr.json", entries))
    assert found == {"a.web": "x", "folder/b": "y"}


def test_what_is_written_can_be_read(tmp_path):
    entries = [{"key": "clip one.mp4", "text": 'Été "là"\n', "language": "fr"}]
    path = tmp_path / "folder" / "asr.json"
    write_asr(str(path), entries)
    assert read_asr(path) == {"clip one": 'Été "là"\n'}
    assert json.loads(path.read_text(encoding="utf-8")) == entries
    write_asr(str(path), [])
    assert read_asr(path) == {}
    assert [file.name for file in path.parent.iterdir()] == ["asr.json"]


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"asr\.json: expected a place to write transcripts"):
        write_asr(str(tmp_path / "file" / "asr.json"), [])


def test_an_empty_list(tmp_path):
    assert read_asr(write(tmp_path / "asr.json", [])) == {}


def test_a_byte_order_mark_is_tolerated(tmp_path):
    path = tmp_path / "asr.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([{"key": "v.mp4", "text": "été"}]).encode())
    assert read_asr(path) == {"v": "été"}


def test_of_duplicates_the_first_text_counts_and_the_ids_are_named(tmp_path, caplog):
    entries = [
        {"key": "twice.mp4", "text": ""},
        {"key": "alone.mp4", "text": "one"},
        {"key": "twice.mp4", "text": "first words"},
        {"key": "twice.mp4", "text": "second words"},
    ]
    with caplog.at_level(logging.WARNING):
        found = read_asr(write(tmp_path / "asr.json", entries))
    assert found == {"twice": "first words", "alone": "one"}
    assert "once (1)" in caplog.text and "twice" in caplog.text and "alone" not in caplog.text


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        ({"video1": "text"}, "found a dict"),
        ([{"key": "v.mp4", "text": "x"}, {"key": "w.mp4"}], "no 'text'.* entry 1"),
        ([{"text": "x"}], "no 'key'.* entry 0"),
        ([{"key": "v.mp4", "text": None}], "'text' that is a NoneType.* entry 0"),
        ([{"key": 7, "text": "x"}], "'key' that is a int.* entry 0"),
        ([{"key": ".mp4", "text": "x"}], "too short.* entry 0"),
        ([{"key": ".webm", "text": "x"}], "too short.* entry 0"),
        (["v.mp4"], "a str.* entry 0"),
    ],
)
def test_other_contents_are_named_with_their_place(tmp_path, entries, found):
    path = write(tmp_path / "asr.json", entries)
    with pytest.raises(UserError, match=found) as caught:
        read_asr(path)
    assert str(path) in str(caught.value)


def test_malformed_json_is_located(tmp_path):
    path = tmp_path / "asr.json"
    path.write_text('[{"key": "v.mp4", "text": "x"},\n {"key": "w.mp4", "te')
    with pytest.raises(UserError, match="line 2, column 19"):
        read_asr(path)


def test_other_encodings_and_absent_files(tmp_path):
    (tmp_path / "latin.json").write_bytes(b'[{"key": "v.mp4", "text": "\xe9t\xe9"}]')
    with pytest.raises(UserError, match="UTF-8"):
        read_asr(tmp_path / "latin.json")
    with pytest.raises(UserError, match=r"absent\.json.*No such file"):
        read_asr(tmp_path / "absent.json")
