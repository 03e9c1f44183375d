"""What goes wrong with checkpoints, in words: a file, a full disk or a store may be at fault."""

import contextlib
import errno
import logging
from collections.abc import Generator, Mapping
from typing import Any

from save_jax import files
from save_jax.errors import OutageError, UserError, is_outage
from save_jax.frozen import DIRECTORY as FROZEN

SHOWN = 5  # names shown of a long list
# How TensorStore says that a disk is full, and that a store fails: its statuses, as text.
_FULL = ("RESOURCE_EXHAUSTED", "No space left", "Disk quota exceeded")
_FAILING = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "Input/output error")


def is_failing(error: Exception) -> bool:
    """Says whether the machine, its network or a store fails; the checkpoint may be sound."""
    return is_outage(error) or any(sign in str(error) for sign in _FAILING)


def short(error: Exception) -> str:
    """Returns what TensorStore says, without its specification of the store."""
    return str(error).partition(" [")[0][:300]


def _silence_asyncio() -> None:
    """Keeps asyncio from printing a traceback for each other array that failed in the same way."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def unreadable(checkpoint: files.Path, error: Exception) -> UserError | OutageError:
    """Returns what to raise when a checkpoint cannot be read: whose fault it is, and what to do."""
    _silence_asyncio()
    if is_failing(error):
        return OutageError(
            f"{checkpoint} cannot be read now: {short(error)}. That is the fault of this machine, "
            "its network or a store, not of the checkpoint: when it works again, the same command "
            "resumes."
        )
    what_to_do = "Remove a damaged one to resume from the one before."
    if checkpoint.parent.name == FROZEN:  # all checkpoints of the run need it
        what_to_do = "Put it back from a copy of the run: all its checkpoints need it."
    return UserError(
        f"{checkpoint} cannot be read: it is damaged, or this user may not read it: "
        f"{short(error)}. {what_to_do}"
    )


@contextlib.contextmanager
def writing(directory: files.Path) -> Generator[None, None, None]:
    """Raises what TensorStore says of a full disk or a failing store as what it is.

    Raises:
        OSError: the disk is full (ENOSPC).
        OutageError: the disk or the store fails.
    """
    try:
        yield
    except ValueError as error:  # orbax passes TensorStore's statuses on as these
        said = str(error)
        if any(sign in said for sign in (*_FULL, *_FAILING)):
            _silence_asyncio()
        if any(sign in said for sign in _FULL):
            message = "No space left on device for a checkpoint"
            raise OSError(errno.ENOSPC, message, str(directory)) from error
        if is_failing(error):
            raise OutageError(
                f"{directory}: a checkpoint could not be written: {short(error)}. That is "
                "the fault of this machine, its network or a store: when it works again, run the "
                "same command again to resume."
            ) from error
        raise


def check_shapes(found: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Raises UserError naming what is missing, unexpected or misshapen in a checkpoint."""
    problems = {
        "missing": sorted(set(expected) - set(found)),
        "unexpected": sorted(set(found) - set(expected)),
        "misshapen": [
            f"{name} is {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
            for name in sorted(set(found) & set(expected))
            if tuple(found[name].shape) != tuple(expected[name].shape)
        ],
    }
    if any(problems.values()):
        lines = [
            f"  {len(names)} {kind}: {', '.join(names[:SHOWN])}"
            + (", …" if len(names) > SHOWN else "")
            for kind, names in problems.items()
            if names
        ]
        raise UserError(
            f"{where} is a checkpoint of another architecture:\n"
            + "\n".join(lines)
            + "\nUse the config that made it (its workdir's config.json)."
        )
