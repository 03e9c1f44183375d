import gzip
import pathlib
import sys

import numpy as np
import pytest

from save_jax import tokenizer as clip_tokenizer
from save_jax.errors import UserError
from tests.support import hub_cache

# By OpenAI's own simple_tokenizer.
PUBLISHED = {
    "a diagram": [320, 22697],
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "hello world!": [3306, 1002, 256],
    "café": [15304],
    "cafe\u0301": [15304],
    "naïve façade": [1097, 35689, 563, 778, 10067, 1928],
    "ÜBER schÃ¶n": [6522, 1516, 844, 7255, 333],
    "日本語": [39121, 44353, 34002, 508],
    "a man 🙂": [320, 786, 14860],
    "don't stop": [847, 713, 1691],
    "they'll we've i'm": [889, 1342, 649, 1200, 328, 880],
    "THEY'LL we’ve I'M": [889, 1342, 649, 1200, 328, 880],
    "2012 videos": [273, 271, 272, 273, 6081],
    "snake_case": [8798, 318, 2068],
    "rock&amp;roll": [2172, 261, 3341],
    "&amp;lt;b&amp;gt; tag": [283, 321, 285, 3640],
    "<i> étude": [283, 328, 285, 3459, 764, 654],
    "<i> e&#769;tude": [283, 328, 285, 324, 136, 479, 764, 654],  # not composed again
    "...!?": [3002, 6004],
    "  tabs\tand\nlines ": [29163, 537, 3418],
}


@pytest.fixture(scope="module")
def tokenizer():
    return clip_tokenizer.Tokenizer()


def test_published_ids(tokenizer):
    ids = tokenizer(list(PUBLISHED), 20, short_is_empty=False)
    assert ids.dtype == np.int32 and ids.shape == (len(PUBLISHED), 20)
    for row, (words, expected) in zip(ids, PUBLISHED.items(), strict=True):
        padding = [0] * (20 - len(expected) - 2)
        assert row.tolist() == [49406, *expected, 49407, *padding], words


@pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="instant-clip-tokenizer has no build for Python 3.13"
)
def test_another_implementation_agrees(tokenizer):
    import instant_clip_tokenizer

    other = instant_clip_tokenizer.Tokenizer()
    texts = [
        *PUBLISHED,
        "a woman in a red dress is singing on stage",
        "Größe, señor, œuvre, İstanbul, ΣΑΣ",
        "👩‍🚀 🇫🇷 👍🏽 x",
        "___ __init__ a_b_c 3.14159 ½ ²",
        "'s 's''s l'été o'clock",
        "supercalifragilisticexpialidocious " * 30,
        "#hashtag @user http://a.b/c?d=e",
    ]
    # The other one cleans nothing, which is why it is given what is clean already.
    expected = [other.encode(clip_tokenizer.clean(words)) for words in texts]
    ids = tokenizer(texts, 400, short_is_empty=False)
    for row, its_expected, words in zip(ids, expected, texts, strict=True):
        assert row[1 : row.tolist().index(49407)].tolist() == its_expected, words


def test_long_texts_are_cut_and_still_end(tokenizer):
    row = tokenizer(["dog " * 100], 8)[0]
    assert row.tolist() == [49406, *[1929] * 6, 49407]
    assert tokenizer(["a photo of a cat"], 7)[0].tolist() == [
        49406, 320, 1125, 539, 320, 2368, 49407,
    ]  # fmt: skip


@pytest.mark.parametrize("words", ["", "you.", "    "])
def test_under_five_characters_is_no_text(tokenizer, words):
    assert not tokenizer([words], 6).any()
    assert tokenizer([words + "x" * 5], 6).any()


def test_short_texts_count_where_asked(tokenizer):
    ids = tokenizer(["a cat", "cat", ""], 5, short_is_empty=False)
    assert ids.tolist() == [[49406, 320, 2368, 49407, 0], [49406, 2368, 49407, 0, 0], [0] * 5]


def test_no_texts(tokenizer):
    assert tokenizer([], 7).shape == (0, 7)


def test_a_directory_gives_the_same_ids(tokenizer, tmp_path):
    clip_tokenizer._from_vocabulary_file(clip_tokenizer._packaged()).save_pretrained(tmp_path)
    texts = list(PUBLISHED)
    np.testing.assert_array_equal(
        clip_tokenizer.Tokenizer(str(tmp_path))(texts, 12), tokenizer(texts, 12)
    )


def test_a_directory_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="expected a CLIPTokenizer") as caught:
        clip_tokenizer.Tokenizer(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_another_vocabulary_is_refused(tmp_path):
    import transformers

    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "a": 3}
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="49406"):
        clip_tokenizer.Tokenizer(str(tmp_path))


def test_without_the_package_of_the_vocabulary(tokenizer, tmp_path, monkeypatch):
    clip_tokenizer._from_vocabulary_file(clip_tokenizer._packaged()).save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "clip", None)  # as if openai-clip were not installed
    with pytest.raises(UserError, match=r"openai-clip==1\.0\.1.*data\.tokenizer"):
        clip_tokenizer.Tokenizer()
    np.testing.assert_array_equal(
        clip_tokenizer.Tokenizer(str(tmp_path))(list(PUBLISHED), 12),
        tokenizer(list(PUBLISHED), 12),
    )


def test_a_vocabulary_file_that_is_not_openais_is_refused(tmp_path, monkeypatch):
    whole = pathlib.Path(clip_tokenizer._packaged()).read_bytes()
    changed = gzip.compress(gzip.decompress(whole).replace(b"\nt h\n", b"\nh t\n", 1))
    package = tmp_path / "clip"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for content in (whole[:-1000], changed, b""):
        (package / clip_tokenizer._VOCABULARY_FILE).write_bytes(content)
        with pytest.raises(
            UserError, match=r"found [\d,]+ bytes with SHA-256.*--no-deps"
        ) as caught:
            clip_tokenizer.Tokenizer()
        assert str(package / clip_tokenizer._VOCABULARY_FILE) in str(caught.value)


def test_a_hub_id_may_pin_a_revision(tokenizer, tmp_path, monkeypatch):
    """The default branch holds no tokenizer of CLIP's; the pinned revision does."""
    import transformers

    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "a": 3}
    other = transformers.CLIPTokenizer(vocab=vocabulary, merges=[])
    other.save_pretrained(hub_cache.revision(tmp_path, "someone/words", 0))
    clips = clip_tokenizer._from_vocabulary_file(clip_tokenizer._packaged())
    clips.save_pretrained(hub_cache.revision(tmp_path, "someone/words", 1))
    hub_cache.name(tmp_path, "someone/words", main=0, v1=1)
    hub_cache.use(monkeypatch, tmp_path)
    with pytest.raises(UserError, match="49406"):
        clip_tokenizer.Tokenizer("someone/words")
    for pinned in ("v1", hub_cache.commit(1)):
        found = clip_tokenizer.Tokenizer(f"someone/words@{pinned}")
        np.testing.assert_array_equal(found(list(PUBLISHED), 12), tokenizer(list(PUBLISHED), 12))
        assert found.digest() == tokenizer.digest()
