"""A prepared directory: its metadata, and the paths of what belongs to it."""

import contextlib
import json
from typing import Any

from etils import epath

from data_pipelines import outages
from data_pipelines.recipe import Recipe
from save_jax.errors import UserError
from save_jax.files import is_remote


def prepared_by(directory: epath.Path) -> Recipe:
    """Reads the recipe of a prepared directory; raises UserError when it is not one."""
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
    """Reads the metadata of a prepared directory: recipe, transcripts, counts, problems."""
    return json.loads((directory / "metadata.json").read_text())


def work_directory(directory: epath.Path) -> epath.Path:
    """Returns the path of a directory until it is complete; buckets cannot rename, so the same."""
    if is_remote(directory):
        return directory
    return directory.with_name(f"{directory.name}.incomplete")


def notes_directory(directory: epath.Path) -> epath.Path:
    """Returns the folder that records which shards are done, until the directory is complete."""
    return directory.with_name(f"{directory.name}.progress")


def lock_path(directory: epath.Path) -> epath.Path:
    """Returns the file that a process locks (`locks.hold`) while it prepares a directory."""
    return directory.with_name(f"{directory.name}.lock")


def clean_up(directory: epath.Path) -> None:
    """Removes what a complete directory no longer needs."""
    with contextlib.suppress(OSError):  # it is absent, or we may not write there
        notes_directory(directory).rmtree()
    # A process that still holds the lock does so only to find that the directory is complete.
    with contextlib.suppress(Exception):  # each kind of store has its own
        lock_path(directory).unlink(missing_ok=True)
