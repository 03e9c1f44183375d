"""Measures how fast a cache of encoders' outputs is written and read, whatever makes or uses them.

Random rows of the size of AST's states go to a folder and come back in random order, in batches:
as shards with checksums, which is how a cache is stored, and as one NumPy file that is mapped into
memory. "cold" is from the disk, "warm" from the system's memory. The two ways take turns.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from typing import Any, Protocol

import numpy as np

from save_jax.cache import reading, shards, writing
from save_jax.errors import UserError
from save_jax.models.ast import ASTConfig

NAME = "ast_states"
COLUMNS = {
    "gigabytes_per_second": "GB/s",
    "processor_seconds_per_gigabyte": "processor seconds per GB",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    for flag, default, meaning in (
        ("--rows", 256, "rows to write, of 1.9 MB each"),
        ("--batch", 32, "rows of a batch"),
        ("--turns", 3, "turns of each way"),
    ):
        parser.add_argument(
            flag, type=int, default=default, metavar="N", help=f"{meaning} (default: %(default)s)"
        )
    parser.add_argument(
        "--out", default=None, metavar="DIR", help="a folder on the disk (default: a temporary one)"
    )


class _Way(Protocol):
    def write(self, directory: pathlib.Path, values: np.ndarray, batch: int) -> None: ...

    def open(self, directory: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]: ...


class Shards:
    """A cache as it is."""

    def write(self, directory: pathlib.Path, values: np.ndarray, batch: int) -> None:
        """Writes all rows, in order."""
        layout = self._layout(directory, values)
        with writing.ShardWriter({NAME: layout}, {NAME: range(layout.count)}) as writer:
            for start in range(0, len(values), batch):
                rows = np.arange(start, min(start + batch, len(values)))
                writer.put(NAME, rows, values[rows])
        with shards.threads() as threads:
            sums = shards.read_sums([(layout, n) for n in range(layout.count)], threads)
        entry = {
            "shape": list(layout.shape),
            "dtype": layout.dtype.name,
            "rows_per_shard": layout.each,
            "checksums": [shards.sum_of_sums(found) for found in sums],
        }
        shards.save_meta(directory, {NAME: entry})

    def open(self, directory: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
        """Returns (rows) -> their values."""
        meta = shards.read_meta(directory)
        assert meta is not None, directory
        cache = reading.Cache(directory, meta["arrays"])
        return lambda rows: cache.read(rows, None)[NAME]

    def _layout(self, directory: pathlib.Path, values: np.ndarray) -> shards.Layout:
        return shards.Layout(directory, NAME, values.shape, values.dtype, shards.CLIPS)


class MemoryMap:
    """One file without checksums, mapped into memory: nothing less can be done."""

    def write(self, directory: pathlib.Path, values: np.ndarray, batch: int) -> None:
        """Writes all rows, in order."""
        directory.mkdir()
        path = directory / f"{NAME}.npy"
        array = np.lib.format.open_memmap(path, "w+", values.dtype, values.shape)
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        for start in range(0, len(values), batch):
            some = values[start : start + batch]
            assert np.isfinite(some).all()
            array[start : start + batch] = some
        array.flush()

    def open(self, directory: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
        """Returns (rows) -> their values."""
        array = np.load(directory / f"{NAME}.npy", mmap_mode="r")
        threads = concurrent.futures.ThreadPoolExecutor(shards.READERS)

        def read(rows: np.ndarray) -> np.ndarray:
            out = np.empty((len(rows), *array.shape[1:]), array.dtype)

            def copy(place: int) -> None:
                out[place] = array[rows[place]]

            list(threads.map(copy, range(len(rows))))
            return out

        return read


WAYS: dict[str, _Way] = {"shards": Shards(), "memory_map": MemoryMap()}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures everything, prints a table and a line of JSON; returns what the JSON says.

    Raises:
        UserError: a flag is out of range.
    """
    for name in ("rows", "batch", "turns"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}={getattr(options, name)}: expected --{name} of at least 1")
    size, rng = ASTConfig(), np.random.default_rng(0)
    shape = (options.rows, size.patches + 1, size.width)
    values = rng.standard_normal(shape, np.float32).astype(np.float16)
    speeds: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in WAYS}
    for turn in range(options.turns):
        with tempfile.TemporaryDirectory(prefix="save_jax-benchmark-", dir=options.out) as folder:
            order = np.random.default_rng(turn).permutation(options.rows)
            for name, way in WAYS.items():
                for what, speed in measure(
                    way, pathlib.Path(folder) / name, values, order, options.batch
                ).items():
                    speeds[name].setdefault(what, []).append(speed)
    result: dict[str, Any] = {"bytes": values.nbytes, "rows": options.rows, "batch": options.batch}
    for which, (key, title) in enumerate(COLUMNS.items()):
        result[key] = {
            name: {what: statistics.median(x[which] for x in found) for what, found in its.items()}
            for name, its in speeds.items()
        }
        print(f"{title:<26}" + "".join(f"{what:>12}" for what in speeds["shards"]))
        for name, its in result[key].items():
            print(f"{name:<26}" + "".join(f"{value:>12.2f}" for value in its.values()))
    print(json.dumps(result))
    return result


def measure(
    way: _Way, directory: pathlib.Path, values: np.ndarray, order: np.ndarray, batch: int
) -> dict[str, tuple[float, float]]:
    """Writes, and reads all rows in an order; returns GB/s and processor seconds per GB of each."""
    found = {}

    @contextlib.contextmanager
    def timed(what: str) -> Generator[None, None, None]:
        started, busy = time.monotonic(), time.process_time()
        yield
        gigabytes = values.nbytes / 1e9
        found[what] = (
            gigabytes / (time.monotonic() - started),
            (time.process_time() - busy) / gigabytes,
        )

    with timed("write"):
        way.write(directory, values, batch)
    for path in directory.rglob("*.npy"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for what in ("read_cold", "read_warm"):
        read = way.open(directory)
        with timed(what):
            for start in range(0, len(order), batch):
                rows = order[start : start + batch]
                got = read(rows)
                assert got[0].tobytes() == values[rows[0]].tobytes()
    return found
