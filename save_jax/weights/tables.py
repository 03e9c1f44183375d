"""What a table of names is, and how parameters go through it in both directions."""

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from save_jax.errors import UserError
from save_jax.parameters import STACKED, Parameters

LAYER = ".*."  # stands for the layer's number in PyTorch's names: "resblocks.*.ln_1.weight"
SHOWN = 5  # names shown of a long list

Shape = tuple[int, ...]


class Transform(NamedTuple):
    """How one array (of one layer) changes its layout, and how it changes back."""

    from_torch: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


def _patches_to_torch(kernel: np.ndarray) -> np.ndarray:
    side = math.isqrt(len(kernel) // 3)
    return kernel.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


AS_IS = Transform(lambda x: x, lambda x: x)
# Linear: [out, in] <-> [in, out].
LINEAR = Transform(np.transpose, np.transpose)
# Convolution: [out, in, height, width] <-> [height, width, in, out].
CONVOLUTION = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
# Convolution over square RGB patches <-> the matrix that it is: [out, 3, y, x] <-> [y·x·3, out].
PATCHES = Transform(lambda x: x.transpose(2, 3, 1, 0).reshape(-1, len(x)), _patches_to_torch)
# Leading axes of size one that PyTorch broadcasts: [1, ...] or [1, 1, ...] <-> [...].
ONE_LEADING = Transform(lambda x: x[0], lambda x: x[None])
TWO_LEADING = Transform(lambda x: x[0, 0], lambda x: x[None, None])


class Row(NamedTuple):
    """One parameter: PyTorch's name, ours, and the transform from theirs to ours and back.

    A name with `LAYER` in it stands for one tensor a layer, which we keep stacked.
    """

    torch: str
    ours: str
    transform: Transform = AS_IS

    def under(self, torch: str, ours: str) -> "Row":
        """The same row below a prefix on either side."""
        return self._replace(torch=torch + self.torch, ours=ours + self.ours)


@dataclasses.dataclass(frozen=True)
class Table:
    """All of one model's names.

    Attributes:
        rows: one a parameter.
        unused: `fnmatch` patterns of PyTorch's names that may be present and mean nothing to us.
        renamed: prefix -> prefix, other spellings of PyTorch's names.
    """

    rows: tuple[Row, ...]
    unused: tuple[str, ...] = ()
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def row(self, ours: str) -> Row:
        """The row of one of our names.

        Raises:
            KeyError: the table has no such row, which is a mistake in the table.
        """
        for row in self.rows:
            if row.ours == ours:
                return row
        raise KeyError(f"the table has no row for our parameter {ours!r}")


def linear(torch: str, ours: str, *, bias: bool = True) -> tuple[Row, ...]:
    """Rows of a linear layer."""
    kernel = Row(f"{torch}.weight", f"{ours}.kernel", LINEAR)
    return (kernel, Row(f"{torch}.bias", f"{ours}.bias")) if bias else (kernel,)


def layer_norm(torch: str, ours: str) -> tuple[Row, ...]:
    """Rows of a LayerNorm."""
    return Row(f"{torch}.weight", f"{ours}.scale"), Row(f"{torch}.bias", f"{ours}.bias")


def attention(torch: str, ours: str) -> tuple[Row, ...]:
    """Rows of a `torch.nn.MultiheadAttention`."""
    return (
        Row(f"{torch}.in_proj_weight", f"{ours}.in_proj.kernel", LINEAR),
        Row(f"{torch}.in_proj_bias", f"{ours}.in_proj.bias"),
        *linear(f"{torch}.out_proj", f"{ours}.out_proj"),
    )


def clip_block(torch: str, ours: str) -> tuple[Row, ...]:
    """Rows of what CLIP's blocks have, and every block that started from one."""
    return (
        *attention(f"{torch}.attn", f"{ours}.attn"),
        *layer_norm(f"{torch}.ln_1", f"{ours}.ln_1"),
        *linear(f"{torch}.mlp.c_fc", f"{ours}.mlp.c_fc"),
        *linear(f"{torch}.mlp.c_proj", f"{ours}.mlp.c_proj"),
        *layer_norm(f"{torch}.ln_2", f"{ours}.ln_2"),
    )


def from_torch(
    table: Table,
    state: Mapping[str, np.ndarray],
    expected: Mapping[str, Shape],
    source: str = "the checkpoint",
) -> Parameters:
    """PyTorch's state as our parameters, in float32.

    Args:
        table: names of the model.
        state: arrays by PyTorch's names; a `module.` prefix is ignored.
        expected: shape of each of our parameters, by our names.
        source: where the state comes from, for the error message.

    Raises:
        UserError: parameters are missing, not expected or of the wrong shape; all of them at once.
    """
    state = {_canonical(table, name): array for name, array in state.items()}
    missing, misshapen, used = [], [], set()
    parameters = {}
    for ours, shape in expected.items():
        row = table.row(ours)
        layer_shape = _torch_shape(row, shape)
        arrays = []
        for name in _torch_names(row, shape):
            used.add(name)
            if name not in state:
                missing.append(name)
            elif state[name].shape != layer_shape:
                found = list(state[name].shape)
                misshapen.append(f"{name} is {found} and should be {list(layer_shape)}")
            else:
                arrays.append(row.transform.from_torch(np.asarray(state[name], np.float32)))
        # Copies: the caller's arrays may change under us.
        if STACKED in ours and len(arrays) == shape[0]:
            parameters[ours] = jnp.array(np.stack(arrays))
        elif STACKED not in ours and arrays:
            parameters[ours] = jnp.array(arrays[0])
    unexpected = [
        name
        for name in state
        if name not in used and not any(fnmatch.fnmatchcase(name, p) for p in table.unused)
    ]
    if missing or unexpected or misshapen:
        raise UserError(
            f"{source} does not hold this model's parameters: "
            + "; ".join(
                f"{len(found)} {what}: {_listing(found)}"
                for what, found in (
                    ("missing", missing),
                    ("not expected", unexpected),
                    ("of the wrong shape", misshapen),
                )
                if found
            )
            + ". Give a file that was saved from this model, or a config that fits the file."
        )
    return parameters


def to_torch(table: Table, parameters: Mapping[str, ArrayLike]) -> dict[str, np.ndarray]:
    """Our parameters as PyTorch's state, in float32; the inverse of `from_torch`."""
    state = {}
    for ours, value in parameters.items():
        row, value = table.row(ours), np.asarray(value, np.float32)
        arrays = value if STACKED in ours else [value]
        for name, array in zip(_torch_names(row, value.shape), arrays, strict=True):
            state[name] = np.array(row.transform.to_torch(array), order="C")
    return state


def _canonical(table: Table, name: str) -> str:
    name = name.removeprefix("module.")
    for old, new in table.renamed.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _torch_names(row: Row, shape: Shape) -> Iterable[str]:
    if STACKED not in row.ours:
        return [row.torch]
    return [row.torch.replace(LAYER, f".{layer}.") for layer in range(shape[0])]


def _torch_shape(row: Row, shape: Shape) -> Shape:
    """Shape of PyTorch's tensor (of one layer), by sending an array without contents back."""
    layer = shape[1:] if STACKED in row.ours else shape
    return row.transform.to_torch(np.broadcast_to(np.float32(0), layer)).shape


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
