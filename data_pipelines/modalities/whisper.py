"""Speech recognition by Whisper: writes the file that transcripts.read_asr reads.

The settings of faster-whisper, and why:

* Only what its voice-activity detector takes for speech is transcribed. Whisper invents words where
  nobody speaks, and detecting the language of silence costs as much as a transcription.
* Beam search with 5 beams, Whisper's default, at temperature 0 alone: a higher temperature, which
  Whisper falls back to, draws random numbers, and a second run would find other words. The main
  reason to fall back, repetition, is handled by a second search that may not repeat three words.
* No window is prompted with the text of the previous one: a mistake would carry over into the rest
  of a long video, and most clips are a single window.
* float16 on a GPU, 8-bit integers on a CPU, where 60 short clips took a third less time than in
  float32 on a busy machine, with the same words for any number of threads.
"""

import collections
import concurrent.futures
import contextlib
import functools
import os
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from tqdm import tqdm

from data_pipelines.datasets.types import Clip, Problem
from data_pipelines.modalities import audio, record, transcripts
from data_pipelines.modalities.whisper_journal import (
    Entry,
    appending,
    journal_path,
    read_written,
    resume,
)
from data_pipelines.pool import in_order
from save_jax import hub_ids, locks
from save_jax.errors import UserError
from save_jax.messages import did_you_mean

# The possible results of a clip, in the order of the summary.
SPEECH, NO_SPEECH, NO_AUDIO, UNREADABLE = "speech", "no speech", "no audio", "unreadable"

_MODEL_FILES = ("model.bin", "config.json", "tokenizer.json")
# Clips in flight per GPU: while one is transcribed, the sound of others is read.
_CLIPS_PER_GPU = 4

# Text that compresses by more than this is a loop, by Whisper's own measure.
_LOOP = 2.4
# Processes that read sound, which is fast compared with transcribing it.
_READERS = 2

# A clip's sound, and what is wrong with its files.
Read = tuple[np.ndarray | None, list[str]]


class WhisperSummary(NamedTuple):
    """The counts and problems of a transcription.

    Attributes:
        counts: "clips", and of these those with "speech", with "no speech", with "no audio" and
            with "unreadable" audio; "kept" of them were transcribed by an earlier run.
        problems: every file whose sound cannot be read.
    """

    counts: dict[str, int]
    problems: tuple[Problem, ...]


class _Ear(NamedTuple):
    """A loaded model.

    Attributes:
        hear: maps a waveform, float32 [samples] at 16 kHz, to the fields of an entry that say what
            is heard. May be called from several threads.
        where: the device, in words.
        at_once: clips to keep in flight.
        readers: processes that read their sound; 1 = this one.
    """

    hear: Callable[[np.ndarray], Entry]
    where: str
    at_once: int
    readers: int


def transcribe(
    clips: Sequence[Clip],
    path: str,
    *,
    model: str,
    translate: bool = False,
    device: str = "auto",
    strict: bool = False,
    workers: int = 0,
) -> WhisperSummary:
    """Transcribes what is said in clips and writes it as a speech recognition file.

    Clips that the file has already are kept, and so are those that an interrupted run finished,
    which a journal beside the file holds; the result does not depend on interruptions. Only clips
    whose sound could not be read are tried again. The variants of a data set share the file: a
    process waits for another that transcribes into it, and keeps what that one has done.

    Args:
        clips: the clips; of several with one id, the first counts.
        path: the file to write, a JSON list of {"key": "ID.mp4", "text": "…", "language": "en",
            "language_probability": 0.98, …} in the order of the clips, followed by other entries
            that it held. Without speech, the text and the language are "".
        model: a local directory with a Whisper model in CTranslate2's format, or its id: one of
            faster-whisper's ("large-v3") or of the Hugging Face hub; ID@REVISION pins a revision.
        translate: translate what is not English into English.
        device: "cuda" (all GPUs), "cpu", or "auto": GPUs where there are any.
        strict: raise UserError on the first clip whose sound cannot be read.
        workers: clips at once on a CPU, each with a thread of the model; 0 = one per processor.
            Sound is read in other processes, or with 1 in this one.

    Raises:
        UserError: the model cannot be loaded or does not work, or the file was made with other
            settings, or cannot be written.
        OutageError: the machine, its network or a store fails.
    """
    settings = {"model": model, "translate": translate}
    with locks.hold(epath.Path(path), beside=epath.Path(f"{path}.lock"), wait=True):
        load = functools.partial(_load, model, translate, device, workers)
        return _transcribe(clips, path, settings, load, strict)


def _transcribe(
    clips: Sequence[Clip],
    path: str,
    settings: Entry,
    load: Callable[[], _Ear],
    strict: bool,
) -> WhisperSummary:
    """Transcribes into a file that no other process writes to; see `transcribe`."""
    journal = journal_path(path)
    written = read_written(path, settings)
    known = {entry["key"]: entry for entry in [*written, *resume(journal, settings)]}
    wanted: dict[str, Clip] = {}
    for clip in clips:
        wanted.setdefault(_key(clip), clip)
    heard = {
        key: known[key] for key in wanted if key in known and known[key]["found"] != UNREADABLE
    }
    kept = len(heard)
    todo = [clip for key, clip in wanted.items() if key not in heard]
    if todo:
        ear = load()
        with (
            appending(journal) as append,
            contextlib.closing(_hear_all(todo, ear, settings)) as entries,
        ):
            for entry in entries:
                if strict and entry["problems"]:
                    raise UserError("\n".join(entry["problems"]))
                append(entry)
                heard[entry["key"]] = entry
    result = [heard[key] for key in wanted]
    result += [entry for key, entry in known.items() if key not in heard]
    if result != written or not transcripts.exists(path):
        transcripts.write_asr(path, result)
    journal.unlink(missing_ok=True)

    found = collections.Counter(entry["found"] for entry in heard.values())
    return WhisperSummary(
        counts={
            "clips": len(wanted),
            **{what: found[what] for what in (SPEECH, NO_SPEECH, NO_AUDIO, UNREADABLE)},
            "kept": kept,
        },
        problems=tuple(
            ("", clip.video_id, problem)
            for key, clip in wanted.items()
            for problem in heard[key]["problems"]
        ),
    )


def check_model(model: str) -> None:
    """Raises UserError if a model is neither a local directory nor an id that may exist."""
    if os.path.isdir(model) or hub_ids.parse(model):
        return
    try:
        import faster_whisper
    except ImportError:  # which `transcribe` reports if it has anything to do
        return
    known = faster_whisper.available_models()
    name, revision = hub_ids.split(model)
    if name not in known or (revision is None and "@" in model):
        raise UserError(
            f"--whisper={model}: no such model or directory.{did_you_mean(name, known)} Expected "
            f"a local directory, one of {', '.join(known)}, or the id of a model in CTranslate2's "
            f"format on the Hugging Face hub ({hub_ids.FORM})."
        )


def _load(model: str, translate: bool, device: str, workers: int) -> _Ear:
    """Loads a model; UserError when that fails."""
    try:
        import ctranslate2
        import faster_whisper
    except ImportError as error:
        raise UserError(
            f"expected the package faster-whisper to transcribe speech, found that it cannot be "
            f"imported ({error}). Install it: pip install -e '.[whisper]' in a clone of save_jax; "
            "or prepare with a file of transcripts, or with --transcripts=none."
        ) from error
    if device == "auto":
        device = "cuda" if ctranslate2.get_cuda_device_count() else "cpu"
    if device == "cuda":
        gpus = ctranslate2.get_cuda_device_count()
        load = functools.partial(
            faster_whisper.WhisperModel, device_index=list(range(gpus)), compute_type="float16"
        )
        where, at_once = f"{gpus} GPU" + "s" * (gpus > 1), _CLIPS_PER_GPU * gpus
    else:
        at_once = workers or os.cpu_count() or 1
        # One thread per clip: several threads of one clip mostly wait for each other.
        load = functools.partial(
            faster_whisper.WhisperModel, cpu_threads=1, num_workers=at_once, compute_type="int8"
        )
        where = f"CPU, {at_once} at once"
    check_model(model)
    directory = model if os.path.isdir(model) else _download(model)
    _check_files(model, directory)
    try:
        whisper = load(directory, device=device)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--whisper={model}: expected a Whisper model that can be loaded, found: {error}"
            + _cuda_remedy(device)
        ) from error
    if translate and not whisper.model.is_multilingual:
        raise UserError(
            f"--whisper={model}: expected a multilingual model for --translate, found one for "
            "English only. Choose another (such as large-v3), or leave out --translate."
        )

    def hear(waveform: np.ndarray) -> Entry:
        try:
            return _hear(whisper, waveform, translate)
        except RuntimeError as error:  # CTranslate2's: a library or memory is missing
            raise UserError(
                f"--whisper={model}: expected it to run on {where}, found: {error}"
                + _cuda_remedy(device)
            ) from error

    return _Ear(hear, where, at_once, 1 if workers == 1 else _READERS)


def _download(model: str) -> str:
    """Downloads a model given by its id, unless that was done before; returns its folder."""
    import faster_whisper

    name, revision = hub_ids.split(model)
    try:
        return faster_whisper.download_model(name, revision=revision)
    except Exception as error:  # each network library has its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--whisper={model}: expected a local directory, or the id of a model that can be "
            f"downloaded, found no such directory, and the download failed ({reason}). Without "
            "network, prepare with --transcripts=none or a file of transcripts; or download all "
            "files of the model elsewhere (large-v3 is Systran/faster-whisper-large-v3 on the "
            f"Hugging Face hub: {', '.join(_MODEL_FILES)} and the other .json and .txt files), put "
            "them into one directory here, and give it: --whisper=DIRECTORY."
        ) from error


def _check_files(model: str, directory: str) -> None:
    missing = [name for name in _MODEL_FILES if not os.path.exists(os.path.join(directory, name))]
    if missing:
        raise UserError(
            f"--whisper={model}: expected a directory with a Whisper model in CTranslate2's format,"
            f" found no {', '.join(missing)} in it. A model of the transformers library is "
            "converted with: ct2-transformers-converter --model DIRECTORY --output_dir NEW "
            "--copy_files tokenizer.json preprocessor_config.json"
        )


def _cuda_remedy(device: str) -> str:
    if device == "cpu":
        return ""
    return (
        ". CTranslate2 needs CUDA 12's cuBLAS and cuDNN 9 in LD_LIBRARY_PATH (pip install "
        "nvidia-cublas-cu12 nvidia-cudnn-cu12 brings them) and enough GPU memory. The clips "
        "transcribed so far are kept. CUDA_VISIBLE_DEVICES= (empty) transcribes on the CPU."
    )


def _hear(whisper: Any, waveform: np.ndarray, translate: bool) -> Entry:
    """Transcribes a waveform; returns the fields of an entry that say what is heard."""
    from faster_whisper.vad import get_speech_timestamps

    spans = get_speech_timestamps(waveform)
    if not spans:
        return _silence(NO_SPEECH)
    speech = np.concatenate([waveform[span["start"] : span["end"]] for span in spans])
    options = {"beam_size": 5, "temperature": 0.0, "condition_on_previous_text": False}
    segments, about = whisper.transcribe(speech, **options)
    # Segments are decoded lazily: so far, only the language has been detected.
    again = functools.partial(whisper.transcribe, speech, language=about.language)
    task = "translate" if translate and about.language != "en" else "transcribe"
    if task == "translate":
        segments, _ = again(task=task, **options)
    segments = list(segments)
    if any(segment.compression_ratio > _LOOP for segment in segments):
        segments, _ = again(task=task, no_repeat_ngram_size=3, **options)
    text = "".join(segment.text for segment in segments).strip()
    if not text:
        return _silence(NO_SPEECH)
    return {
        "text": text,
        "language": about.language,
        "language_probability": round(float(about.language_probability), 4),
        "found": SPEECH,
    }


def _silence(found: str) -> Entry:
    return {"text": "", "language": "", "language_probability": 0.0, "found": found}


def _hear_all(clips: list[Clip], ear: _Ear, settings: Entry) -> Generator[Entry]:
    """Yields the entries of clips as they are done, with a progress bar."""

    def hear(clip: Clip, read: Read) -> Entry:
        waveform, problems = read
        if waveform is None and problems:
            heard = _silence(UNREADABLE)
        elif not audio.long_enough(waveform):
            heard = _silence(NO_AUDIO)
        elif not np.isfinite(waveform).all():
            problems = [*problems, f"no speech from {_sound(clip)}: its sound has NaNs"]
            heard = _silence(UNREADABLE)
        else:
            heard = ear.hear(waveform)
        return {"key": _key(clip), **heard, "problems": problems, **settings}

    name = os.path.basename(os.path.normpath(settings["model"]))
    progress = tqdm(total=len(clips), desc=f"transcribing ({name}, {ear.where})", unit="clip")
    pool = concurrent.futures.ThreadPoolExecutor(ear.at_once)
    reading = in_order(record.read_waveform, clips, ear.readers, _crashed, _sound)
    try:
        with progress, contextlib.closing(reading):
            under_way: set[concurrent.futures.Future[Entry]] = set()
            for clip, read in zip(clips, reading, strict=True):
                under_way.add(pool.submit(hear, clip, read))
                if len(under_way) > ear.at_once:
                    done, under_way = concurrent.futures.wait(
                        under_way, return_when=concurrent.futures.FIRST_COMPLETED
                    )
                    for job in done:
                        yield job.result()
                        progress.update()
            for job in concurrent.futures.as_completed(under_way):
                yield job.result()
                progress.update()
    finally:
        pool.shutdown(cancel_futures=True)


def _crashed(clip: Clip) -> Read:
    return None, [f"no audio from {_sound(clip)}: it crashes the decoder"]


def _sound(clip: Clip) -> str:
    return clip.audio or clip.video


def _key(clip: Clip) -> str:
    return f"{clip.video_id}.mp4"
