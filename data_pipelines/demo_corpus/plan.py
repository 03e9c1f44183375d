"""Decides what every clip of the demo shows, sounds like and says, before anything is rendered.

The plan is a function of the seed and of the two sizes alone. Attributes are spread evenly: each
shape, colour, motion, sound and topic occurs about equally often in each split, and all pairs of
them but one are close to independent. The one is sight and sound: a motion goes with a family of
sounds (sounds.FAMILIES), and a clip that sounds has its motion's family with probability 5/8
instead of 1/4. That is what the early alignment of sight and sound can find.

The test split shows only half of all scenes (shape, colour, motion), so that at its full size each
is seen in two clips: what is only heard or said in them cannot be found by looking.
"""

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from data_pipelines.demo_corpus import captions as wording
from data_pipelines.demo_corpus.scenes import COLOURS, MOTIONS, SHAPES
from data_pipelines.demo_corpus.sounds import FAMILIES, SOUNDS
from data_pipelines.demo_corpus.topics import TOPICS

SPLITS = ("train", "test")

# Shares of the clips by what their audio holds. "silent" clips have no audio track at all.
KIND_SHARES = {"silent": 0.08, "sound": 0.20, "speech": 0.10, "sound+speech": 0.62}
# Share of the speaking clips that speech recognition is taken to have missed.
MISSED_SHARE = 0.05
# Probability that a sounding clip's sound is drawn from its motion's own family; otherwise it is
# drawn from all families alike.
CORRESPONDENCE = 0.5
# Captions per clip, by split and group, where the group applies. In training, what is seen is
# learnt within a hundred steps, and then crowds out what is harder, which gets more captions.
PARAPHRASES = {
    "train": {"vision": 2, "sound": 6, "speech": 6, "sound+speech": 4},
    "test": {"vision": 1, "sound": 1, "speech": 1, "sound+speech": 1},
}


@dataclasses.dataclass(frozen=True)
class PlannedClip:
    """One clip to be made.

    Attributes:
        video_id: unique in the corpus, such as "train_0007".
        split: "train" or "test".
        index: position in the split; with the seed and the split it fixes the clip's randomness.
        shape, colour, motion: what is seen.
        sound: what is heard in the background; "" = nothing.
        topic: what is spoken about; "" = nobody speaks.
        script: the words spoken; "" = nobody speaks.
        has_transcript: False if nobody speaks, or recognition is taken to have missed it.
        captions: (group, text) pairs. A clip whose speech was missed has none about its speech.
    """

    video_id: str
    split: str
    index: int
    shape: str
    colour: str
    motion: str
    sound: str
    topic: str
    script: str
    has_transcript: bool
    captions: tuple[tuple[str, str], ...]

    @property
    def has_track(self) -> bool:
        """Whether the file has an audio track."""
        return bool(self.sound or self.topic)


def clip_rng(seed: int, clip: PlannedClip, purpose: int) -> np.random.Generator:
    """Returns a clip's random generator for one purpose; the same in every process and order."""
    entropy = [seed, SPLITS.index(clip.split), clip.index, purpose]
    return np.random.default_rng(np.random.SeedSequence(entropy))


def plan(seed: int, n_train: int, n_test: int) -> list[PlannedClip]:
    """Plans the corpus: n_train training clips, then n_test test clips."""
    return _plan_split(seed, "train", n_train) + _plan_split(seed, "test", n_test)


def _plan_split(seed: int, split: str, n: int) -> list[PlannedClip]:
    rng = np.random.default_rng(np.random.SeedSequence([seed, SPLITS.index(split)]))

    # What is seen. Half of the scenes in the test split: those with an even sum of indices, a half
    # in which any two attributes still occur in every combination.
    scenes = np.array(list(itertools.product(*map(range, map(len, (SHAPES, COLOURS, MOTIONS))))))
    if split == "test":
        scenes = scenes[scenes.sum(axis=1) % 2 == 0]
    scenes = np.concatenate([rng.permutation(scenes) for _ in range(1 + n // len(scenes))])[:n]
    shape, colour, motion = scenes[rng.permutation(n)].T

    # What kind of audio there is.
    kind = np.repeat(np.arange(len(KIND_SHARES)), _apportion(list(KIND_SHARES.values()), n))
    kind = _spread(rng, rng.permutation(kind), [shape, colour, motion])
    kinds = np.array(list(KIND_SHARES))[kind]
    sounds, speaks = ((np.char.find(kinds, part) >= 0) for part in ("sound", "speech"))

    # What is heard: given the motion, by the correspondence; evenly over all else.
    heard = np.flatnonzero(sounds)
    sound = _sounds_of(motion[heard])
    sound = _spread(rng, sound, [colour[heard], shape[heard], kind[heard]], within=motion[heard])

    # What is said: the same topic with ever other shapes and sounds. -1 = no sound.
    said = np.flatnonzero(speaks)
    all_sounds = np.full(n, -1)
    all_sounds[heard] = sound
    order = rng.permutation(len(TOPICS))
    topic = rng.permutation(np.resize(order, len(said)))
    topic = _spread(
        rng, topic, [shape[said], all_sounds[said], colour[said], motion[said], kind[said]]
    )
    all_topics = np.full(n, -1)
    all_topics[said] = topic
    missed = set(rng.permutation(said)[: round(MISSED_SHARE * len(said))].tolist())

    uses = Counter()
    clips = []
    for i in range(n):
        topic_name = list(TOPICS)[all_topics[i]] if speaks[i] else ""
        clip = PlannedClip(
            video_id=f"{split}_{i:04d}",
            split=split,
            index=i,
            shape=SHAPES[shape[i]],
            colour=list(COLOURS)[colour[i]],
            motion=MOTIONS[motion[i]],
            sound=SOUNDS[all_sounds[i]] if sounds[i] else "",
            topic=topic_name,
            script=_script(seed, split, topic_name, uses[topic_name]) if speaks[i] else "",
            has_transcript=bool(speaks[i]) and i not in missed,
            captions=(),
        )
        uses[topic_name] += 1
        clips.append(dataclasses.replace(clip, captions=_captions(seed, clip)))
    return clips


def _apportion(shares: Sequence[float], n: int) -> np.ndarray:
    """Returns whole numbers that sum to n, in about the given shares (largest remainders)."""
    exact = np.asarray(shares) * n / sum(shares)
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: n - counts.sum()]] += 1
    return counts


def _sounds_of(motion: np.ndarray) -> np.ndarray:
    """Picks a sound index for each motion index [n], in the shares that CORRESPONDENCE asks for.

    Each step takes the sound that is furthest behind its share with its motion, and among such the
    one furthest behind over all motions.
    """
    chance = np.full((len(MOTIONS), len(SOUNDS)), (1 - CORRESPONDENCE) / len(SOUNDS))
    for m, name in enumerate(MOTIONS):
        own = [SOUNDS.index(s) for s in FAMILIES[name]]
        chance[m, own] += CORRESPONDENCE / len(own)
    behind = np.zeros_like(chance)
    picked = []
    for m in motion:
        behind[m] += chance[m]
        picked.append(int(np.argmax(behind[m] + 0.5 * behind.sum(axis=0))))
        behind[m, picked[-1]] -= 1
    return np.array(picked, dtype=int)


def _spread(
    rng: np.random.Generator,
    values: np.ndarray,
    others: Sequence[np.ndarray],
    within: np.ndarray | None = None,
) -> np.ndarray:
    """Reorders values so that they meet the values of each other column as evenly as can be.

    Random pairs are swapped where that lowers the sum of squares of the contingency tables.

    Args:
        rng: source of randomness.
        values: int [n], the column to reorder.
        others: int [n] each, columns to be spread over.
        within: int [n] or None; only entries for which this agrees are swapped.
    """
    values, n = values.tolist(), len(values)
    columns = [column.tolist() for column in others]
    tables = [Counter(zip(values, column, strict=True)) for column in columns]
    for i, j in rng.integers(n, size=(60 * n, 2)).tolist() if n else ():
        a, b = values[i], values[j]
        if a == b or (within is not None and within[i] != within[j]):
            continue
        change = 0
        for table, column in zip(tables, columns, strict=True):
            p, q = column[i], column[j]
            if p != q:
                change += 2 + table[a, q] + table[b, p] - table[a, p] - table[b, q]
        if change < 0:
            values[i], values[j] = b, a
            for table, column in zip(tables, columns, strict=True):
                p, q = column[i], column[j]
                table.subtract([(a, p), (b, q)])
                table.update([(a, q), (b, p)])
    return np.array(values, dtype=int)


def _script(seed: int, split: str, topic: str, use: int) -> str:
    """Returns the script of the topic's use-th clip in the split: an opener and a closer.

    The 16 combinations are ordered in diagonals, each of which has every part once. Training takes
    the first three, testing the last: no test script is heard in training, but all its words are.
    """
    words = TOPICS[topic]
    rng = np.random.default_rng(
        np.random.SeedSequence([seed, len(SPLITS), list(TOPICS).index(topic)])
    )
    openers, closers = rng.permutation(4), rng.permutation(4)
    k = use % 12 if split == "train" else 12 + use % 4
    opener, closer = openers[k % 4], closers[(k + k // 4) % 4]
    text = f"{words.openers[opener]}, {words.closers[closer]}."
    return text[0].upper() + text[1:]


def _captions(seed: int, clip: PlannedClip) -> tuple[tuple[str, str], ...]:
    """Makes the clip's captions, grouped in the order of wording.GROUPS."""
    rng = clip_rng(seed, clip, purpose=0)
    applies = {
        "vision": True,
        "sound": bool(clip.sound),
        "speech": clip.has_transcript,
        "sound+speech": bool(clip.sound) and clip.has_transcript,
    }
    captions = []
    for group in wording.GROUPS:
        if not applies[group]:
            continue
        choices = itertools.product(
            wording.TEMPLATES[group],
            wording.MOTION_PHRASES[clip.motion],
            wording.SOUND_PHRASES[clip.sound] if clip.sound else ("",),
            TOPICS[clip.topic].captions if clip.topic else ("",),
        )
        texts = sorted(
            {
                template.format(
                    shape=clip.shape, colour=clip.colour, motion=motion, sound=sound, topic=topic
                )
                for template, motion, sound, topic in choices
            }
        )
        for text in rng.permutation(texts)[: PARAPHRASES[clip.split][group]]:
            captions.append((group, re.sub(r"\ba(?= [aeiou])", "an", str(text))))
    return tuple(captions)
