"""Where a prepared directory and what belongs to it lie."""

import contextlib

from etils import epath

from save_jax.files import is_remote


def work_directory(directory: epath.Path) -> epath.Path:
    """What a directory is called until it is complete: another name, where it can be renamed."""
    if is_remote(directory):
        return directory
    return directory.with_name(f"{directory.name}.incomplete")


def notes_directory(directory: epath.Path) -> epath.Path:
    """Where it is noted which shards of a directory are done, until all of it is."""
    return directory.with_name(f"{directory.name}.progress")


def lock_path(directory: epath.Path) -> epath.Path:
    """The file by which a process holds a directory (`files.hold`) while it prepares it."""
    return directory.with_name(f"{directory.name}.lock")


def clean_up(directory: epath.Path) -> None:
    """Removes what a directory that is complete needs no more."""
    with contextlib.suppress(OSError):  # it is not there; or it is not for us to write there
        notes_directory(directory).rmtree()
    # Should another process hold the lock still, then to find out what is known here.
    with contextlib.suppress(Exception):  # each kind of store has its own
        lock_path(directory).unlink(missing_ok=True)
