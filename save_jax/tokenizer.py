"""Captions and transcripts in, CLIP's byte-pair ids out (spec section 1)."""

import gzip
import hashlib
import html
import importlib.util
import json
import os
import re
from collections.abc import Sequence

import ftfy
import numpy as np

# Else transformers, of which only the tokenizer is used, asks for PyTorch when it is imported.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import transformers

from save_jax import hub_ids
from save_jax.errors import UserError

START = 49406
END = 49407
VOCABULARY_SIZE = 49408
MIN_CHARACTERS = 5  # a text of fewer characters counts as no text

_VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"
_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
_REMEDY = (
    "Install that package (pip install --force-reinstall --no-deps openai-clip==1.0.1), or set "
    "data.tokenizer to a directory with a CLIPTokenizer of transformers (vocab.json and "
    "merges.txt), which works without it."
)


class Tokenizer:
    """CLIP's tokenizer: cleans a text as OpenAI's original does, then splits it into ids."""

    def __init__(self, source: str = ""):
        """Loads the vocabulary.

        Args:
            source: "" for OpenAI's own vocabulary file, which the PyPI package openai-clip ships;
                else a local directory, or an id on the Hugging Face hub (OWNER/NAME@REVISION pins
                a revision), of a CLIPTokenizer.

        Raises:
            UserError: no vocabulary of CLIP's is found there.
        """
        tokenizer = _from_transformers(source) if source else _from_vocabulary_file(_packaged())
        self._backend = tokenizer.backend_tokenizer
        # Cleaning is done here, by OpenAI's steps and in their order. The backend's own differ: its
        # Unicode composition, for one, comes after HTML entities, where OpenAI has none.
        self._backend.normalizer = None
        self._backend.no_truncation()
        self._backend.no_padding()

    def digest(self) -> str:
        """Returns a SHA-256 of the tokens in the order of their ids, wherever they were read."""
        # An id is a merge's rank, so that this decides the ids of every text.
        tokens = sorted(self._backend.get_vocab().items(), key=lambda entry: entry[1])
        return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()

    def __call__(
        self, texts: Sequence[str], length: int, *, short_is_empty: bool = True
    ) -> np.ndarray:
        """Turns texts into ids.

        Args:
            texts: n texts.
            length: L, ids per text, at least 2.
            short_is_empty: whether a text under 5 characters has no ids at all, as in the
                reference, where it marks a clip in which nothing is said.

        Returns:
            int32 [n, L]: start, at most L − 2 tokens, end, then zeros; all zeros for an empty text.
        """
        if length < 2:
            raise ValueError(f"expected room for a start and an end id, found length {length}")
        ids = np.zeros((len(texts), length), np.int32)
        least = MIN_CHARACTERS if short_is_empty else 1
        rows = [row for row, text in enumerate(texts) if len(text) >= least]
        encoded = self._backend.encode_batch_fast(
            [clean(texts[row]) for row in rows], add_special_tokens=False
        )
        for row, encoding in zip(rows, encoded, strict=True):
            tokens = encoding.ids[: length - 2]
            ids[row, : len(tokens) + 2] = [START, *tokens, END]
        return ids


def clean(text: str) -> str:
    """Repairs wrong encodings, resolves HTML entities (twice), collapses white space, lowers."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip().lower()


def _packaged() -> str:
    """Finds the vocabulary file in the package openai-clip, which is not imported.

    Importing that package would import PyTorch.
    """
    package = importlib.util.find_spec("clip")
    for folder in (package.submodule_search_locations or ()) if package else ():
        path = os.path.join(folder, _VOCABULARY_FILE)
        if os.path.exists(path):
            return path
    raise UserError(
        f"expected CLIP's vocabulary file {_VOCABULARY_FILE} in the installed package openai-clip, "
        f"found none. {_REMEDY}"
    )


def _from_vocabulary_file(path: str) -> transformers.CLIPTokenizer:
    """Builds the tokenizer from OpenAI's list of merges, in the order that makes CLIP's ids.

    Raises:
        UserError: the file is not OpenAI's, byte for byte.
    """
    with open(path, "rb") as file:
        content = file.read()
    if (found := hashlib.sha256(content).hexdigest()) != _SHA256:
        raise UserError(
            f"expected CLIP's vocabulary in {path}, as the package openai-clip has it (SHA-256 "
            f"{_SHA256}), found {len(content):,} bytes with SHA-256 {found}. {_REMEDY}"
        )
    lines = gzip.decompress(content).decode().split("\n")
    # The file holds more merges than CLIP uses; its first line is a header.
    merges = [tuple(line.split()) for line in lines[1 : VOCABULARY_SIZE - 2 * 256 - 2 + 1]]
    letters = _byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(
        vocab={token: position for position, token in enumerate(tokens)},
        merges=merges,  # ty: ignore[invalid-argument-type]  pairs, which its annotation forgets
    )


def _byte_letters() -> list[str]:
    """Returns the letter for each byte in byte-level BPE, in OpenAI's order.

    Printable bytes are their own letters and come first; the others are moved past byte 255.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    return [chr(byte) for byte in printable] + [
        chr(256 + position) for position in range(256 - len(printable))
    ]


def _from_transformers(source: str) -> transformers.CLIPTokenizer:
    expected = f"expected a CLIPTokenizer of transformers (vocab.json and merges.txt) in {source!r}"
    model, revision = source, None
    if not os.path.exists(source) and (found := hub_ids.parse(source)):
        model, revision = found
    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(model, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{expected}, found none: {str(error).splitlines()[0]} Give a directory or a hub id "
            'that has it, or "" for the vocabulary of the package openai-clip.'
        ) from error
    found = (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer))
    if found != (START, END, VOCABULARY_SIZE):
        raise UserError(
            f"{expected} with start id {START}, end id {END} and {VOCABULARY_SIZE} entries, found "
            f"{found[0]}, {found[1]} and {found[2]}: these are not the ids CLIP was trained with."
        )
    return tokenizer
