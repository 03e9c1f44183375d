"""A tensor in a file: known by shape and dtype, read when asked for."""

import dataclasses
from collections.abc import Callable

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One array of a file; `np.asarray` reads it.

    Attributes:
        shape, dtype: known without reading.
        read: gives the array; it may be a read-only view of the file.
    """

    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        array = self.read()
        return array if dtype is None else array.astype(dtype, copy=False)


Tensors = dict[str, Tensor]
