"""State dictionaries as `torch.save` writes them: read without running code, and written."""

import contextlib
import pathlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from save_jax.errors import UserError
from save_jax.weights.files.tensor import Tensor, Tensors

WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which trainers keep the state


def _torch(path: pathlib.Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} is a PyTorch file, and PyTorch is not installed: pip install -e '.[weights]' "
            "in the project's folder (safetensors and checkpoints of save_jax do not need it)"
        ) from error
    return torch


def read(path: pathlib.Path) -> Tensors:
    """Reads the tensors of a pickled state dictionary, memory-mapped where the format allows.

    Raises:
        UserError: PyTorch is absent; the file is damaged, or holds other things than tensors.
    """
    torch = _torch(path)
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _check_sums(path)
    try:
        with contextlib.ExitStack() as stack:
            file, mapped = path, zipped
            if path.suffix == ".safetensors":  # a name by which PyTorch would take it for one
                file, mapped = stack.enter_context(path.open("rb")), False
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(
                f"{path} is refused: besides tensors it asks for {asked[1]}, and reading that "
                "could run any code. Save the model's state_dict() and give that file"
            ) from error
        raise _damaged(path, error) from error
    except Exception as error:  # whatever damaged bytes can lead to
        raise _damaged(path, error) from error
    tensors = _tensors(content)
    for key in WRAPPERS:
        if not tensors and isinstance(content, Mapping) and key in content:
            tensors = _tensors(content[key])
    if not tensors:
        raise UserError(
            f"{path} holds no tensors by name but a {type(content).__name__}: expected the "
            "state_dict() of a model"
        )
    return tensors


def write(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a state dictionary; the caller sees to it that the file appears at once."""
    torch = _torch(path)

    def tensor(array: np.ndarray) -> Any:
        if array.dtype == jnp.bfloat16:  # which PyTorch does not take from NumPy
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    torch.save({name: tensor(array) for name, array in arrays.items()}, path)


def _damaged(path: pathlib.Path, error: Exception) -> UserError:
    first = str(error).strip().split("\n")[0] or type(error).__name__
    return UserError(
        f"{path} cannot be read as a PyTorch checkpoint; it is damaged or cut short: {first[:200]}"
    )


def _check_sums(path: pathlib.Path) -> None:
    """Raises UserError where a record's checksum says that its bytes have changed."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # whatever damaged bytes can lead to
        raise _damaged(path, error) from error
    if bad:
        raise UserError(f"{path} is damaged: the checksum of {bad} is wrong; download it again")


def _tensors(content: Any) -> Tensors:
    if not isinstance(content, Mapping):
        return {}
    return {
        name: _tensor(value)
        for name, value in content.items()
        if isinstance(name, str) and hasattr(value, "untyped_storage")
    }


def _tensor(tensor: Any) -> Tensor:
    dtype = np.dtype(getattr(jnp, str(tensor.dtype).removeprefix("torch."), np.float32))

    def read() -> np.ndarray:
        if dtype == jnp.bfloat16:  # PyTorch does not give NumPy these
            import torch

            return tensor.detach().contiguous().view(torch.int16).numpy().view(dtype)
        return tensor.detach().numpy()

    return Tensor(tuple(tensor.shape), dtype, read)
