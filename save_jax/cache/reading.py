"""Reading a cache: opened after a check that it is the run's, then row by row, each verified."""

import os
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from save_jax import files
from save_jax.batch import Batch
from save_jax.cache import shards
from save_jax.cache.plan import ARRAYS, ONLY_TRAINING, Split, differences, plans
from save_jax.cache.read_ahead import ReadAhead
from save_jax.errors import UserError
from save_jax.models.save import FEATURES, SAVEConfig
from save_jax.parameters import Parameters

_AHEAD = 2  # batches that wait for the step, of 243 MB each at 128 clips and full size


class _Row(NamedTuple):
    """A row that is read: where it is, and what it must be."""

    piece: shards.Piece
    sum: int


class Cache:
    """The arrays of one split that a run uses, on a disk or in a bucket.

    Attributes:
        parts: what need not be computed, of PARTS.
    """

    def __init__(self, directory: files.Path, entries: Mapping[str, Mapping[str, Any]]):
        """Takes the arrays as they are described, without a look at them.

        Args:
            directory: DIR/SPLIT.
            entries: what meta.json says of them.
        """
        self._entries = entries
        self._layouts = {
            name: shards.Layout.of(directory, name, entry) for name, entry in entries.items()
        }
        self._sums: dict[tuple[str, int], np.ndarray] = {}
        self._threads = shards.threads()
        self._running: weakref.WeakSet[ReadAhead] = weakref.WeakSet()
        self.parts = frozenset(ARRAYS[name] for name in entries)

    def read(self, rows: np.ndarray, pairs: np.ndarray | None) -> dict[str, np.ndarray]:
        """Reads fields of a batch.

        Args:
            rows: the clips, as rows of the split.
            pairs: their captions, as rows of the table of captions; None in evaluation.

        Raises:
            UserError: a shard is damaged.
            OutageError: the store fails.
            OSError: the disk fails.
        """
        captions = rows if pairs is None else pairs
        wanted = {
            name: captions if ARRAYS[name] == "captions" else rows
            for name in self._layouts
            if pairs is not None or ARRAYS[name] not in ONLY_TRAINING
        }
        self._read_sums(wanted)
        found, pieces = {}, []
        for name, its_rows in wanted.items():
            layout = self._layouts[name]
            found[name] = np.empty((len(its_rows), *layout.shape[1:]), layout.dtype)
            content = found[name].view(np.uint8).reshape(len(its_rows), -1)
            pieces += [self._row(layout, *at) for at in zip(its_rows, content, strict=True)]
        shards.read([row.piece for row in pieces], self._threads)
        shards.each_in(self._threads, _verify, pieces)
        return found

    def _row(self, layout: shards.Layout, row: np.integer, into: np.ndarray) -> _Row:
        shard, place = divmod(int(row), layout.each)
        piece = shards.Piece(layout.path(shard), layout.row_start(place), into)
        return _Row(piece, int(self._sums[layout.name, shard][place]))

    def _read_sums(self, wanted: Mapping[str, np.ndarray]) -> None:
        """Reads the checksums of all shards that have a wanted row, if they are not known."""
        new = [
            (self._layouts[name], int(shard))
            for name, rows in wanted.items()
            for shard in np.unique(rows // self._layouts[name].each)
            if (name, int(shard)) not in self._sums
        ]
        for (layout, shard), sums in zip(new, shards.read_sums(new, self._threads), strict=True):
            if shards.sum_of_sums(sums) != self._entries[layout.name]["checksums"][shard]:
                raise UserError(
                    f"{layout.path(shard)} is damaged: its checksums are not those that meta.json "
                    f"knows. {shards.MAKE_AGAIN}"
                )
            self._sums[layout.name, shard] = sums

    def lay_over(
        self, batches: Iterator[Batch], facts: Mapping[str, tuple[str, np.ndarray]]
    ) -> Iterator[Batch]:
        """Returns the batches with what the cache holds of their clips, which a thread reads ahead.

        Args:
            batches: this process's, without what the cache holds.
            facts: by the field of a batch that takes its clips' rows of it: the cached array that
                it comes with, and an array [clips].
        """
        ahead = ReadAhead(self._lay_over(batches, facts), _AHEAD)
        self._running.add(ahead)
        return ahead

    def _lay_over(
        self, batches: Iterator[Batch], facts: Mapping[str, tuple[str, np.ndarray]]
    ) -> Iterator[Batch]:
        for batch in batches:
            rows = np.maximum(batch.index, 0)  # -1 only fills up
            fields: dict[str, np.ndarray | None] = dict(self.read(rows, batch.caption_index))
            if "caption_embeddings" in fields:
                fields["caption_ids"] = None
            fields |= {name: fact[rows] for name, (array, fact) in facts.items() if array in fields}
            yield batch._replace(**fields)

    def close(self) -> None:
        """Ends all that still reads ahead."""
        for ahead in list(self._running):
            ahead.close()
        self._threads.shutdown(wait=False)


def _verify(row: _Row) -> None:
    if zlib.crc32(row.piece.into.data) != row.sum:
        raise UserError(
            f"{row.piece.path} is damaged: the row at byte {row.piece.start} is not what was "
            f"written. {shards.MAKE_AGAIN}"
        )


def open_split(
    directory: str | os.PathLike,
    split: Split,
    model: SAVEConfig,
    params: Parameters,
    parts: Sequence[str],
    mesh: jax.sharding.Mesh,
) -> Cache:
    """Opens the cache of a split, after a check that it is of what it should be.

    Args:
        directory: the cache, DIR.
        split: which; `has_split` says whether it is there.
        model, params: the run's.
        parts: those that may come from a cache (`frozen_parts`); of them, the ones that are there
            will.
        mesh: devices.

    Raises:
        UserError: nothing there can be used, or an array that can be was made of something else,
            is not complete, or is damaged.
        OutageError: the store fails.
    """
    where = files.path(directory) / split.name
    found = (shards.read_meta(where) or {"arrays": {}})["arrays"]
    there = {ARRAYS[name] for name in found}
    expected = plans(split, model, params, [part for part in parts if part in there], mesh)
    usable = {name: found[name] for name in expected if name in found}
    if not any(name in FEATURES for name in usable):
        raise UserError(
            f"{where} holds {', '.join(sorted(there)) or 'nothing'}; of this config's parts, the "
            f"frozen ones are {', '.join(parts)}: there is nothing to be used "
            "(config.optimizer.clip=0 and config.optimizer.ast=0 freeze CLIP and AST)"
        )
    lines = [x for name in usable for x in differences(name, usable[name], expected[name])]
    if lines:
        raise UserError(
            f"{where} does not belong to this run (there: the cache; here: this run):\n"
            + "\n".join(lines)
            + "\nMake a cache for this run in another directory (python -m save_jax.cache "
            "--out=DIR with this run's config), or leave config.cache.dir empty."
        )
    _check_complete(where, usable)
    return Cache(where, usable)


def _check_complete(where: files.Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises UserError for an array that is not complete, or a shard that is not as it was."""
    sizes = files.sizes(where)
    for name, entry in entries.items():
        layout = shards.Layout.of(where, name, entry)
        missing = layout.missing(sizes)
        if entry["checksums"] is None:
            raise UserError(
                f"{where}: {name} is not complete, it has {layout.count - len(missing)} of "
                f"{layout.count} shards. Run the python -m save_jax.cache command that wrote it "
                "again: it resumes."
            )
        if missing:
            found = sizes.get(layout.file(missing[0]))
            raise UserError(
                f"{layout.path(missing[0])}: expected {layout.size(missing[0])} bytes, found "
                f"{'no file' if found is None else found}"
                + (f" (and {len(missing) - 1} more like it). " if len(missing) > 1 else ". ")
                + shards.MAKE_AGAIN
            )


def has_split(directory: str | os.PathLike, split: str) -> bool:
    """Says whether there is a cache of a split, complete or not."""
    path = files.path(directory) / split / "meta.json"
    try:
        return path.exists()
    except Exception as error:  # each kind of store has its own
        raise files.unreachable(path, error) from error
