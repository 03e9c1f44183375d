"""Words of messages: numbers with their nouns, and what a mistyped word may mean."""

import difflib
from collections.abc import Iterable


def counted(number: int, noun: str) -> str:
    """Formats a number and its noun: "1 point", "2 points", "1 query", "2 queries"."""
    if number == 1:
        return f"{number} {noun}"
    return f"{number} {noun[:-1]}ies" if noun.endswith("y") else f"{number} {noun}s"


def closest(word: str, known: Iterable[str]) -> str:
    """Returns the known word that a mistyped one most likely means, in any case; "" for none."""
    lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), lower, 1)
    return lower[found[0]] if found else ""


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """Formats a question that names the one of `known` nearest to `found`; "" if none is near."""
    near = closest(found, known)
    return f" Did you mean {near}?" if near else ""
