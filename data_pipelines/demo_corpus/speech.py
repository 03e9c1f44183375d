"""The demo's speakers: espeak-ng, from the library in the package espeakng-loader.

The library keeps state from one utterance to the next (oscillator phases, its own random numbers),
which would make a clip's speech depend on what the same process said before. It is therefore loaded
afresh for every utterance, which takes a few milliseconds.
"""

import _ctypes
import ctypes

import numpy as np

from data_pipelines.demo_corpus.sounds import RATE
from save_jax.errors import UserError

# The voices that speech recognition understands best, of the many that there are.
VOICES = (
    "en-us",
    "en-us+m1",
    "en-us+m6",
    "en-us+robert",
    "en-us+quincy",
    "en",
    "en+m1",
    "en+m2",
    "en+f2",
    "en-us+f2",
    "en-gb-x-rp+f2",
)

# Of speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_POS_CHARACTER = 1
_CHARS_UTF8 = 1
_RATE, _PITCH = 1, 3
_SYNTH_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


def speak(
    text: str, voice: str, words_per_minute: int, pitch: int, brightness: float
) -> np.ndarray:
    """Speaks a text: float32 [samples] at RATE in [-1, 1], without silence around it.

    Args:
        text: what to say, in English.
        voice: one of VOICES.
        words_per_minute: speaking rate, 80 to 450.
        pitch: 0 to 100; 50 is the voice's own.
        brightness: 0 to 1, how much treble is raised against bass, as by another microphone. About
            0.6 is clearest: the consonants of these voices are soft against their vowels.

    Raises:
        UserError: the package espeakng-loader is missing or its library does not work.
    """
    try:
        import espeakng_loader

        library = ctypes.CDLL(espeakng_loader.get_library_path())
    except (ImportError, OSError) as error:
        raise UserError(
            "the demo's speakers need the speech synthesiser espeak-ng, which cannot be loaded "
            f"({error}): pip install -e '.[prepare]' in a clone of save_jax"
        ) from error
    pieces: list[np.ndarray] = []

    @_SYNTH_CALLBACK
    def receive(samples, count, events):
        if samples and count > 0:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0  # continue

    data = espeakng_loader.get_data_path().encode()
    rate = library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data, 0)
    if rate != RATE:
        raise UserError(f"espeak-ng of espeakng-loader starts with {rate}, expected {RATE} Hz")
    library.espeak_ng_SetRandSeed(ctypes.c_long(1))
    library.espeak_SetSynthCallback(receive)
    encoded = text.encode()
    size = ctypes.c_size_t(len(encoded) + 1)
    failed = (
        library.espeak_SetVoiceByName(voice.encode())
        or library.espeak_SetParameter(_RATE, words_per_minute, 0)
        or library.espeak_SetParameter(_PITCH, pitch, 0)
        or library.espeak_Synth(encoded, size, 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None)
        or library.espeak_Synchronize()
    )
    library.espeak_Terminate()
    _ctypes.dlclose(library._handle)
    if failed or not pieces:
        raise UserError(f"espeak-ng could not say {text!r} with the voice {voice!r}")

    wave = np.concatenate(pieces).astype(np.float32) / 32768
    wave[1:] -= brightness * wave[:-1]
    loud = np.flatnonzero(np.abs(wave) > 0.01)
    return wave[loud[0] : loud[-1] + 1]
