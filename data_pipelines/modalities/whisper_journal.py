"""The journal of a transcription: one line per clip, so that an interruption costs few clips.

The journal is beside the file that is to be written, and removed once that is complete. Entries of
either are reused only when they were made with the same settings.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TextIO

from data_pipelines.datasets import annotations
from data_pipelines.modalities import transcripts
from save_jax.errors import UserError
from save_jax.files import is_remote

# The entry of a clip: the fields of an ASR file, and the settings that the text was made with.
Entry = dict[str, Any]


def journal_path(path: str) -> Path:
    """Returns the path of the journal, on this machine because stores cannot append."""
    if not is_remote(path):
        return Path(f"{path}.partial")
    cache = Path(os.environ.get("SAVE_JAX_CACHE") or Path.home() / ".cache" / "save_jax")
    return cache / f"{hashlib.sha256(path.encode()).hexdigest()[:16]}.partial"


def read_written(path: str, settings: Entry) -> list[Entry]:
    """Reads the entries of the file that an earlier run finished; [] when there is none."""
    if not transcripts.exists(path):
        return []
    entries = annotations.read_json(path, transcripts.EXPECTED)
    if not isinstance(entries, list):
        raise UserError(
            f"{path}: expected {transcripts.EXPECTED}, found a {type(entries).__name__}."
        )
    return [_checked(path, entry, settings) for entry in entries]


def resume(journal: Path, settings: Entry) -> list[Entry]:
    """Reads the entries that an interrupted run kept; cuts off a line that it did not finish."""
    if not journal.exists():
        return []
    data = journal.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    entries = []
    for line in whole.decode("utf-8", "replace").splitlines():
        # A crash of the machine, unlike one of the program, may spoil more than the last line.
        with contextlib.suppress(json.JSONDecodeError):
            entries.append(json.loads(line))
    entries = [_checked(str(journal), entry, settings) for entry in entries]
    os.truncate(journal, len(whole))
    return entries


def _checked(path: str, entry: Any, settings: Entry) -> Entry:
    """Returns the entry; raises UserError unless it was made with these settings."""
    found = {name: entry.get(name) for name in settings} if isinstance(entry, dict) else {}
    if found != settings:
        raise UserError(
            f"{path}: expected transcripts made with {_words(settings)}, found {_words(found)} in "
            f"one of them. Use the same settings again, or remove that file to transcribe anew."
        )
    return entry


def _words(settings: Entry) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items()) or "nothing"


@contextlib.contextmanager
def appending(journal: Path) -> Generator[Callable[[Entry], None]]:
    """Opens the journal; yields the function that appends an entry to it."""
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        file = journal.open("a", encoding="utf-8")
    except OSError as error:
        raise transcripts.cannot_write(str(journal), error) from error
    with file:

        def append(entry: Entry) -> None:
            try:
                append_line(file, json.dumps(entry) + "\n")
            except OSError as error:
                raise transcripts.cannot_write(str(journal), error) from error

        yield append


def append_line(file: TextIO, line: str) -> None:
    """Writes a line so that it survives the end of this process."""
    file.write(line)
    file.flush()
