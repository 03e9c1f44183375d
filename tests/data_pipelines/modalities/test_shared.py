"""What all variants of a data set share, which may be prepared at once: transcripts, vectors."""

import json
import threading

import pytest

from data_pipelines import sidecars
from data_pipelines.datasets.types import Clip
from data_pipelines.modalities import teacher, whisper
from save_jax import locks
from save_jax.models import imagebind
from save_jax.weights.names import imagebind as names

MODEL = "large-v3"


def clips(first: int, last: int) -> list[Clip]:
    numbers = range(first, last)
    return [Clip(f"v{n}", f"/nowhere/v{n}.mp4", None, (), (), None, None) for n in numbers]


@pytest.fixture
def heard(monkeypatch):
    """The ids of the clips that a stand-in for the model has heard, and what a thread awaits."""
    ids: list[str] = []
    go_on: dict[str, threading.Event] = {}

    def hear_all(todo, ear, settings):
        for number, clip in enumerate(todo):
            name = threading.current_thread().name
            if number == 2 and name in go_on:
                go_on[name].wait(30)
            ids.append(clip.video_id)
            entry = {"key": f"{clip.video_id}.mp4", "text": "words", "language": "en"}
            yield {**entry, "found": whisper.SPEECH, "problems": [], **settings}

    monkeypatch.setattr(whisper, "_load", lambda *_: None)
    monkeypatch.setattr(whisper, "_hear_all", hear_all)
    return ids, go_on


def test_variants_that_are_transcribed_at_once_lose_nothing(tmp_path, heard, capsys):
    ids, go_on = heard
    path = tmp_path / "msrvtt" / f"whisper-{MODEL}.json"
    counts = {}

    def transcribe(name, first, last):
        counts[name] = whisper.transcribe(clips(first, last), str(path), model=MODEL).counts

    go_on["a"] = threading.Event()
    a = threading.Thread(target=transcribe, args=("a", 0, 6), name="a")
    b = threading.Thread(target=transcribe, args=("b", 4, 10), name="b")
    a.start()
    while len(ids) < 2:
        a.join(0.05)
    b.start()
    b.join(1)  # it would be done by now
    go_on["a"].set()
    for thread in (a, b):
        thread.join(30)
    keys = {entry["key"] for entry in json.loads(path.read_text())}
    assert keys == {f"v{n}.mp4" for n in range(10)}
    assert sorted(ids) == [f"v{n}" for n in range(10)]  # none twice
    assert counts["b"]["kept"] == 2
    assert f"which holds {path}" in capsys.readouterr().out
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_vectors_that_another_process_computes_are_waited_for(tmp_path, monkeypatch, capsys):
    begun = threading.Event()

    def compute(given, *_, **__):
        begun.set()
        return given, ()

    monkeypatch.setattr(teacher, "compute", compute)
    monkeypatch.setattr(imagebind, "make_embed", lambda *_: None)
    monkeypatch.setattr(names, "loader", lambda _: dict)
    folder = str(tmp_path / "msrvtt")
    wait = threading.Thread(
        target=sidecars._find_vectors, args=(clips(0, 2), folder, "huge.pth", 1, False)
    )
    vectors = tmp_path / "msrvtt" / "ImageBind"
    with locks.hold(vectors, beside=vectors.with_name("ImageBind.lock")):
        wait.start()
        wait.join(1)  # it would have begun by now
        assert wait.is_alive() and not begun.is_set()
    wait.join(60)
    assert begun.is_set() and f"which holds {vectors}" in capsys.readouterr().out
