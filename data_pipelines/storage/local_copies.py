"""Local copies of remote files, for readers that know local files only."""

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Generator, Sequence
from typing import BinaryIO

import fsspec
import tqdm

from data_pipelines import outages
from save_jax import files, locks
from save_jax.errors import UserError

# Names the folder for the copies of all data sets; it may be emptied at any time.
DIRECTORY_VARIABLE = "SAVE_JAX_CACHE"

_CHUNK = 8 * 2**20


def local_copies(paths: Sequence[str]) -> list[str]:
    """Copies remote files to this machine, unless there are copies already.

    A copy belongs to one version of a file: a file that has changed is copied again. Of the
    processes of a machine that want the same files, one copies and the others wait for it.

    Args:
        paths: remote files (gs://…, s3://…).

    Returns:
        The path of each file's copy.

    Raises:
        UserError: a file is absent, its kind of store cannot be reached from here, or the copies
            cannot be written.
        OutageError: the store, the network or the disk fails.
    """
    directory = pathlib.Path(
        os.environ.get(DIRECTORY_VARIABLE) or pathlib.Path.home() / ".cache" / "save_jax"
    )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _one_process_at_a_time(directory / "lock"):
            return _copy_all(paths, directory)
    except FileNotFoundError as error:
        raise UserError(
            f"expected the prepared file {error}, did not find it. Prepare again."
        ) from error
    except ImportError as error:
        raise UserError(
            f"{paths[0]}: expected a store that can be read from, found that a package is missing "
            f"({error}). gs:// and s3:// need the extra [remote]: pip install -e '.[remote]'"
        ) from error
    except Exception as error:
        if not isinstance(error, OSError) or error.errno not in outages.NO_SPACE:
            outages.pass_on(error, f"copies of {paths[0]} and others in {directory}")
        if not isinstance(error, OSError):
            raise
        raise UserError(
            f"{directory}: expected a folder for local copies of {paths[0]} and others, found: "
            f"{error}. Make room, or set {DIRECTORY_VARIABLE} to a folder on a larger disk."
        ) from error


def _copy_all(paths: Sequence[str], directory: pathlib.Path) -> list[str]:
    copies, absent = [], []
    for path in paths:
        store, name = fsspec.core.url_to_fs(path)
        # The store's key of a file (its time, its checksum) changes when the file does.
        with outages.reaching(path):
            key = store.ukey(name)
        version = hashlib.sha256(f"{path} {key}".encode()).hexdigest()[:24]
        copy = directory / f"{version}-{name.rpartition('/')[2]}"
        copies.append(os.fspath(copy))
        if not copy.exists():
            absent.append((store, name, path, copy))
    if absent:
        files.remove_leftovers(directory, older_than=0)
        with outages.reaching(paths[0]):
            total = sum(store.size(name) for store, name, *_ in absent)
        with tqdm.tqdm(
            desc=f"copying {paths[0].rpartition('/')[0]} to {directory}",
            total=total,
            unit="B",
            unit_scale=True,
        ) as progress:
            for store, name, path, copy in absent:
                _copy(store, name, path, copy, progress)
    return copies


def _copy(
    store: fsspec.AbstractFileSystem,
    name: str,
    path: str,
    copy: pathlib.Path,
    progress: tqdm.tqdm,
) -> None:
    """Copies a file; the copy gets its name only once it is complete."""
    with outages.reaching(path):
        source = store.open(name, "rb")
    with source, files.appearing(copy) as partial, partial.open("wb") as target:
        while chunk := _read(source, path):
            progress.update(target.write(chunk))


def _read(source: BinaryIO, path: str) -> bytes:
    with outages.reaching(path):
        return source.read(_CHUNK)


@contextlib.contextmanager
def _one_process_at_a_time(path: pathlib.Path) -> Generator[None]:
    descriptor = locks.lock(path, wait=True)
    assert descriptor is not None  # since it waits
    try:
        yield
    finally:
        os.close(descriptor)
