"""Writing a cache: resumable, in order, with the space reserved before the work begins."""

import dataclasses
import errno
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from save_jax import cache, sharding
from save_jax.batch import Batch
from save_jax.cache import ARRAYS, Plan, Split
from save_jax.errors import UserError
from save_jax.models import save
from save_jax.models.save import FEATURES, SAVEConfig
from save_jax.parameters import Parameters, Structure
from save_jax.progress import Progress, say

SAVED_EVERY = 5.0  # seconds between notes of how far the arrays are


class _Files:
    """Fills the arrays of one split, row by row, from where an earlier run stopped.

    Only the first process writes; `directory` must be one that all processes see.
    """

    def __init__(
        self, directory: pathlib.Path, wanted: Mapping[str, Plan], dtypes: Mapping[str, str]
    ):
        """Reserves the space that the arrays will take.

        Args:
            directory: DIR/SPLIT.
            wanted: the arrays.
            dtypes: how each is stored.

        Raises:
            UserError: what is there was made of something else, or the disk is too small.
        """
        self._directory = directory
        meta = cache.read_meta(directory) or {"format": cache.FORMAT, "arrays": {}}
        self._entries = meta["arrays"]
        lines, new = [], {}
        for name, plan in wanted.items():
            entry = self._entries.get(name)
            if entry is None:
                new[name] = {**dataclasses.asdict(plan), "dtype": dtypes[name], "done": 0}
                continue
            lines += cache.differences(name, entry, plan)
            if entry["dtype"] != dtypes[name]:
                lines.append(f"  {name}: stored as {entry['dtype']} there, {dtypes[name]} here")
        if lines:
            raise UserError(
                f"{directory} holds a cache of something else (there: the cache, here: this "
                "command):\n"
                + "\n".join(lines)
                + "\nChoose another --out, or remove that directory."
            )
        if jax.process_index() == 0:
            self._reserve(new)
        self._entries |= new
        self._arrays: dict[str, np.memmap] = {}
        if jax.process_index() == 0:
            cache.save_meta(directory, self._meta())
            self._arrays = {k: cache.map_file(directory, k, self._entries[k], "r+") for k in wanted}
        self._wanted, self._saved = list(wanted), time.monotonic()

    def _meta(self) -> dict[str, Any]:
        return {"format": cache.FORMAT, "arrays": self._entries}

    def _reserve(self, new: Mapping[str, Mapping[str, Any]]) -> None:
        sizes = {
            name: int(np.prod(entry["shape"])) * jnp.dtype(entry["dtype"]).itemsize
            for name, entry in new.items()
        }
        self._directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._directory).free
        if sizes:
            listed = ", ".join(f"{name} {_bytes(size)}" for name, size in sizes.items())
            say(
                f"{self._directory} will take {_bytes(sum(sizes.values()))} ({listed}); "
                f"{_bytes(free)} are free there"
            )
        if sum(sizes.values()) > free:
            raise UserError(
                f"{self._directory}: expected {_bytes(sum(sizes.values()))} of free space, found "
                f"{_bytes(free)}. Choose another --out, or fewer --parts."
            )
        for name, entry in new.items():
            self._create(name, entry)

    def _create(self, name: str, entry: Mapping[str, Any]) -> None:
        path = self._directory / f"{name}.npy"
        np.lib.format.open_memmap(
            path, "w+", cache.on_disk(jnp.dtype(entry["dtype"])), tuple(entry["shape"])
        )
        size = path.stat().st_size
        try:
            # A full disk must show here: later, a write to mapped memory would end the process.
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                return  # a file system that cannot reserve
            path.unlink()
            raise UserError(f"{path}: no room for {_bytes(size)}: {error.strerror}") from error

    def done(self, names: Sequence[str]) -> int:
        """Returns how many rows all of these arrays have; the same on every process."""
        least = min((self._entries[name]["done"] for name in names), default=0)
        return int(multihost_utils.broadcast_one_to_all(np.int32(least)))

    def unfinished(self, part: Callable[[str], bool]) -> list[str]:
        """Returns the arrays of some parts that lack rows; the same on every process."""
        names = [name for name in self._wanted if part(ARRAYS[name])]
        return [name for name in names if self.done([name]) < self._entries[name]["shape"][0]]

    def put(self, name: str, rows: np.ndarray, values: np.ndarray) -> None:
        """Writes rows of an array; until `save`, they do not count.

        Raises:
            UserError: there are values that are not finite, or too large for how they are stored.
        """
        if not np.isfinite(values).all():
            raise UserError(
                f"{self._directory}: the rows {rows.min()} to {rows.max()} of {name} have values "
                f"that are not finite as {values.dtype}. If it is for their size, "
                "--dtype=bfloat16 has room for them (in another --out)."
            )
        if self._arrays:
            self._arrays[name][rows] = values.astype(self._arrays[name].dtype)

    def save(self, names: Sequence[str], done: int, *, last: bool = False) -> None:
        """Notes that arrays have their first `done` rows, if the last note is some time ago."""
        if not self._arrays or not (last or time.monotonic() - self._saved > SAVED_EVERY):
            return
        for name in names:
            self._arrays[name].flush()
            # An array that was ahead of the others stays so.
            self._entries[name]["done"] = max(self._entries[name]["done"], done)
        cache.save_meta(self._directory, self._meta())
        self._saved = time.monotonic()


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def write(
    directory: str | os.PathLike,
    split: Split,
    batches: Callable[[int], Iterator[Batch]],
    *,
    model: SAVEConfig,
    structure: Structure,
    params: Parameters,
    parts: Sequence[str],
    dtype: str,
    mesh: jax.sharding.Mesh,
    batch_size: int,
) -> None:
    """Writes the cache of a split, or resumes an incomplete one.

    Args:
        directory: the cache, DIR.
        split: what to cache.
        batches: (first batch) -> all clips from there, in order, with the inputs of the parts.
        model, structure, params: the model.
        parts: of PARTS.
        dtype: how AST's states are stored. They are nearly all of a cache; the rest decides
            similarities more directly, and is stored as it is computed. Of the two that take half
            the room, float16 rounds eight times as finely, and bfloat16 knows larger values.
        mesh: devices.
        batch_size: clips in a batch.

    Raises:
        UserError: what is there is of something else, or the disk is too small.
    """
    wanted = cache.plans(split, model, params, parts, mesh)
    dtypes = {name: "float32" for name in wanted} | {"frame_mask": "bool"}
    dtypes |= {name: model.dtype for name in wanted if name in FEATURES}
    dtypes |= {"ast_states": dtype}
    where = pathlib.Path(directory) / split.name
    files = _Files(where, wanted, dtypes)
    everywhere = sharding.replicated(mesh)  # so that the first process has all rows

    names = files.unfinished(lambda part: part != "captions")
    first = files.done(names) // batch_size
    if names:

        def encode(params: Parameters, batch: Batch) -> dict[str, jax.Array]:
            net = save.merge(structure, params)
            given = {name: getattr(batch, name) for name in names if name not in FEATURES}
            with sharding.on_mesh(mesh):
                given |= net.features(batch, [name for name in names if name in FEATURES])
            given |= {name: given[name].astype(dtypes[name]) for name in given}
            return given | {"index": batch.index}

        jitted = jax.jit(encode, out_shardings=everywhere)
        progress = Progress(f"caching {split.name}: clips", split.clips - first * batch_size)
        done = first * batch_size
        for _, batch in sharding.prefetch(batches(first), mesh):
            rows = jax.tree.map(np.asarray, jitted(params, batch))
            index = rows.pop("index")
            real = index >= 0
            for name, values in rows.items():
                files.put(name, index[real], values[real])
            done += int(real.sum())
            files.save(names, done)
            progress.advance(int(real.sum()))
        files.save(names, done, last=True)
        progress.close()

    names = files.unfinished(lambda part: part == "captions")
    if names:
        encode_text = jax.jit(
            lambda params, ids: save.merge(structure, params).encode_text(ids),
            out_shardings=everywhere,
        )
        done, total = files.done(names), len(split.caption_ids)
        progress = Progress(f"caching {split.name}: captions", total - done)
        while done < total:
            ids = split.caption_ids[done : done + batch_size]
            values = np.asarray(encode_text(params, sharding.put_rows(ids, batch_size, mesh)))
            files.put(names[0], np.arange(done, done + len(ids)), values[: len(ids)])
            done += len(ids)
            files.save(names, done)
            progress.advance(len(ids))
        files.save(names, done, last=True)
        progress.close()
    say(f"{where}: complete ({', '.join(wanted)})")
