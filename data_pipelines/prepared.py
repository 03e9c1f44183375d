"""A prepared directory: what it records of itself, and where what belongs to it lies."""

import contextlib
import json
from typing import Any

from etils import epath

from data_pipelines import outages
from data_pipelines.recipe import Recipe
from save_jax.errors import UserError
from save_jax.files import is_remote


def prepared_by(directory: epath.Path) -> Recipe:
    """Reads the recipe of a prepared directory; UserError when it is not one."""
    try:
        with outages.reaching(directory):
            recorded = (directory / "metadata.json").read_text()
        return Recipe.from_json(json.dumps(json.loads(recorded)["recipe"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{directory}: expected a directory that data_pipelines.prepare finished, found no "
            f"usable metadata.json ({error}). Remove it and prepare again."
        ) from error


def metadata(directory: epath.Path) -> dict[str, Any]:
    """What a prepared directory records of itself: recipe, transcripts, counts, problems."""
    return json.loads((directory / "metadata.json").read_text())


def work_directory(directory: epath.Path) -> epath.Path:
    """What a directory is called until it is complete: another name, where it can be renamed."""
    if is_remote(directory):
        return directory
    return directory.with_name(f"{directory.name}.incomplete")


def notes_directory(directory: epath.Path) -> epath.Path:
    """Where it is noted which shards of a directory are done, until all of it is."""
    return directory.with_name(f"{directory.name}.progress")


def lock_path(directory: epath.Path) -> epath.Path:
    """The file by which a process holds a directory (`locks.hold`) while it prepares it."""
    return directory.with_name(f"{directory.name}.lock")


def clean_up(directory: epath.Path) -> None:
    """Removes what a directory that is complete needs no more."""
    with contextlib.suppress(OSError):  # it is not there; or it is not for us to write there
        notes_directory(directory).rmtree()
    # Should another process hold the lock still, then to find out what is known here.
    with contextlib.suppress(Exception):  # each kind of store has its own
        lock_path(directory).unlink(missing_ok=True)
