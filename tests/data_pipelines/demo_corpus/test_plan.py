"""The demo's plan and wording: balance, ambiguity of what is seen, two vocabularies a topic."""

import itertools
import re
from collections import Counter

import pytest

from data_pipelines.demo_corpus import captions as wording
from data_pipelines.demo_corpus import sounds
from data_pipelines.demo_corpus.plan import PARAPHRASES, plan
from data_pipelines.demo_corpus.scenes import COLOURS, MOTIONS, SHAPES
from data_pipelines.demo_corpus.topics import TOPICS

SEEDS = (0, 1, 2)
_FUNCTION_WORDS = (
    "a about above across after again all along an and any are as at away back because before "
    "behind beside both but by down each every first for from going had has have he her here him "
    "his how i if in inside into is it its like looking more my near new no not of off on one or "
    "our out over she so some that the their them then these they this through to under until up "
    "upward us was we were when while with without you your "
)


def _content_words(text):
    return set(re.findall(r"[a-z]+", text.lower())) - set(_FUNCTION_WORDS.split())


@pytest.fixture(scope="module", params=SEEDS)
def clips(request):
    return plan(request.param, 600, 128)


@pytest.fixture(scope="module")
def test_clips(clips):
    return [clip for clip in clips if clip.split == "test"]


def test_sizes_and_ids(clips):
    assert Counter(clip.split for clip in clips) == {"train": 600, "test": 128}
    assert len({clip.video_id for clip in clips}) == 728


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_attribute_value_occurs_about_equally_often(clips, split):
    clips = [clip for clip in clips if clip.split == split]
    domains = {
        "shape": SHAPES,
        "colour": COLOURS,
        "motion": MOTIONS,
        "sound": sounds.SOUNDS,
        "topic": TOPICS,
    }
    for attribute, values in domains.items():
        counts = Counter(getattr(clip, attribute) for clip in clips if getattr(clip, attribute))
        assert set(counts) == set(values)
        assert max(counts.values()) - min(counts.values()) <= max(2, 0.15 * min(counts.values()))


def test_kinds_of_audio_have_their_shares(clips):
    kinds = Counter((bool(clip.sound), bool(clip.topic)) for clip in clips)
    shares = {kind: count / len(clips) for kind, count in kinds.items()}
    assert shares[False, False] == pytest.approx(0.08, abs=0.01)
    assert shares[True, False] == pytest.approx(0.20, abs=0.01)
    assert shares[False, True] == pytest.approx(0.10, abs=0.01)
    speaking = [clip for clip in clips if clip.topic]
    missed = sum(not clip.has_transcript for clip in speaking) / len(speaking)
    assert missed == pytest.approx(0.05, abs=0.01)
    assert not any(clip.has_transcript for clip in clips if not clip.topic)


def test_captions_belong_to_the_groups_that_apply(clips):
    for clip in clips:
        expected = {"vision"}
        if clip.sound:
            expected.add("sound")
        if clip.has_transcript:
            expected.add("speech")
        if clip.sound and clip.has_transcript:
            expected.add("sound+speech")
        counts = Counter(group for group, _ in clip.captions)
        assert expected <= set(wording.GROUPS)
        assert counts == {group: PARAPHRASES[clip.split][group] for group in expected}
        assert len(set(clip.captions)) == len(clip.captions)


def test_a_caption_says_only_what_its_group_may(clips):
    for clip in clips:
        for group, text in clip.captions:
            words = set(re.findall("[a-z]+", text))
            assert (clip.shape in words) == (group == "vision"), text
            assert (clip.colour in words) == (group == "vision"), text
            assert not re.search(r"\ba [aeiou]", text), text


def test_what_is_seen_repeats_in_the_gallery(test_clips):
    scenes = Counter((clip.shape, clip.colour, clip.motion) for clip in test_clips)
    assert len(scenes) == 64
    assert set(scenes.values()) == {2}


def test_what_is_heard_or_said_is_nearly_unique_in_the_gallery(test_clips):
    def largest_cells(*attributes):
        cells = Counter(tuple(getattr(clip, a) for a in attributes) for clip in test_clips)
        return sorted(count for cell, count in cells.items() if all(cell))

    colour_sound = largest_cells("colour", "sound")
    assert colour_sound[-1] <= 2
    assert colour_sound.count(2) <= 0.25 * len(colour_sound)
    assert largest_cells("shape", "topic")[-1] == 1
    assert largest_cells("sound", "topic")[-1] == 1


def test_sound_and_topic_do_not_depend_on_shape_and_colour(clips):
    clips = [clip for clip in clips if clip.split == "train"]
    for first, second in [("sound", "shape"), ("sound", "colour"), ("topic", "shape")]:
        pairs = [(getattr(clip, first), getattr(clip, second)) for clip in clips]
        cells = Counter(pair for pair in pairs if pair[0])
        assert max(cells.values()) - min(cells.values()) <= 4, (first, second)


def test_the_motion_goes_with_the_family_of_the_sound(clips):
    sounding = [clip for clip in clips if clip.sound]
    share = sum(sounds.family(clip.sound) == clip.motion for clip in sounding) / len(sounding)
    assert share == pytest.approx(5 / 8, abs=0.03)


def test_test_scripts_are_new_but_their_words_are_not(clips):
    train = [clip for clip in clips if clip.split == "train" and clip.topic]
    test = [clip for clip in clips if clip.split == "test" and clip.topic]
    assert not {clip.script for clip in train} & {clip.script for clip in test}
    for clip in test:
        heard = set().union(
            *(_content_words(c.script) for c in train if c.topic == clip.topic and c.has_transcript)
        )
        assert len(_content_words(clip.script) - heard) <= 1


def test_the_plan_depends_on_the_seed_alone():
    assert plan(0, 20, 8) == plan(0, 20, 8)
    assert plan(0, 20, 8) != plan(1, 20, 8)
    assert plan(0, 0, 0) == []


@pytest.mark.parametrize("topic", TOPICS)
def test_captions_and_scripts_of_a_topic_share_no_content_word(topic):
    words = TOPICS[topic]
    captions = set().union(*map(_content_words, words.captions))
    scripts = set().union(*map(_content_words, words.openers + words.closers))
    # Four letters stand for a word's stem.
    shared = [(a, b) for a, b in itertools.product(captions, scripts) if a[:4] == b[:4]]
    assert not shared


def test_scripts_are_short_enough_for_a_clip():
    for topic in TOPICS.values():
        for opener, closer in itertools.product(topic.openers, topic.closers):
            assert len(f"{opener} {closer}".split()) <= 10
