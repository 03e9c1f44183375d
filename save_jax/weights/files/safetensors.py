"""The safetensors format, by the library of that name, which needs no PyTorch."""

import pathlib
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from save_jax.errors import UserError
from save_jax.weights.files.tensor import Tensor, Tensors

# What NumPy reads. The format also has floats of 4 to 8 bits.
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
_PREFIX = 8  # bytes of the header's length, little-endian, before the header, which is JSON
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


def looks_like(head: bytes) -> bool:
    """Says whether a file that begins with these (at least nine) bytes is in this format."""
    length = int.from_bytes(head[:_PREFIX], "little")
    return length <= _LONGEST_HEADER and head[_PREFIX:][:1] == b"{"


def read(path: pathlib.Path) -> Tensors:
    """Returns the tensors of a file, each read when asked for.

    Raises:
        UserError: the file is cut short, its header is damaged, or it has a dtype not in `DTYPES`.
    """
    try:
        # Not mapped into memory: what was once read of a map counts as this process's memory.
        file = safe_open(path, framework="np", backend="pread")
    except SafetensorError as error:
        raise UserError(
            f"{path} looks like safetensors and is cut short, or its header is damaged ({error}): "
            f"it has {path.stat().st_size:,} bytes; download or copy it again"
        ) from error
    return {name: _tensor(path, file, name) for name in sorted(file.keys())}


def metadata(path: pathlib.Path) -> dict[str, str]:
    """Returns what a file says of itself; nothing where it is damaged, which `read` reports."""
    try:
        with safe_open(path, framework="np") as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}


def _tensor(path: pathlib.Path, file: safe_open, name: str) -> Tensor:
    described = file.get_slice(name)
    if described.get_dtype() not in DTYPES:
        raise UserError(
            f"{path} holds {name} as {described.get_dtype()}: expected one of {', '.join(DTYPES)}; "
            "convert it to one of them"
        )
    dtype, shape = DTYPES[described.get_dtype()], tuple(described.get_shape())
    return Tensor(shape, dtype, lambda: file.get_tensor(name))


def write(
    path: pathlib.Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, str] = {}
) -> None:
    """Writes arrays; the caller sees to it that the file appears at once.

    Args:
        path: the file.
        arrays: of the dtypes above.
        facts: what the file shall say of itself (`metadata`).

    Raises:
        OSError: the disk is full, or the like.
    """
    path.touch()
    mode = path.stat().st_mode
    # The library writes an array's memory as it lies, whatever its strides.
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    try:
        # "format" is what other readers ask for.
        safetensors.numpy.save_file(contiguous, path, {"format": "pt", **facts})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(mode)  # The library's file, which replaces ours, is for its owner alone.
