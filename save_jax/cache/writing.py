"""Writing a cache: each process its own shards, in any order, resumed where one is missing."""

import collections
import concurrent.futures
import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from save_jax import files, sharding
from save_jax.batch import Batch
from save_jax.cache import shards
from save_jax.cache.plan import ARRAYS, Plan, Split, differences, plans
from save_jax.errors import UserError
from save_jax.models import save
from save_jax.models.save import FEATURES, SAVEConfig
from save_jax.parameters import Parameters, Structure
from save_jax.progress import Progress, say

_WRITERS = 4  # threads; as many full shards are in memory, of 120 MB each at full size
_SEEN_WITHIN = 60.0  # seconds until a network file system shows what another host has written
EMPTY = Batch(*[None] * len(Batch._fields))


class ShardWriter:
    """Gathers rows of one split's arrays into shards, each written in a thread once it is full.

    It is a context manager, at whose end all that was full is written; after an exception, what had
    not begun to be written is not. It is of no concern what other processes write.
    """

    def __init__(self, layouts: Mapping[str, shards.Layout], missing: Mapping[str, Sequence[int]]):
        """Begins with nothing.

        Args:
            layouts: the arrays.
            missing: the numbers of their shards that are not there; rows of others are left out.
        """
        self._layouts = layouts
        self._missing = {(name, number) for name in missing for number in missing[name]}
        self._open: dict[tuple[str, int], shards.Shard] = {}
        self._writing: collections.deque[concurrent.futures.Future] = collections.deque()
        self._threads = concurrent.futures.ThreadPoolExecutor(_WRITERS, "cache-writer")

    def put(self, name: str, rows: np.ndarray, values: np.ndarray) -> None:
        """Takes rows of an array.

        Args:
            name: of the array.
            rows: int [n], each once in all calls.
            values: [n, ...].

        Raises:
            UserError: there are values that are not finite, or too large for how they are stored;
                or an earlier shard could not be written.
            OutageError: the store fails.
            OSError: the disk fails.
        """
        if not np.isfinite(values).all():
            raise UserError(
                f"{self._layouts[name].directory}: the rows {rows.min()} to {rows.max()} of {name} "
                f"have values that are not finite as {values.dtype}. If it is for their size, "
                "--dtype=bfloat16 has room for them (in another --out)."
            )
        numbers = rows // self._layouts[name].each
        for number in map(int, np.unique(numbers)):
            key = name, number
            if key not in self._missing:
                continue
            if key not in self._open:
                self._open[key] = shards.Shard(self._layouts[name], number)
            its = numbers == number
            self._open[key].fill(rows[its], values[its])
            if not self._open[key].left:
                self._write(self._open.pop(key))

    def _write(self, shard: shards.Shard) -> None:
        while len(self._writing) >= _WRITERS:
            self._writing.popleft().result()
        self._writing.append(self._threads.submit(shard.write))

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._threads.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            while self._writing:
                self._writing.popleft().result()
            assert not self._open, f"rows are missing of {sorted(self._open)}"


def schedule(ranges: Sequence[range], shares: Sequence[int]) -> list[np.ndarray]:
    """Deals the rows of shards out to processes, in turn, so that each has whole shards.

    Args:
        ranges: the rows of each shard.
        shares: how many rows each process takes at a time.

    Returns:
        For each process int32 [steps, its share], as many steps for all: the rows that it takes at
        each, in order. -1 fills up.
    """
    own = [
        np.concatenate([np.zeros(0, np.int32), *ranges[process :: len(shares)]]).astype(np.int32)
        for process in range(len(shares))
    ]
    steps = max(-(-len(rows) // share) for rows, share in zip(own, shares, strict=True))
    dealt = [np.full(steps * share, -1, np.int32) for share in shares]
    for rows, places in zip(own, dealt, strict=True):
        places[: len(rows)] = rows
    return [places.reshape(steps, share) for places, share in zip(dealt, shares, strict=True)]


class _Store:
    """What is there of one split's cache, and what is missing; the same on every process."""

    def __init__(
        self, directory: files.Path, wanted: Mapping[str, Plan], dtypes: Mapping[str, str]
    ):
        """Compares what is there with what is wanted, and notes what will be there.

        Args:
            directory: DIR/SPLIT, which all processes see.
            wanted: the arrays.
            dtypes: how each is stored.

        Raises:
            UserError: what is there was made of something else, or the disk is too small.
            OutageError: the store fails.
        """
        self._directory = directory
        self._entries = (shards.read_meta(directory) or {"arrays": {}})["arrays"]
        lines, new = [], {}
        for name, plan in wanted.items():
            here = {
                "dtype": dtypes[name],
                "rows_per_shard": shards.CAPTIONS if ARRAYS[name] == "captions" else shards.CLIPS,
            }
            entry = self._entries.get(name)
            if entry is None:
                new[name] = {**dataclasses.asdict(plan), **here, "checksums": None}
                continue
            lines += differences(name, entry, plan)
            lines += [
                f"  {name}: {words} {entry[key]} there, {here[key]} here"
                for key, words in (("dtype", "stored as"), ("rows_per_shard", "rows per shard"))
                if entry[key] != here[key]
            ]
        if lines:
            raise UserError(
                f"{directory} holds a cache of something else (there: the cache, here: this "
                "command):\n"
                + "\n".join(lines)
                + "\nChoose another --out, or remove that directory."
            )
        self._entries |= new
        self.layouts = {
            name: shards.Layout.of(directory, name, self._entries[name]) for name in wanted
        }
        self.missing = self._agree_on_missing()

    def _agree_on_missing(self) -> dict[str, list[int]]:
        """Returns the missing shards by array: those that the first process finds missing."""
        flags = {name: np.zeros(layout.count, bool) for name, layout in self.layouts.items()}
        if jax.process_index() == 0:
            sizes = files.sizes(self._directory)
            for name, layout in self.layouts.items():
                flags[name][layout.missing(sizes)] = True
            self._check_room({name: np.flatnonzero(flags[name]).tolist() for name in flags})
            shards.save_meta(self._directory, self._entries)
        flags = multihost_utils.broadcast_one_to_all(flags)
        return {name: np.flatnonzero(missing).tolist() for name, missing in flags.items()}

    def _check_room(self, missing: Mapping[str, Sequence[int]]) -> None:
        """Raises UserError where the missing shards do not fit on the disk; says what they take."""
        sizes = {
            name: sum(map(self.layouts[name].size, numbers))
            for name, numbers in missing.items()
            if numbers
        }
        if not sizes:
            return
        total = shards.bytes_in_words(sum(sizes.values()))
        listed = ", ".join(f"{name} {shards.bytes_in_words(n)}" for name, n in sizes.items())
        if files.is_remote(self._directory):
            say(f"{self._directory} will take {total} ({listed})")
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._directory).free
        room = shards.bytes_in_words(free)
        say(f"{self._directory} will take {total} ({listed}); {room} are free there")
        if sum(sizes.values()) > free:
            raise UserError(
                f"{self._directory}: expected {total} of free space, found {room}. Choose another "
                "--out, or fewer --parts."
            )

    def unfinished(self, *, captions: bool) -> tuple[list[str], list[range]]:
        """Returns the arrays of captions, or of clips, that lack shards, and these shards' rows."""
        lacking = {
            name: {numbers.start: numbers for numbers in map(self.layouts[name].rows, missing)}
            for name, missing in self.missing.items()
            if (ARRAYS[name] == "captions") == captions and missing
        }
        ranges = {start: rows for found in lacking.values() for start, rows in found.items()}
        return list(lacking), [ranges[start] for start in sorted(ranges)]

    def _absent(self) -> list[files.Path]:
        sizes = files.sizes(self._directory)
        return [x.path(n) for x in self.layouts.values() for n in x.missing(sizes)]

    def complete(self) -> None:
        """Notes that all is there, once all processes have written what they had to.

        Raises:
            UserError: a shard is not there.
        """
        multihost_utils.sync_global_devices("the shards of a cache are written")
        if jax.process_index():
            return
        until = time.monotonic() + _SEEN_WITHIN
        while absent := self._absent():
            if time.monotonic() > until:
                raise UserError(
                    f"{absent[0]}: expected the shard that a process of this job wrote, found none."
                    " --out must be a directory that all processes see, or in a bucket."
                )
            time.sleep(1)
        with shards.threads() as threads:
            for name, layout in self.layouts.items():
                wanted = [(layout, number) for number in range(layout.count)]
                sums = shards.read_sums(wanted, threads)
                self._entries[name]["checksums"] = [shards.sum_of_sums(found) for found in sums]
        shards.save_meta(self._directory, self._entries)


def write(
    directory: str | os.PathLike,
    split: Split,
    batches: Callable[[np.ndarray], Iterator[Batch]],
    *,
    model: SAVEConfig,
    structure: Structure,
    params: Parameters,
    parts: Sequence[str],
    dtype: str,
    mesh: jax.sharding.Mesh,
    batch_size: int,
) -> None:
    """Writes the cache of a split, or what an incomplete one lacks.

    Every process computes and writes shards of its own. A shard does not depend on which process
    writes it, nor on what was there before; to the last bit, where a device computes as many rows.

    Args:
        directory: the cache, DIR, on a disk that all processes see or in a bucket.
        split: what to cache.
        batches: (int32 [steps, rows], the clips of each batch, -1 to fill up) -> this process's
            batches of them, with the inputs of the parts.
        model, structure, params: the model.
        parts: of PARTS.
        dtype: how AST's states are stored. They are nearly all of a cache; the rest decides
            similarities more directly, and is stored as it is computed. Of the two that take half
            the room, float16 rounds eight times as finely, and bfloat16 knows larger values.
        mesh: devices.
        batch_size: clips in a batch.

    Raises:
        UserError: what is there is of something else, or the disk is too small.
        OutageError: the store fails.
    """
    wanted = plans(split, model, params, parts, mesh)
    dtypes = {name: "float32" for name in wanted} | {"frame_mask": "bool"}
    dtypes |= {name: model.dtype for name in wanted if name in FEATURES}
    dtypes |= {"ast_states": dtype}
    where = files.path(directory) / split.name
    store = _Store(where, wanted, dtypes)
    shares = [
        len(sharding.process_rows(mesh, batch_size, process))
        for process in range(jax.process_count())
    ]

    def caption_batches(index: np.ndarray) -> Iterator[Batch]:
        for rows in index:
            yield EMPTY._replace(caption_ids=split.caption_ids[np.maximum(rows, 0)], index=rows)

    def encode(names: Sequence[str], params: Parameters, batch: Batch) -> dict[str, jax.Array]:
        net = save.merge(structure, params)
        with sharding.on_mesh(mesh):
            made = net.features(batch, names)
        made = {name: values.astype(dtypes[name]) for name, values in made.items()}
        return made | {"index": batch.index}

    def fill(names: Sequence[str], ranges: Sequence[range], batches: Callable, noun: str) -> None:
        features = [name for name in names if name in FEATURES]
        encoded = jax.jit(
            lambda params, batch: encode(features, params, batch),
            out_shardings=sharding.batch_sharding(mesh),
        )
        progress = Progress(f"caching {split.name}: {noun}", sum(map(len, ranges)))
        dealt = schedule(ranges, shares)

        def settle(step: int, host: Batch, made: dict[str, jax.Array]) -> None:
            rows = {name: sharding.host_rows(values) for name, values in made.items()}
            index = rows.pop("index")
            # What no encoder makes is as it was read.
            rows |= {name: getattr(host, name) for name in names if name not in FEATURES}
            real = index >= 0
            for name, values in rows.items():
                writer.put(name, index[real], values[real])
            progress.advance(sum(int((index[step] >= 0).sum()) for index in dealt))

        with ShardWriter(store.layouts, store.missing) as writer:
            behind: collections.deque[tuple[int, Batch, dict[str, jax.Array]]] = collections.deque()
            mine = batches(dealt[jax.process_index()])
            for step, (host, batch) in enumerate(sharding.prefetch(mine, mesh)):
                behind.append((step, host, encoded(params, batch)))
                if len(behind) > 1:  # the devices compute the next one meanwhile
                    settle(*behind.popleft())
            while behind:
                settle(*behind.popleft())
        progress.close()

    for captions, source, noun in ((False, batches, "clips"), (True, caption_batches, "captions")):
        names, ranges = store.unfinished(captions=captions)
        if names:
            fill(names, ranges, source, noun)
    store.complete()
    say(f"{where}: complete ({', '.join(wanted)})")
