"""What speech recognition heard in each clip (spec sections 1 and 10)."""

import json
import logging
import os
from collections import Counter
from typing import Any

from save_jax.errors import UserError

_log = logging.getLogger(__name__)

_EXPECTED = 'a JSON list of {"key": "ID.mp4", "text": "..."}'


def read_asr(path: str | os.PathLike) -> dict[str, str]:
    """Reads a speech recognition file.

    An id that occurs more than once keeps its first text that is not empty, and is named in a
    warning. A byte-order mark is tolerated.

    Args:
        path: a JSON list of {"key": "ID.mp4", "text": "…"}; other fields are ignored.

    Returns:
        The text of each id, an id being its key without the last 4 characters.

    Raises:
        UserError: the file is absent, or is not such a list; says where in it.
    """
    transcripts: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for position, entry in enumerate(_read_list(path)):
        found = _wrong_entry(entry)
        if found:
            raise UserError(
                f"{path}: expected {_EXPECTED}, found {found} in entry {position} (from 0). "
                "Mend or remove that entry."
            )
        video_id = entry["key"][:-4]
        seen[video_id] += 1
        transcripts[video_id] = transcripts.get(video_id) or entry["text"]
    repeated = sorted(video_id for video_id, times in seen.items() if times > 1)
    if repeated:
        _log.warning(
            "%s: %d ids occur more than once; the first text that is not empty is used: %s",
            path,
            len(repeated),
            ", ".join(repeated[:10]) + (", …" if len(repeated) > 10 else ""),
        )
    return transcripts


def _wrong_entry(entry: Any) -> str:
    """What is wrong with an entry of the list, in words; "" when nothing is."""
    if not isinstance(entry, dict):
        return f"a {type(entry).__name__}"
    for field in ("key", "text"):
        if field not in entry:
            return f"no {field!r} (only {sorted(entry)})"
        if not isinstance(entry[field], str):
            return f"a {field!r} that is a {type(entry[field]).__name__}, not a string,"
    if len(entry["key"]) <= 4:
        return f"the key {entry['key']!r}, too short to be ID.mp4,"
    return ""


def _read_list(path: str | os.PathLike) -> list:
    try:
        with open(path, encoding="utf-8-sig") as file:
            entries = json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path}: expected {_EXPECTED}, found no such file.") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: expected {_EXPECTED}, found malformed JSON at line {error.lineno}, column "
            f"{error.colno} ({error.msg}). Is the file complete?"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: expected UTF-8 text, found another encoding at byte {error.start}. "
            "Save the file as UTF-8."
        ) from error
    if not isinstance(entries, list):
        raise UserError(f"{path}: expected {_EXPECTED}, found a {type(entries).__name__}.")
    return entries
