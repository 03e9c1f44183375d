"""What the demo's clips sound like: twelve sounds, synthesised.

Each sound varies from clip to clip in pitch, tempo, phase and detail, and fills its clip. The
sounds form four families; each goes with one motion of the pictures.
"""

from collections.abc import Callable

import numpy as np

RATE = 22050  # samples a second; also what the speech synthesiser gives

# By the motion that goes with them: gliding, percussive, droning and ringing sounds.
FAMILIES: dict[str, tuple[str, str, str]] = {
    "slide": ("siren", "whistle", "birds"),
    "bounce": ("drum", "clock", "dog"),
    "spin": ("engine", "saw", "rain"),
    "pulse": ("bell", "phone", "piano"),
}
SOUNDS = tuple(sound for family in FAMILIES.values() for sound in family)

Rng = np.random.Generator


def family(sound: str) -> str:
    """Returns the motion whose family the sound belongs to."""
    return next(motion for motion, sounds in FAMILIES.items() if sound in sounds)


def synthesise(rng: Rng, sound: str, num_samples: int) -> np.ndarray:
    """Synthesises one sound: float32 [num_samples] at RATE, with a root mean square of 1."""
    wave = _SYNTHESISERS[sound](rng, num_samples)
    return (wave / np.sqrt(np.mean(wave**2) + 1e-12)).astype(np.float32)


def _time(n: int) -> np.ndarray:
    return np.arange(n) / RATE


def _tone(frequency: np.ndarray, phase: float = 0.0) -> np.ndarray:
    """Makes a sine whose frequency (Hz, one per sample) may vary."""
    return np.sin(2 * np.pi * np.cumsum(frequency) / RATE + phase)


def _band(rng: Rng, n: int, low: float, high: float) -> np.ndarray:
    """Makes noise between two frequencies in Hz, with a root mean square of about 1."""
    spectrum = np.fft.rfft(rng.standard_normal(n))
    hz = np.fft.rfftfreq(n, 1 / RATE)
    shape = 1 / (1 + (low / np.maximum(hz, 1)) ** 8) / (1 + (hz / high) ** 8)
    noise = np.fft.irfft(spectrum * shape, n)
    return noise / (noise.std() + 1e-12)


def _place(n: int, events: list[tuple[float, np.ndarray]]) -> np.ndarray:
    """Sums short waves into n samples, each starting at its time in seconds (may be negative)."""
    out = np.zeros(n)
    for start, wave in events:
        first = round(start * RATE)
        wave = wave[max(0, -first) :]
        first = max(0, first)
        wave = wave[: max(0, n - first)]
        out[first : first + len(wave)] += wave
    return out


def _beats(rng: Rng, n: int, period: float) -> np.ndarray:
    """Returns times in seconds, one period apart with a random phase, that cover n samples."""
    return np.arange(-rng.uniform(0, 1), n / RATE / period) * period


def _siren(rng: Rng, n: int) -> np.ndarray:
    centre, rate = rng.uniform(750, 950), rng.uniform(0.5, 0.9)
    sweep = np.sin(2 * np.pi * (rate * _time(n) + rng.uniform()))
    frequency = centre * 2 ** (0.55 * sweep)
    return sum(_tone(k * frequency) / k for k in (1, 2, 3))


def _whistle(rng: Rng, n: int) -> np.ndarray:
    period, low = rng.uniform(0.55, 0.8), rng.uniform(1100, 1500)
    events = []
    for start in _beats(rng, n, period):
        t = _time(int(0.75 * period * RATE))
        rise = t / t[-1]
        glide = _tone(low * 2 ** (1.1 * rise)) + 0.08 * _band(rng, len(t), 1500, 4000)
        events.append((start, glide * np.sin(np.pi * rise) ** 0.5))
    return _place(n, events)


def _birds(rng: Rng, n: int) -> np.ndarray:
    events = []
    for start in _beats(rng, n, rng.uniform(0.5, 0.75)):
        pitch = rng.uniform(3600, 4800)
        for k in range(rng.integers(3, 6)):
            t = _time(int(0.06 * RATE))
            call = _tone(pitch * (1.15 - 0.3 * t / t[-1])) * np.hanning(len(t))
            events.append((start + 0.085 * k, call))
    return _place(n, events)


def _drum(rng: Rng, n: int) -> np.ndarray:
    period, pitch = rng.uniform(0.36, 0.5), rng.uniform(55, 75)
    events = []
    for k, start in enumerate(_beats(rng, n, period)):
        t = _time(int(0.3 * RATE))
        kick = _tone(pitch * (1 + 1.5 * np.exp(-t / 0.03))) * np.exp(-t / 0.10)
        snare = _band(rng, len(t), 200, 5000) * np.exp(-t / 0.05)
        events.append((start, kick if k % 2 == 0 else 0.5 * kick + 0.5 * snare))
    return _place(n, events)


def _clock(rng: Rng, n: int) -> np.ndarray:
    period, pitch = rng.uniform(0.24, 0.34), rng.uniform(2000, 2600)
    events = []
    for k, start in enumerate(_beats(rng, n, period)):
        t = _time(int(0.04 * RATE))
        tick = np.sin(2 * np.pi * pitch * (1.0, 0.8)[k % 2] * t) + 0.5 * _band(
            rng, len(t), 2500, 8000
        )
        events.append((start, tick * np.exp(-t / 0.006)))
    return _place(n, events)


def _dog(rng: Rng, n: int) -> np.ndarray:
    period, pitch = rng.uniform(0.7, 1.0), rng.uniform(330, 450)
    events = []
    for start in _beats(rng, n, period):
        for k in range(2):
            t = _time(int(0.17 * RATE))
            arc = np.sin(np.pi * t / t[-1])
            glide = pitch * (0.75 + 0.5 * arc)
            voice = sum(
                _tone(h * glide) * np.exp(-(((h * pitch - 1000) / 600) ** 2)) for h in range(1, 8)
            )
            bark = voice + 0.35 * _band(rng, len(t), 500, 2500)
            events.append((start + 0.26 * k, bark * arc**0.7))
    return _place(n, events)


def _engine(rng: Rng, n: int) -> np.ndarray:
    base, t = rng.uniform(42, 60), _time(n)
    frequency = base * (1 + 0.04 * np.sin(2 * np.pi * (rng.uniform(0.2, 0.5) * t + rng.uniform())))
    hum = sum(_tone(k * frequency, rng.uniform(0, 6)) / k**0.8 for k in range(1, 14))
    return hum + 0.5 * _band(rng, n, 60, 500)


def _saw(rng: Rng, n: int) -> np.ndarray:
    strokes = _time(n) * rng.uniform(1.3, 1.9) + rng.uniform()
    push = np.sin(np.pi * (2 * strokes % 1)) ** 1.5  # two strokes, there and back
    there = (strokes % 1 < 0.5).astype(float)
    low, high = _band(rng, n, 700, 2200), _band(rng, n, 1800, 5000)
    return push * (there * high + (1 - there) * low)


def _rain(rng: Rng, n: int) -> np.ndarray:
    hiss = _band(rng, n, 1500, 9000)
    drops = []
    for start in rng.uniform(0, n / RATE, size=int(60 * n / RATE)):
        t = _time(int(0.01 * RATE))
        drop = np.sin(2 * np.pi * rng.uniform(1500, 6000) * t) * np.exp(-t / 0.002)
        drops.append((start, rng.uniform(1, 4) * drop))
    return hiss + _place(n, drops)


def _bell(rng: Rng, n: int) -> np.ndarray:
    pitch = rng.uniform(360, 480)
    events = []
    for start in _beats(rng, n, rng.uniform(1.0, 1.4)):
        t = _time(int(2.0 * RATE))
        partials = (
            (0.5, 0.6, 1.2),
            (1, 1, 0.9),
            (1.19, 0.8, 0.7),
            (2, 0.9, 0.5),
            (2.74, 0.5, 0.3),
            (4.1, 0.3, 0.15),
        )  # ratio, level, decay in seconds
        events.append(
            (
                start,
                sum(
                    level * np.sin(2 * np.pi * pitch * ratio * t) * np.exp(-t / decay)
                    for ratio, level, decay in partials
                ),
            )
        )
    return _place(n, events)


def _phone(rng: Rng, n: int) -> np.ndarray:
    t, pitch = _time(n), rng.uniform(0.93, 1.07)
    trill = np.sign(np.sin(2 * np.pi * rng.uniform(18, 24) * t)) > 0
    ring = np.where(trill, _tone(np.full(n, 1800 * pitch)), _tone(np.full(n, 2250 * pitch)))
    ring = ring + 0.3 * np.where(trill, _tone(np.full(n, 3600 * pitch)), 0)
    return ring * ((t / rng.uniform(0.9, 1.1) + rng.uniform()) % 1 < 0.6)


def _piano(rng: Rng, n: int) -> np.ndarray:
    root, step = 262 * 2 ** (rng.integers(-3, 4) / 12), rng.uniform(0.16, 0.24)
    semitones = (0, 4, 7, 12, 16, 12, 7, 4)
    events = []
    for k, start in enumerate(_beats(rng, n, step)):
        t = _time(int(0.7 * RATE))
        note = root * 2 ** (semitones[k % len(semitones)] / 12)
        events.append(
            (
                start,
                sum(
                    np.sin(2 * np.pi * h * note * t) * np.exp(-t * h / 0.3) / h**1.2
                    for h in range(1, 6)
                ),
            )
        )
    return _place(n, events)


_SYNTHESISERS: dict[str, Callable[[Rng, int], np.ndarray]] = {
    "siren": _siren,
    "whistle": _whistle,
    "birds": _birds,
    "drum": _drum,
    "clock": _clock,
    "dog": _dog,
    "engine": _engine,
    "saw": _saw,
    "rain": _rain,
    "bell": _bell,
    "phone": _phone,
    "piano": _piano,
}
