"""Reads the teacher's vectors: ImageBind embeddings, one per file (spec sections 1 and 8)."""

import io
import os
import pickle

import numpy as np

from data_pipelines import outages
from data_pipelines.modalities import video
from save_jax.errors import UserError


class VectorError(ValueError):
    """A file that does not hold a usable vector; the message is one line, without the path."""


class AbsentError(VectorError):
    """A file that does not exist."""


def read_vector(path: str | os.PathLike, size: int) -> np.ndarray:
    """Reads one vector from a .npy or a PyTorch .pt file.

    Args:
        path: the file, here or remote; anything that does not end in .npy is read as PyTorch's.
        size: the expected length (1024 for ImageBind-huge).

    Returns:
        float32 [size], finite, not all zero.

    Raises:
        VectorError: the file is absent (AbsentError) or unreadable, or holds something else.
        UserError: it is a PyTorch file and PyTorch is not installed, or a package that its store
            needs is not.
        OutageError: the machine or the store cannot read it now.
    """
    path = os.fspath(path)
    try:
        # Read all of it first: an error of reading is not an error of the bytes.
        content = video.read_binary(path)
    except FileNotFoundError:
        raise AbsentError("the file does not exist") from None
    except OSError as error:
        raise VectorError(f"it cannot be read ({_reason(error)})") from error
    vector = _read_numpy(content) if path.endswith(".npy") else _read_torch(content, path)
    # ImageBind returns [batch, size]: a vector saved with its batch of one is still that vector.
    if vector.shape not in ((size,), (1, size)):
        raise VectorError(f"expected a vector of {size} numbers, found shape {list(vector.shape)}")
    if vector.dtype.kind not in "fiu":
        raise VectorError(f"expected real numbers, found {vector.dtype}")
    with np.errstate(over="ignore"):
        vector = vector.reshape(size).astype(np.float32)
    if not np.isfinite(vector).all():
        raise VectorError(f"{int((~np.isfinite(vector)).sum())} of its numbers are not finite")
    if not vector.any():
        raise VectorError("all its numbers are zero, which has no direction to compare")
    return vector


def _read_numpy(content: bytes) -> np.ndarray:
    try:
        loaded = np.load(io.BytesIO(content), allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise _damaged("NumPy array", error) from error
    if not isinstance(loaded, np.ndarray):
        raise VectorError("expected one NumPy array, found an archive of them")
    return loaded


def _read_torch(content: bytes, path: str) -> np.ndarray:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} is a PyTorch file, and PyTorch is not installed: pip install -e '.[weights]' "
            "in a clone of save_jax, or convert the vectors to .npy files with the same names."
        ) from error
    try:
        # weights_only: a pickle may run code, and these files come from elsewhere.
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        MemoryError,
        pickle.UnpicklingError,
    ) as error:
        raise _damaged("PyTorch tensor", error) from error
    if not isinstance(loaded, torch.Tensor):
        raise VectorError(f"expected one tensor, found a {type(loaded).__name__}")
    if loaded.is_floating_point():
        loaded = loaded.float()  # NumPy has no bfloat16
    return loaded.detach().numpy()


def _damaged(kind: str, error: Exception) -> Exception:
    """Returns the error for a file whose bytes cannot be decoded."""
    # Damaged bytes may ask for any amount of memory, even when it is not short.
    if isinstance(error, MemoryError) and outages.memory_is_short():
        return error
    return VectorError(f"not a {kind} ({_reason(error)})")


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
