"""Reads annotation files as people have them: CSV, tab-separated, JSON and lists of ids.

A byte-order mark and Windows line ends are tolerated. A malformed file raises UserError, with the
line if there is one; a single malformed row is left out and named in `problems`. Paths may be
remote.
"""

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from data_pipelines import outages
from data_pipelines.datasets.types import Problem
from save_jax.errors import UserError
from save_jax.messages import did_you_mean

Row = tuple[int, dict[str, str]]  # the line it begins in, from 1, and its cells by column


def require(root: str, files: Sequence[str], owner: str) -> None:
    """Raises UserError naming the `files` below `root` that do not exist.

    Args:
        root: the data set's folder.
        files: paths in it.
        owner: the data set in the message, such as "MSR-VTT's".
    """
    paths = [os.path.join(root, file) for file in files]
    absent = [path for path in paths if not outages.exists(path)]
    if absent:
        raise UserError(
            f"{root}: expected {owner} annotation files there, did not find\n"
            + "\n".join(f"  {path}" for path in absent)
            + "\nPut them there or give another --root."
        )


def read_csv(
    path: str,
    columns: Sequence[str],
    problems: list[Problem],
    *,
    blank: Sequence[str] = (),
    optional: Sequence[str] | None = None,
) -> list[Row]:
    """Reads a comma-separated file whose first line names its columns.

    Args:
        path: the file.
        columns: the columns that it must have.
        problems: gets the rows that are left out: without a value in one of the columns, or with
            more cells than there are columns, as an unquoted comma makes them.
        blank: the columns in which a row may have no value.
        optional: the columns that it may have besides; None = any, which are kept too.

    Raises:
        UserError: it is not such a file, lacks a column, has one that it may not have, or has no
            usable row.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    rows: list[Row] = []
    wrong: list[Problem] = []
    try:
        names = [name.strip() for name in next(reader, [])]
        absent = [column for column in columns if column not in names]
        if absent:
            raise UserError(
                f"{path}: expected the columns {', '.join(columns)} in its first line, found "
                f"{', '.join(names) or 'nothing'}. Is it the right file, separated by commas?"
            )
        strange = [name for name in names if name not in (*columns, *(optional or ()))]
        if optional is not None and strange:
            raise UserError(
                f"{path}: expected the columns {', '.join(columns)} and optionally "
                f"{', '.join(optional)} in its first line, found the unknown column "
                f"{strange[0]!r}.{did_you_mean(strange[0], optional)} Rename or remove it."
            )
        before = reader.line_num
        for cells in reader:
            line, before = before + 1, reader.line_num
            if not any(cells):
                continue  # an empty line
            row = dict(zip(names, cells, strict=False))
            needed = [column for column in columns if column not in blank]
            empty = [column for column in needed if not row.get(column, "").strip()]
            if len(cells) > len(names):
                wrong.append(
                    ("", path, f"line {line} left out: {len(cells)} cells for {len(names)} "
                     "columns; a text with a comma needs quotes around it")
                )  # fmt: skip
            elif empty:
                wrong.append(("", path, f"line {line} left out: it has no {empty[0]}"))
            else:
                rows.append((line, {name: row.get(name, "") for name in names}))
    except csv.Error as error:
        raise UserError(
            f"{path}: expected a CSV file, found near line {reader.line_num}: {error}. Is a quote "
            "missing?"
        ) from error
    return _usable(path, rows, wrong, problems)


def grouped(rows: Sequence[Row], key: str, value: str) -> dict[str, list[str]]:
    """Collects the values of one column for each value of another, in the order of the rows."""
    values: dict[str, list[str]] = {}
    for _, row in rows:
        values.setdefault(row[key], []).append(row[value])
    return values


def read_tsv(path: str, columns: Sequence[str], problems: list[Problem]) -> list[Row]:
    """Reads a tab-separated file without a header, in which quotes have no meaning.

    Args:
        path: the file.
        columns: the names of its columns; every row must have a value in the first and the last.
        problems: gets the rows that are left out.

    Raises:
        UserError: it is not such a file, or has no usable row.
    """
    rows: list[Row] = []
    wrong: list[Problem] = []
    for line, text in _lines(path):
        cells = [cell.strip() for cell in text.split("\t")]
        if len(cells) == len(columns) and cells[0] and cells[-1]:
            rows.append((line, dict(zip(columns, cells, strict=True))))
        else:
            wrong.append(
                ("", path, f"line {line} left out: expected {len(columns)} cells with tabs between "
                 f"them ({', '.join(columns)}), found {text[:80]!r}")
            )  # fmt: skip
    return _usable(path, rows, wrong, problems)


def read_list(path: str, problems: list[Problem]) -> list[str]:
    """Reads ids, one per line; repeated ones are left out and named in `problems`.

    Raises:
        UserError: it is not a text file, or there are none.
    """
    ids: dict[str, None] = {}
    for line, text in _lines(path):
        if text.strip() in ids:
            problems.append(("", path, f"line {line} left out: {text.strip()} is listed before"))
        ids[text.strip()] = None
    if not ids:
        raise UserError(f"{path}: expected one clip id per line, found none. Is it complete?")
    return list(ids)


def read_json(path: str, expected: str) -> Any:
    """Reads a JSON file; raises UserError with what was `expected` and where it is malformed."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: expected {expected}, found malformed JSON at line {error.lineno}, column "
            f"{error.colno} ({error.msg}). Is the file complete?"
        ) from error


def read_text(path: str) -> str:
    """Reads a text in UTF-8, without its byte-order mark.

    Raises:
        UserError: it is absent, or is not such a text.
        OutageError: it cannot be read now.
    """
    try:
        with outages.reaching(path):
            data = epath.Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: expected an annotation file, found: {error}. Put it there, or give another "
            "--root."
        ) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}: expected text in UTF-8, found another encoding in line {line} (byte "
            f"{error.start}). Save the file as UTF-8."
        ) from error


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Returns the lines of a file that are not empty, with their numbers from 1."""
    # str.splitlines would also split at characters that may occur in a caption.
    lines = io.StringIO(read_text(path), newline=None)
    return ((number, line.rstrip("\n")) for number, line in enumerate(lines, 1) if line.strip())


def _usable(path: str, rows: list[Row], wrong: list[Problem], problems: list[Problem]) -> list[Row]:
    """Returns the rows and adds the wrong ones to the problems; UserError if all are wrong."""
    if not rows:
        reason = f"none usable: {wrong[0][2]}" if wrong else "none"
        raise UserError(f"{path}: expected one row per clip or caption, found {reason}.")
    problems += wrong
    return rows
