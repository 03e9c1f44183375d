"""The tensors of a TorchScript archive, without running any of the code in it.

An archive is a zip file: `ROOT/data.pkl` describes the module tree, `ROOT/data/N` holds the bytes
of storage N, and `ROOT/code/` the program, which is never looked at. The description is a pickle;
of the things a pickle may ask for, the reader below knows modules (as bare containers of their
attributes) and tensors, and refuses everything else.
"""

import functools
import hashlib
import io
import math
import pathlib
import pickle
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from save_jax.errors import UserError
from save_jax.weights.files.tensor import Shape, Tensor, Tensors

# Of the files at OpenAI's addresses, which contain them.
OFFICIAL = {
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af": "ViT-B/32",
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f": "ViT-B/16",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836": "ViT-L/14",
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02": "ViT-L/14@336px",
}
ADDRESS = "https://openaipublic.azureedge.net/clip/models/{sha256}/{name}.pt"

_STORAGES = {
    "DoubleStorage": np.dtype("float64"),
    "FloatStorage": np.dtype("float32"),
    "HalfStorage": np.dtype("float16"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("int64"),
    "IntStorage": np.dtype("int32"),
    "ShortStorage": np.dtype("int16"),
    "CharStorage": np.dtype("int8"),
    "ByteStorage": np.dtype("uint8"),
    "BoolStorage": np.dtype("bool"),
}


def official_address(variant: str) -> str | None:
    """Returns the URL at which OpenAI publishes a variant ("ViT-B/32"), or None."""
    name = variant.replace("/", "-").replace("@", "-")
    for sha256, official in OFFICIAL.items():
        if official == variant:
            return ADDRESS.format(sha256=sha256, name=name)
    return None


def check(path: pathlib.Path, *, trust: bool) -> None:
    """Accepts an archive that is one of OpenAI's, byte for byte, or that the user trusts.

    Raises:
        UserError: it is another one.
    """
    if trust:
        return
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 not in OFFICIAL:
        raise UserError(
            f"{path} is a TorchScript archive with the SHA-256 {sha256}, which is none of OpenAI's "
            f"{len(OFFICIAL)} ({', '.join(OFFICIAL.values())}): the download is damaged, or it is "
            "someone else's. Download it again, or pass --trust_archive if you know where it is "
            "from"
        )


class _Module:
    """Stands for any class of the archive: nothing but the attributes that it was saved with."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str


class _Reader(pickle.Unpickler):
    """An unpickler that can make modules, tensors, and what is built into pickles."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch.jit._pickle":  # typed lists
            return lambda value, *_: value
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise pickle.UnpicklingError(f"it refers to {pid!r}")
        return _Storage(dtype, str(key))

    def _tensor(self, storage: _Storage, offset: int, shape: Shape, strides: Shape, *_) -> Tensor:
        def read() -> np.ndarray:
            data = np.frombuffer(
                self._archive.read(f"{self._root}/data/{storage.key}"), storage.dtype
            )
            if min(offset, *shape, *strides, 0) < 0:  # PyTorch itself makes none of these
                raise ValueError(f"negative offset {offset}, size {shape} or stride {strides}")
            last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
            # A stride of 0 would make a few bytes a tensor of any size.
            if math.prod(shape) > len(data) or (math.prod(shape) and last >= len(data)):
                raise ValueError(f"storage {storage.key} is too small for its tensor")
            # Unlike as_strided, NumPy's constructor checks the bounds itself once more.
            return np.ndarray(
                shape,
                storage.dtype,
                data,
                offset * storage.dtype.itemsize,
                [step * storage.dtype.itemsize for step in strides],
            )

        return Tensor(tuple(shape), storage.dtype, read)


def _walk(module: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(module, Tensor):
        yield prefix, module
    elif isinstance(module, _Module) and isinstance(module.state, dict):
        for name, value in module.state.items():
            yield from _walk(value, f"{prefix}.{name}" if prefix else str(name))


def read(path: pathlib.Path) -> Tensors:
    """Reads the parameters and buffers of an archive, by their names in the module.

    Raises:
        UserError: the archive is damaged, or its description holds other things.
    """
    try:
        archive = zipfile.ZipFile(path)
        root = next(n for n in archive.namelist() if n.endswith("/data.pkl")).split("/")[0]
        tensors = dict(_walk(_Reader(archive, root).load()))
    except Exception as error:  # whatever damaged bytes can lead to
        raise UserError(
            f"{path} cannot be read as a TorchScript archive: {error or type(error).__name__}"
        ) from error
    return {
        name: Tensor(tensor.shape, tensor.dtype, functools.partial(_careful, path, name, tensor))
        for name, tensor in tensors.items()
    }


def _careful(path: pathlib.Path, name: str, tensor: Tensor) -> np.ndarray:
    try:
        return tensor.read()
    except Exception as error:  # whatever damaged bytes can lead to
        raise UserError(f"{path} is damaged: {name} cannot be read ({error})") from error
