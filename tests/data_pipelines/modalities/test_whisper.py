"""Speech recognition by a real Whisper model, tiny.en, of speech by espeak-ng."""

import builtins
import functools
import json
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from data_pipelines.demo_corpus.topics import TOPICS
from data_pipelines.modalities import record, whisper, whisper_journal
from data_pipelines.modalities.transcripts import read_asr
from save_jax.errors import UserError
from tests.support import media, object_store, whisper_runs
from tests.support.whisper_runs import clip_of, say, spoken

MODEL = whisper_runs.model()
# The clearest of several ways to speak, by the topics that the test below does not use.
CLEAR = {"voice": "en", "words_per_minute": 150, "pitch": 50, "brightness": 0.8}
transcribe = functools.partial(whisper.transcribe, model=MODEL, workers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the clips of `spoken`, and in whole.json what is heard. Not to be written to."""
    folder = tmp_path_factory.mktemp("spoken")
    transcribe(spoken(folder), str(folder / "whole.json"))
    return folder


@pytest.fixture
def read(monkeypatch):
    """The ids of the clips whose sound is read in this process, as it happens."""
    ids = []
    original = record.read_waveform

    def reading(clip):
        ids.append(clip.video_id)
        return original(clip)

    monkeypatch.setattr(record, "read_waveform", reading)
    return ids


def _words(text):
    return re.findall(r"[a-z']+", text.lower())


def _errors(said, heard):
    """The least number of words to change, drop or add in `said` to get `heard`."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            substituted = diagonal + (word != other)
            diagonal, row[j] = row[j], min(substituted, row[j] + 1, row[j - 1] + 1)
    return row[-1]


def test_the_error_count():
    assert _errors(["a", "b", "c", "d"], ["a", "x", "c", "d", "e"]) == 2
    assert _errors(["a", "b"], []) == 2
    assert _errors([], ["a"]) == 1
    assert _errors(["a", "b", "c"], ["b", "c"]) == 1


# Written before any of them was transcribed, and none was changed after.
ORDINARY = (
    "The children walked to school together on a cold and rainy morning.",
    "My brother bought a new bicycle last week and rides it every day.",
    "Please close the window before you leave the room tonight.",
    "We had dinner at a small restaurant near the train station.",
    "The doctor told her to drink more water and get some rest.",
    "He forgot his keys at the office and had to go back for them.",
    "There are twelve months in a year and seven days in a week.",
    "The old man sat on a bench in the park and read the newspaper.",
    "She opened the door slowly and looked into the dark garden.",
    "Our teacher explained the problem again because nobody understood it.",
    "The weather will be sunny tomorrow with a light wind from the south.",
    "They are planning to build a new bridge across the river next year.",
    "I would like a cup of tea with milk and two spoons of sugar.",
    "The dog chased the cat around the house until both were tired.",
    "You can find the answer on the last page of the book.",
    "The airplane landed two hours late because of the heavy snow.",
    "My grandmother bakes the best apple pie in the whole village.",
    "The company wants to hire more people before the end of the summer.",
    "He played the guitar while his friends were singing around the fire.",
    "It takes about thirty minutes to drive from here to the airport.",
)


def _error_rate(folder, sentences):
    """Words changed, dropped or added, over words said."""
    for number, sentence in enumerate(sentences):
        say(folder / f"{number:02}.wav", sentence, **CLEAR)
    clips = [clip_of(path) for path in sorted(folder.glob("*.wav"))]
    transcribe(clips, str(folder / "asr.json"), workers=0)
    heard = read_asr(folder / "asr.json")
    said = {clip.video_id: _words(text) for clip, text in zip(clips, sentences, strict=True)}
    errors = sum(_errors(words, _words(heard[video_id])) for video_id, words in said.items())
    return errors / sum(map(len, said.values()))


def test_ordinary_sentences_are_heard(tmp_path):
    rate = _error_rate(tmp_path, ORDINARY)
    print(f"word error rate of {len(ORDINARY)} ordinary sentences: {rate:.3f}")
    assert rate < 0.15


def test_most_of_the_demos_words_are_heard(tmp_path):
    """The demo's scripts join halves that have little to do with each other: harder to guess."""
    sentences = [f"{topic.openers[0]}, {topic.closers[0]}." for topic in TOPICS.values()][:20]
    rate = _error_rate(tmp_path, sentences)
    print(f"word error rate of {len(sentences)} scripts: {rate:.3f}")
    assert rate < 0.25  # 0.226 was measured


def test_the_file_is_an_asr_file_in_the_order_of_the_clips(folder):
    entries = json.loads((folder / "whole.json").read_text())
    assert [entry["key"] for entry in entries] == [f"clip{n}.mp4" for n in range(4)]
    for entry, words in zip(entries, whisper_runs.WORDS, strict=True):
        assert set(_words(entry["text"])) & set(_words(words))
        assert entry["language"] == "en" and entry["language_probability"] == 1
        assert entry["found"] == "speech" and entry["model"] == MODEL
    assert list(read_asr(folder / "whole.json")) == [f"clip{n}" for n in range(4)]
    assert not list(folder.glob("whole.json.*"))


def test_several_at_once_hear_the_same(folder, tmp_path):
    summary = transcribe(spoken(folder), str(tmp_path / "asr.json"), workers=3)
    assert (tmp_path / "asr.json").read_bytes() == (folder / "whole.json").read_bytes()
    assert summary.counts["speech"] == 4


def test_a_killed_run_is_gone_on_with(folder, tmp_path, read):
    path, count = tmp_path / "asr.json", 2
    program = [
        sys.executable,
        "-m",
        "tests.support.whisper_runs",
        str(folder),
        str(path),
        str(count),
    ]
    assert subprocess.run(program, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    assert not path.exists()
    torn = (tmp_path / "asr.json.partial").read_text()
    assert torn.count("\n") == count and not torn.endswith("\n")

    summary = transcribe(spoken(folder), str(path))
    assert path.read_bytes() == (folder / "whole.json").read_bytes()
    assert len(read) == 4 - count
    assert summary.counts["kept"] == count and summary.counts["speech"] == 4
    assert [file.name for file in tmp_path.iterdir()] == ["asr.json"]


def test_what_is_done_is_kept_and_more_clips_are_added(folder, tmp_path, read):
    clips, path = spoken(folder), str(tmp_path / "asr.json")
    transcribe(clips[2:], path)
    assert transcribe(clips, path).counts["kept"] == 2
    assert read == ["clip2", "clip3", "clip0", "clip1"]
    assert (tmp_path / "asr.json").read_bytes() == (folder / "whole.json").read_bytes()
    # Neither what is not asked for this time, nor a model that cannot be loaded, matters then.
    changed = (tmp_path / "asr.json").stat().st_mtime_ns
    assert transcribe(clips[:1] * 2, path).counts["clips"] == 1
    assert transcribe(clips, path).counts["kept"] == 4
    assert len(read) == 4
    assert set(read_asr(path)) == {f"clip{n}" for n in range(4)}
    assert (tmp_path / "asr.json").stat().st_mtime_ns == changed


@pytest.mark.parametrize("name", ["asr.json", "asr.json.partial"])
def test_other_settings_are_not_mixed(folder, tmp_path, name):
    entry = json.loads((folder / "whole.json").read_text())[0]
    lines = json.dumps({**entry, "model": "large-v3"}) + "\n"
    (tmp_path / name).write_text(lines if name.endswith(".partial") else f"[{lines}]")
    with pytest.raises(UserError, match=f"{name}: expected .*tiny|{name}.*model='large-v3'"):
        transcribe(spoken(folder), str(tmp_path / "asr.json"))
    assert (tmp_path / name).exists()


def test_a_file_from_elsewhere_is_not_written_over(folder, tmp_path):
    (tmp_path / "asr.json").write_text('[{"key": "clip0.mp4", "text": "mine"}]')
    with pytest.raises(UserError, match="found model=None"):
        transcribe(spoken(folder), str(tmp_path / "asr.json"))


def test_clips_that_do_not_speak_are_counted(tmp_path):
    frames = media.numbered_frames(4)
    media.write_video(tmp_path / "mute.mp4", frames)
    media.write_wav(tmp_path / "blip.wav", media.tone(0.02)[None])
    media.write_wav(tmp_path / "silence.wav", np.zeros((1, 16000)))
    media.write_wav(tmp_path / "tone.wav", media.tone(1.0)[None])
    (tmp_path / "notes.mp4").write_text("not a video")
    say(tmp_path / "speech.wav", "The teacher smiles.")
    names = ["mute.mp4", "blip.wav", "silence.wav", "tone.wav", "notes.mp4", "speech.wav"]
    clips = [clip_of(tmp_path / name) for name in [*names, "absent.mp4"]]
    path = str(tmp_path / "asr.json")

    summary = transcribe(clips, path)
    heard = {"speech": 1, "no speech": 2, "no audio": 2, "unreadable": 2}
    assert summary.counts == {"clips": 7, **heard, "kept": 0}
    assert [(split, video_id) for split, video_id, _ in summary.problems] == [
        ("", "notes"),
        ("", "absent"),
    ]
    assert "notes.mp4" in summary.problems[0][2]
    texts = read_asr(path)
    assert [video_id for video_id, text in texts.items() if text] == ["speech"]
    assert len(texts) == 7

    # What could not be read may be mended; all else is done.
    say(tmp_path / "absent.wav", "Light the fire.")
    (tmp_path / "absent.wav").rename(tmp_path / "absent.mp4")
    summary = transcribe(clips, path)
    assert summary.counts["kept"] == 5 and summary.counts["unreadable"] == 1
    assert "fire" in read_asr(path)["absent"].lower()


def test_a_clips_own_audio_file_comes_first(tmp_path):
    media.write_video(tmp_path / "clip.mp4", media.numbered_frames(4), sound=media.tone(0.4)[None])
    say(tmp_path / "clip.wav", "Light the fire.")
    clip = whisper_runs.Clip(
        "clip", str(tmp_path / "clip.mp4"), str(tmp_path / "clip.wav"), (), (), None, None
    )
    transcribe([clip], str(tmp_path / "asr.json"))
    assert "fire" in read_asr(tmp_path / "asr.json")["clip"].lower()


def test_strict_stops_at_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "notes.mp4").write_text("not a video")
    with pytest.raises(UserError, match=r"notes\.mp4"):
        transcribe([clip_of(tmp_path / "notes.mp4")], str(tmp_path / "asr.json"), strict=True)
    assert not (tmp_path / "asr.json").exists()


def test_a_full_disk_keeps_what_is_done(folder, tmp_path, monkeypatch, read):
    clips, path = spoken(folder), tmp_path / "asr.json"
    append, lines = whisper_journal.append_line, []

    def full(file, line):
        if len(lines) == 2:
            raise OSError(28, "No space left on device")
        lines.append(line)
        append(file, line)

    monkeypatch.setattr(whisper_journal, "append_line", full)
    with pytest.raises(UserError, match=r"asr\.json\.partial.*No space left.*are kept"):
        transcribe(clips, str(path))
    monkeypatch.undo()
    assert transcribe(clips, str(path)).counts["kept"] == 2
    assert path.read_bytes() == (folder / "whole.json").read_bytes()


def test_the_file_may_be_remote(folder, tmp_path, monkeypatch):
    object_store.register()
    monkeypatch.setenv("SAVE_JAX_CACHE", str(tmp_path / "cache"))
    transcribe(spoken(folder), "gs://bucket/out/asr.json")
    assert read_asr("gs://bucket/out/asr.json") == read_asr(folder / "whole.json")
    assert transcribe(spoken(folder), "gs://bucket/out/asr.json").counts["kept"] == 4
    assert not list((tmp_path / "cache").iterdir())


def test_without_the_package_its_extra_is_named(folder, tmp_path, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "faster_whisper":
            raise ImportError("No module named 'faster_whisper'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install -e '\.\[whisper\]'"):
        transcribe(spoken(folder), str(tmp_path / "asr.json"))


def test_models_that_cannot_be_had_are_named(folder, tmp_path, monkeypatch):
    hear = functools.partial(transcribe, spoken(folder), str(tmp_path / "asr.json"))
    with pytest.raises(UserError, match=r"--whisper=huge.*no such model or directory.*large-v3"):
        hear(model="huge")
    import huggingface_hub

    def offline(*args, **kwargs):
        raise ConnectionError("the network cannot be reached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    wanted = r"--whisper=large-v3.*cannot be reached.*Systran/faster-whisper-large-v3.*model\.bin"
    with pytest.raises(UserError, match=wanted):
        hear(model="large-v3")
    (tmp_path / "other").mkdir(parents=True)
    (tmp_path / "other" / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(UserError, match=r"no model\.bin, .*ct2-transformers-converter"):
        hear(model=str(tmp_path / "other"))
    for name in ("model.bin", "config.json", "tokenizer.json"):
        (tmp_path / "other" / name).write_bytes(b"{}")
    with pytest.raises(UserError, match="expected a Whisper model that can be loaded"):
        hear(model=str(tmp_path / "other"))
    with pytest.raises(UserError, match="a multilingual model for --translate"):
        hear(translate=True)


@pytest.mark.parametrize(
    ("model", "repository", "revision"),
    [
        ("someone/whisper@v1", "someone/whisper", "v1"),
        ("large-v3@refs/pr/2", "Systran/faster-whisper-large-v3", "refs/pr/2"),
        ("someone/whisper", "someone/whisper", None),
    ],
)
def test_an_id_may_pin_a_revision(folder, tmp_path, monkeypatch, model, repository, revision):
    import huggingface_hub

    asked = []

    def snapshot_download(repo_id, revision=None, **options):
        asked.append((repo_id, revision))
        raise ConnectionError("the network cannot be reached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match="cannot be reached"):
        transcribe(spoken(folder), str(tmp_path / "asr.json"), model=model)
    assert set(asked) == {(repository, revision)}
    with pytest.raises(UserError, match="no such model or directory"):
        transcribe(spoken(folder), str(tmp_path / "asr.json"), model="large-v3@")


class _Linguist:
    """Stands in for a model of many languages: the loudness of a clip is its language."""

    model = SimpleNamespace(is_multilingual=True)

    def __init__(self, *args, **kwargs):
        self.heard = []

    def transcribe(self, speech, task="transcribe", language=None, **options):
        detected = language or ("de" if np.abs(speech).max() > 0.4 else "en")

        def segments():
            self.heard.append((detected, task))
            text = " The fire." if task == "translate" or detected == "en" else " Das Feuer."
            yield SimpleNamespace(text=text, compression_ratio=1.0)

        return segments(), SimpleNamespace(language=detected, language_probability=0.91)


@pytest.mark.parametrize("translate", [False, True])
def test_only_other_languages_are_translated(tmp_path, monkeypatch, translate):
    say(tmp_path / "english.wav", "Light the fire.")
    loud = record.read_waveform(clip_of(tmp_path / "english.wav"))[0]
    media.write_wav(tmp_path / "german.wav", np.clip(loud * 0.95 / np.abs(loud).max(), -1, 1)[None])
    media.write_wav(tmp_path / "english.wav", (loud * 0.2 / np.abs(loud).max())[None])
    linguist = _Linguist()
    monkeypatch.setattr("faster_whisper.WhisperModel", lambda *args, **kwargs: linguist)
    clips = [clip_of(tmp_path / name) for name in ("english.wav", "german.wav")]
    transcribe(clips, str(tmp_path / "asr.json"), translate=translate)
    english, german = json.loads((tmp_path / "asr.json").read_text())
    assert (english["text"], english["language"]) == ("The fire.", "en")
    assert german["text"] == ("The fire." if translate else "Das Feuer.")
    assert (german["language"], german["language_probability"]) == ("de", 0.91)
    # Each is searched for once: what is not read of an answer is not computed.
    tasks = {("en", "transcribe"), ("de", "translate" if translate else "transcribe")}
    assert sorted(linguist.heard) == sorted(tasks)


def test_text_that_goes_round_in_circles_is_searched_for_again(tmp_path, monkeypatch):
    calls = []

    class Parrot(_Linguist):
        def transcribe(self, speech, no_repeat_ngram_size=0, **options):
            calls.append(no_repeat_ngram_size)
            text, ratio = ("that's that's", 9.0) if not no_repeat_ngram_size else ("that's", 1.0)
            segment = SimpleNamespace(text=text, compression_ratio=ratio)
            return iter([segment]), SimpleNamespace(language="en", language_probability=1.0)

    monkeypatch.setattr("faster_whisper.WhisperModel", Parrot)
    say(tmp_path / "clip.wav", "Light the fire.")
    transcribe([clip_of(tmp_path / "clip.wav")], str(tmp_path / "asr.json"))
    assert read_asr(tmp_path / "asr.json") == {"clip": "that's"}
    assert calls == [0, 3]
