"""The safetensors format, which NumPy alone reads and writes.

Eight bytes (little-endian) give the length of a JSON header: name -> dtype, shape, and where in
the rest of the file the array's bytes begin and end.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from save_jax.errors import UserError
from save_jax.weights.files.tensor import Tensor, Tensors

PREFIX = 8  # bytes of the header's length
LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype("int64"),
    "I32": np.dtype("int32"),
    "I16": np.dtype("int16"),
    "I8": np.dtype("int8"),
    "U8": np.dtype("uint8"),
    "BOOL": np.dtype("bool"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def looks_like(head: bytes) -> bool:
    """Whether a file that begins with these (at least nine) bytes is meant as this format."""
    return int.from_bytes(head[:PREFIX], "little") <= LONGEST_HEADER and head[PREFIX:][:1] == b"{"


def read(path: pathlib.Path) -> Tensors:
    """The tensors of a file, mapped into memory.

    Raises:
        UserError: the file is cut short or its header is damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(PREFIX), "little")
        header = file.read(length)
    start = PREFIX + length
    try:
        entries: dict[str, dict[str, Any]] = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {name: _tensor(path, start, entry) for name, entry in entries.items()}
        end = start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if start > size:
            raise UserError(
                f"{path} is cut short: its header alone should have {length} bytes, and the file "
                f"has {size}; download or copy it again"
            ) from error
        raise UserError(
            f"{path} looks like safetensors and its header is damaged ({error}); download or copy "
            "it again"
        ) from error
    if end > size:
        raise UserError(
            f"{path} is cut short: it should have {end} bytes and has {size}; download or copy it "
            "again"
        )
    return tensors


def metadata(path: pathlib.Path) -> dict[str, str]:
    """What a file says of itself; nothing where it is damaged, which `read` reports."""
    with path.open("rb") as file:
        head = file.read(PREFIX + 1)
        if not looks_like(head):
            return {}
        header = head[PREFIX:] + file.read(int.from_bytes(head[:PREFIX], "little") - 1)
    try:
        found = json.loads(header).get("__metadata__")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _tensor(path: pathlib.Path, start: int, entry: Mapping[str, Any]) -> Tensor:
    dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
    begin, end = entry["data_offsets"]
    if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array of shape {shape} cannot have {end - begin} bytes")

    def array() -> np.ndarray:
        # Bytes, for arrays need not be aligned; a new map each time, for it to be released.
        if not math.prod(shape):
            return np.zeros(shape, dtype)
        data = np.memmap(path, np.uint8, "r", offset=start + begin, shape=(end - begin,))
        return np.frombuffer(data, dtype).reshape(shape)

    return Tensor(shape, dtype, array)


def write(
    path: pathlib.Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, str] = {}
) -> None:
    """Writes arrays, sorted by name; the caller sees to it that the file appears at once.

    Args:
        path: the file.
        arrays: of the dtypes above.
        facts: what the file shall say of itself (`metadata`).
    """
    # "format" is what other readers ask for.
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **facts}}
    end = 0
    for name in sorted(arrays):
        array = arrays[name]
        begin, end = end, end + array.nbytes
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % PREFIX)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(PREFIX, "little") + encoded)
        for name in sorted(arrays):
            file.write(np.ascontiguousarray(arrays[name]).tobytes())
