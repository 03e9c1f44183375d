"""Ids of models on the Hugging Face Hub: OWNER/NAME, or OWNER/NAME@REVISION."""

import re
from typing import NamedTuple

FORM = "OWNER/NAME or, with a branch, tag or commit, OWNER/NAME@REVISION"
_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?")


class HubId(NamedTuple):
    """A model on the hub.

    Attributes:
        model: OWNER/NAME.
        revision: a branch, tag or commit; None = the model's default branch, as it is now.
    """

    model: str
    revision: str | None


def parse(source: str) -> HubId | None:
    """Reads an id; returns None for what is none, such as a path."""
    found = _ID.fullmatch(source)
    return HubId(found[1], found[2]) if found else None


def split(source: str) -> HubId:
    """Splits NAME@REVISION, where NAME may be a name of Whisper's too, such as "large-v3"."""
    model, _, revision = source.partition("@")
    return HubId(model, revision or None)
