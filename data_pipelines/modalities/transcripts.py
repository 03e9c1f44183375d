"""Reads and writes files of transcripts, made by speech recognition (spec sections 1 and 10)."""

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from etils import epath

from data_pipelines import outages
from data_pipelines.datasets import annotations
from save_jax import files
from save_jax.errors import OutageError, UserError

_log = logging.getLogger(__name__)

# Endings of a key of an ASR file that are longer than the four characters of ".mp4".
_LONG_ENDINGS = (".webm", ".mpeg", ".flac", ".opus")

EXPECTED = 'a JSON list of {"key": "ID.mp4", "text": "..."}'


def read_asr(path: str | os.PathLike) -> dict[str, str]:
    """Reads a speech recognition file, here or remote.

    An id that occurs more than once keeps its first text that is not empty, and is named in a
    warning. A byte-order mark is tolerated.

    Args:
        path: a JSON list of {"key": "ID.mp4", "text": "…"}; other fields are ignored.

    Returns:
        The text of each id: its key without a longer ending such as ".webm", or else without the
        last 4 characters.

    Raises:
        UserError: the file is absent, or is not such a list; says where in it.
    """
    transcripts: dict[str, str] = {}
    seen: Counter[str] = Counter()
    entries = annotations.read_json(os.fspath(path), EXPECTED)
    if not isinstance(entries, list):
        raise UserError(f"{path}: expected {EXPECTED}, found a {type(entries).__name__}.")
    for position, entry in enumerate(entries):
        found = _wrong_entry(entry)
        if found:
            raise UserError(
                f"{path}: expected {EXPECTED}, found {found} in entry {position} (from 0). "
                "Correct or remove that entry."
            )
        video_id = _id(entry["key"])
        seen[video_id] += 1
        transcripts[video_id] = transcripts.get(video_id) or entry["text"]
    repeated = sorted(video_id for video_id, times in seen.items() if times > 1)
    if repeated:
        _log.warning(
            "%s: ids that occur more than once (%d), with their first text that is not empty: %s",
            path,
            len(repeated),
            ", ".join(repeated[:10]) + (", …" if len(repeated) > 10 else ""),
        )
    return transcripts


def write_asr(path: str, entries: Sequence[dict[str, Any]]) -> None:
    """Writes a speech recognition file, local or remote, which is complete or not there.

    Raises:
        UserError: it cannot be written.
        OutageError: it cannot be written now.
    """
    final = epath.Path(path)
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        files.write(final, f"[\n{lines}\n]\n" if lines else "[]\n")
    except OSError as error:
        raise cannot_write(path, error) from error


def exists(path: str | os.PathLike) -> bool:
    """Returns whether a file exists, local or remote; OutageError if that is unknown."""
    return outages.exists(path)


def cannot_write(path: str, error: OSError) -> UserError | OutageError:
    """Returns the error for a file of transcripts that cannot be written."""
    if outages.is_outage(error) and error.errno not in outages.NO_SPACE:
        return outages.outage(path, error)
    return UserError(
        f"{path}: expected a place to write transcripts to, found: {error.strerror or error}. Make "
        "room or give another --out; the clips transcribed so far are kept."
    )


def _id(key: str) -> str:
    return key[: -5 if key.lower().endswith(_LONG_ENDINGS) else -4]


def _wrong_entry(entry: Any) -> str:
    """Describes what is wrong with an entry of the list; "" when nothing is."""
    if not isinstance(entry, dict):
        return f"a {type(entry).__name__}"
    for field in ("key", "text"):
        if field not in entry:
            return f"no {field!r} (only {sorted(entry)})"
        if not isinstance(entry[field], str):
            return f"a {field!r} that is a {type(entry[field]).__name__}, not a string,"
    if not _id(entry["key"]):
        return f"the key {entry['key']!r}, too short to be ID.mp4,"
    return ""
