"""Readers of annotation files: what is tolerated, what is named, what stops."""

import re

import pytest

from data_pipelines.datasets import annotations
from save_jax.errors import UserError

COLUMNS = ("video_id", "caption")


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes) -> str:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "file").write_bytes(data)
        return str(tmp_path / "file")

    return write


def read_csv(path, **options):
    problems = []
    rows = annotations.read_csv(path, COLUMNS, problems, **options)
    return rows, [what for _, _, what in problems]


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_and_byte_order_marks(write, ends, mark):
    csv = mark + ends.join(["video_id,caption", 'a,"x, ""y"""', "", 'три,"two', 'lines"', "c,z"])
    expected = [
        (2, {"video_id": "a", "caption": 'x, "y"'}),
        (4, {"video_id": "три", "caption": f"two{ends}lines"}),
        (6, {"video_id": "c", "caption": "z"}),
    ]
    assert read_csv(write(csv)) == (expected, [])
    tsv = mark + ends.join(['a\t1\t"x, y', "", "b b\t2\tz\u2028w", ""])
    assert annotations.read_tsv(write(tsv), ("id", "n", "text"), []) == [
        (1, {"id": "a", "n": "1", "text": '"x, y'}),
        (3, {"id": "b b", "n": "2", "text": "z\u2028w"}),
    ]
    assert annotations.read_list(write(mark + ends.join(["a", "b b ", "", "c"])), []) == [
        "a",
        "b b",
        "c",
    ]
    assert annotations.read_json(write(mark + ends.join(["[1,", "2]"])), "numbers") == [1, 2]


def test_columns_in_another_order_and_more_of_them(write):
    rows, problems = read_csv(write("n, caption ,video_id\n1,x,a\n"))
    assert rows == [(2, {"n": "1", "caption": "x", "video_id": "a"})] and not problems


def test_rows_that_are_left_out(write):
    rows, problems = read_csv(write('video_id,caption\na,x,y\nb\n"c\nc",\n,z\nd,w\n'))
    assert rows == [(7, {"video_id": "d", "caption": "w"})]
    assert [re.match(r"line \d left out: .{9}", what)[0] for what in problems] == [
        "line 2 left out: 3 cells f",
        "line 3 left out: it has no",
        "line 4 left out: it has no",
        "line 6 left out: it has no",
    ]
    rows, problems = read_csv(write("video_id,caption\nb\nc,\n"), blank=("caption",))
    assert [row for _, row in rows] == [
        {"video_id": "b", "caption": ""},
        {"video_id": "c", "caption": ""},
    ]
    assert not problems

    problems = []
    rows = annotations.read_tsv(write("a\tb\n1\t2\t3\nx\t\n\ty\n"), ("id", "text"), problems)
    assert rows == [(1, {"id": "a", "text": "b"})]
    assert [what.split(" left")[0] for _, _, what in problems] == ["line 2", "line 3", "line 4"]
    assert "'1\\t2\\t3'" in problems[0][2]

    problems = []
    assert annotations.read_list(write("a\nb\na\n"), problems) == ["a", "b"]
    assert problems[0][2] == "line 3 left out: a is listed before"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("", "columns video_id, caption in its first line, found nothing"),
        ("video_id;caption\na;x\n", r"found video_id;caption\. .*separated by commas"),
        ("id,caption\na,x\n", "found id, caption"),
        ("video_id,caption\n", "expected one row per clip or caption, found none."),
        ("video_id,caption\na,\n", "line 2 left out: it has no caption"),
        ('video_id,caption\na,x\nb,"y\nc,z\n', "near line 4: .*quote"),
        (b"video_id,caption\na,x\nb,\xe9t\xe9\n", r"UTF-8.* line 3 \(byte 23\)"),
        ("video_id,caption\na,x\n".encode("utf-16"), "UTF-8.* line 1"),
        (b"\x00\x00\x00\x00", "columns|CSV"),
    ],
)
def test_csv_files_that_stop(write, content, found):
    with pytest.raises(UserError, match=found) as caught:
        read_csv(write(content))
    assert "file" in str(caught.value)


def test_other_files_that_stop(write, tmp_path):
    with pytest.raises(UserError, match=r"file: expected numbers, .* line 2, column 1.*complete"):
        annotations.read_json(write("[1,\n"), "numbers")
    with pytest.raises(UserError, match="file: expected one row"):
        annotations.read_tsv(write("\n"), ("id", "text"), [])
    with pytest.raises(UserError, match="file: expected one clip id per line, found none"):
        annotations.read_list(write("\n \n"), [])
    with pytest.raises(UserError, match=r"nowhere: expected an annotation file.*--root"):
        annotations.read_text(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="expected an annotation file"):
        annotations.read_text(str(tmp_path))


def test_every_absent_file_is_named(write, tmp_path):
    write("x")
    with pytest.raises(UserError) as caught:
        annotations.require(str(tmp_path), ["file", "one", "sub/two"], "Someone's")
    listed = [line.strip() for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert listed == [str(tmp_path / "one"), str(tmp_path / "sub" / "two")]
    annotations.require(str(tmp_path), ["file"], "Someone's")


def test_grouped():
    rows = [(1, {"k": "a", "v": "1"}), (2, {"k": "b", "v": "2"}), (3, {"k": "a", "v": "3"})]
    assert annotations.grouped(rows, "k", "v") == {"a": ["1", "3"], "b": ["2"]}
