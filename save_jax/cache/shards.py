"""How a cache is stored: the rows of an array in shards of a fixed number of rows, with checksums.

A shard is a NumPy file (.npy) of its rows, followed by a CRC-32 of each row. It appears as a whole
or not at all, whichever process writes it, so that a shard of the right size is a complete one.
meta.json has a CRC-32 of each shard's checksums: what is read is what was written, row by row.
"""

import concurrent.futures
import dataclasses
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from save_jax import files
from save_jax.errors import NO_SPACE, UserError, is_outage

FORMAT = 2  # raised when files of the same names come to mean something else
# Rows of a shard. Of clips, as few as give each host of a large pod something to write (157 shards
# of MSR-VTT's training split), in files of 120 MB; captions are a thousandth of that each.
CLIPS, CAPTIONS = 64, 4096
MAKE_AGAIN = (
    "Remove it, and run the python -m save_jax.cache command that wrote the cache again: it makes "
    "what is missing."
)
READERS = 8  # threads
_HEADER = 128  # bytes of a NumPy file before its rows
_SUM = np.dtype("<u4")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the rows of an array are.

    Attributes:
        directory: DIR/SPLIT.
        name: of the array.
        shape: of all of it.
        dtype: of its values.
        each: rows of a shard; the last may have fewer.
    """

    directory: files.Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    each: int

    @classmethod
    def of(cls, directory: files.Path, name: str, entry: Mapping[str, Any]) -> "Layout":
        """Reads the layout of an array from its entry in meta.json."""
        shape, dtype = tuple(entry["shape"]), jnp.dtype(entry["dtype"])
        return cls(directory, name, shape, dtype, entry["rows_per_shard"])

    @property
    def count(self) -> int:
        """The number of shards."""
        return -(-self.shape[0] // self.each)

    @property
    def row_bytes(self) -> int:
        """The bytes of a row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def rows(self, shard: int) -> range:
        """Returns which rows of the array a shard has."""
        return range(shard * self.each, min((shard + 1) * self.each, self.shape[0]))

    def file(self, shard: int) -> str:
        """Returns a shard's name, from DIR/SPLIT."""
        return f"{self.name}/{shard:05d}-of-{self.count:05d}.npy"

    def path(self, shard: int) -> files.Path:
        """Returns where a shard is."""
        return self.directory / self.file(shard)

    def row_start(self, place: int) -> int:
        """Returns the bytes of a shard before its row number `place`."""
        return _HEADER + place * self.row_bytes

    def sums_start(self, shard: int) -> int:
        """Returns the bytes of a shard before its checksums."""
        return self.row_start(len(self.rows(shard)))

    def size(self, shard: int) -> int:
        """Returns the bytes of a shard."""
        return self.sums_start(shard) + len(self.rows(shard)) * _SUM.itemsize

    def missing(self, sizes: Mapping[str, int]) -> list[int]:
        """Returns the shards that are not there, or not of their size.

        Args:
            sizes: of the files in DIR/SPLIT, as `files.sizes` has them.
        """
        return [n for n in range(self.count) if sizes.get(self.file(n)) != self.size(n)]


class Shard:
    """A shard that is being filled, in memory.

    Attributes:
        left: rows that it lacks.
    """

    def __init__(self, layout: Layout, number: int):
        self._layout, self._number = layout, number
        self.left = len(layout.rows(number))
        self._content = np.empty(layout.size(number), np.uint8)
        start, end = _HEADER, layout.sums_start(number)
        shape = (self.left, *layout.shape[1:])
        self._content[:start] = np.frombuffer(_header(shape, layout.dtype), np.uint8)
        self._rows = self._content[start:end].view(layout.dtype).reshape(shape)

    def fill(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Takes rows of the array, each once, which this shard has."""
        self._rows[rows - self._layout.rows(self._number).start] = values
        self.left -= len(rows)

    def write(self) -> None:
        """Writes the shard, which must be full.

        Raises:
            UserError: there is no room on the disk, or the store refuses.
            OutageError: the store fails.
            OSError: the disk fails.
        """
        assert self.left == 0, (self._layout.name, self._number, self.left)
        path, sums = self._layout.path(self._number), self._layout.sums_start(self._number)
        self._content[sums:].view(_SUM)[:] = [
            zlib.crc32(row.data) for row in self._rows.view(np.uint8).reshape(len(self._rows), -1)
        ]
        try:
            if not files.is_remote(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            files.write(path, self._content.data)
        except Exception as error:  # each kind of store has its own
            if files.is_remote(path):
                raise files.unreachable(path, error) from error
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                raise UserError(
                    f"{path}: no room for {bytes_in_words(len(self._content))} "
                    f"({error.strerror}). Make room there, and run the same command again: it "
                    "resumes."
                ) from error
            raise


def _header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Returns the start of a NumPy file, version 1.0, of the same length whatever NumPy's version.

    bfloat16, which NumPy's files lack, is stored as uint16.
    """
    stored = np.dtype(np.uint16) if dtype == jnp.bfloat16 else dtype
    described = {"descr": stored.str, "fortran_order": False, "shape": shape}
    text = f"{described!r:<{_HEADER - 11}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def bytes_in_words(count: int) -> str:
    """Formats a number of bytes: 19.0 GB, 1.5 MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


#### meta.json.


def read_meta(directory: files.Path) -> dict[str, Any] | None:
    """Reads meta.json of a split's cache; None where there is none.

    Raises:
        UserError: it is damaged, of another version of this format, or the store refuses.
        OutageError: the store fails.
    """
    path = directory / "meta.json"
    try:
        meta = json.loads(path.read_text())
        if meta["format"] != FORMAT:
            raise UserError(
                f"{path}: expected format {FORMAT}, found {meta['format']}: it was written by "
                "another version. Remove the directory, and write the cache again."
            )
        return meta
    except FileNotFoundError:
        return None
    except UserError:
        raise
    except Exception as error:  # each kind of store has its own
        if files.is_remote(path) and not isinstance(error, ValueError | KeyError | TypeError):
            raise files.unreachable(path, error) from error
        if is_outage(error):
            raise
        raise UserError(
            f"{path} cannot be read ({error}). Remove {directory}, and write the cache again."
        ) from error


def save_meta(directory: files.Path, arrays: Mapping[str, Any]) -> None:
    """Writes meta.json of a split's cache: an entry for each array."""
    if not files.is_remote(directory):
        directory.mkdir(parents=True, exist_ok=True)
    meta = json.dumps({"format": FORMAT, "arrays": arrays}, indent=1)
    try:
        files.write(directory / "meta.json", meta)
    except Exception as error:
        if not files.is_remote(directory):
            raise
        raise files.unreachable(directory, error) from error


#### Reading parts of shards.


class Piece(NamedTuple):
    """Bytes of a file that are wanted, and where they go.

    Attributes:
        path: the file.
        start: the first of them.
        into: uint8 [as many].
    """

    path: files.Path
    start: int
    into: np.ndarray


def read(pieces: Sequence[Piece], threads: concurrent.futures.Executor) -> None:
    """Reads pieces of files, on a disk in several threads, in a bucket in as many requests.

    Raises:
        UserError: a file is absent or too short, or the store refuses.
        OutageError: the store fails.
        OSError: the disk fails.
    """
    if pieces and files.is_remote(pieces[0].path):
        ranges = [(piece.path, piece.start, len(piece.into)) for piece in pieces]
        for piece, content in zip(pieces, files.read_ranges(ranges), strict=True):
            if isinstance(content, Exception):
                raise _damaged(piece, "no file") from content
            if len(content) != len(piece.into):
                raise _damaged(piece, f"{len(content)} bytes")
            piece.into[:] = np.frombuffer(content, np.uint8)
        return
    each_in(threads, _read_from_disk, pieces)


def threads() -> concurrent.futures.ThreadPoolExecutor:
    """Returns threads to read in, which start when they are needed."""
    return concurrent.futures.ThreadPoolExecutor(READERS, "cache")


def each_in(
    threads: concurrent.futures.Executor,
    do: Callable[[Any], None],
    items: Sequence[Any],
) -> None:
    """Does something with each item, in READERS tasks: many are too small for one of their own."""

    def do_all(part: Iterable[Any]) -> None:
        for item in part:
            do(item)

    list(threads.map(do_all, [items[n::READERS] for n in range(min(READERS, len(items)))]))


def _read_from_disk(piece: Piece) -> None:
    """Reads one piece: not from mapped memory, where a truncated file would end the process."""
    wanted, found = piece.into.data, 0
    try:
        with open(piece.path, "rb", buffering=0) as file:
            while count := os.preadv(file.fileno(), [wanted[found:]], piece.start + found):
                found += count
    except OSError as error:
        if is_outage(error):
            raise
        raise _damaged(piece, error.strerror) from error
    if found != len(wanted):
        raise _damaged(piece, f"{found} bytes")


def _damaged(piece: Piece, found: object) -> UserError:
    return UserError(
        f"{piece.path}: expected {len(piece.into)} bytes at byte {piece.start}, found {found}. "
        f"{MAKE_AGAIN}"
    )


def read_sums(
    wanted: Sequence[tuple[Layout, int]], threads: concurrent.futures.Executor
) -> list[np.ndarray]:
    """Reads the checksums of shards: of each, uint32 [rows].

    Args:
        wanted: pairs of an array's layout and a shard's number.
        threads: to read in.

    Raises:
        UserError, OutageError, OSError: as `read`.
    """
    found = [np.empty(len(layout.rows(shard)), _SUM) for layout, shard in wanted]
    pieces = [
        Piece(layout.path(shard), layout.sums_start(shard), sums.view(np.uint8))
        for (layout, shard), sums in zip(wanted, found, strict=True)
    ]
    read(pieces, threads)
    return found


def sum_of_sums(sums: np.ndarray) -> int:
    """Returns the CRC-32 of a shard's checksums, by which meta.json knows it."""
    return zlib.crc32(sums.tobytes())
