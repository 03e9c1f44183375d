"""What a table of names is, and how parameters go through it in both directions."""

import dataclasses
import fnmatch
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from save_jax.errors import UserError
from save_jax.weights.files.tensor import Shape, Tensor

LAYER = ".*."  # stands for the layer's number in PyTorch's names: "resblocks.*.ln_1.weight"
SHOWN = 5  # names shown of a long list

# Arrays by PyTorch's names; `Tensor`s are read one at a time.
State = Mapping[str, np.ndarray | jax.Array | Tensor]


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

    A name with `LAYER` in it stands for one tensor per layer, which we keep stacked. Several names
    stand for tensors that we keep joined along PyTorch's first axis, before the transform.
    """

    torch: str | tuple[str, ...]
    ours: str
    transform: Transform = AS_IS

    @property
    def names(self) -> tuple[str, ...]:
        """PyTorch's names; more than one where we join what they keep apart."""
        return (self.torch,) if isinstance(self.torch, str) else self.torch

    @property
    def stacked(self) -> bool:
        """Whether PyTorch keeps one tensor per layer."""
        return LAYER in self.names[0]

    def under(self, torch: str, ours: str) -> "Row":
        """Returns the same row below a prefix on either side."""
        names = tuple(torch + name for name in self.names)
        return self._replace(torch=names if len(names) > 1 else names[0], ours=ours + self.ours)


@dataclasses.dataclass(frozen=True)
class Table:
    """All of one model's names.

    Attributes:
        rows: one per parameter.
        unused: `fnmatch` patterns of PyTorch's names that may be present and mean nothing to us.
        renamed: regular expression -> replacement, other spellings of PyTorch's names.
    """

    rows: tuple[Row, ...]
    unused: tuple[str, ...] = ()
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def row(self, ours: str) -> Row:
        """Returns the row of one of our names.

        Raises:
            KeyError: the table has no such row, which is a mistake in the table.
        """
        for row in self.rows:
            if row.ours == ours:
                return row
        raise KeyError(f"the table has no row for our parameter {ours!r}")

    def canonical(self, name: str) -> str:
        """Returns a tensor's name as the rows spell it; a `module.` prefix is ignored."""
        name = name.removeprefix("module.")
        for pattern, replacement in self.renamed.items():
            name = re.sub(pattern, replacement, name)
        return name

    def ignores(self, name: str) -> bool:
        """Says whether a tensor (by its canonical name) is unused here."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.unused)

    def holders(self, names: Iterable[str]) -> dict[str, Row]:
        """Returns the row of each tensor (by canonical name) that has one."""
        rows = {name: row for row in self.rows for name in row.names}
        patterns = ((name, re.sub(r"\.\d+\.", LAYER, name, count=1)) for name in names)
        found = {name: rows.get(name, rows.get(pattern)) for name, pattern in patterns}
        return {name: row for name, row in found.items() if row is not None}


def linear(torch: str, ours: str, *, bias: bool = True) -> tuple[Row, ...]:
    """Returns the rows of a linear layer."""
    kernel = Row(f"{torch}.weight", f"{ours}.kernel", LINEAR)
    return (kernel, Row(f"{torch}.bias", f"{ours}.bias")) if bias else (kernel,)


def joined_linear(torch: Sequence[str], ours: str) -> tuple[Row, ...]:
    """Returns the rows of linear layers that PyTorch keeps apart and we join, in this order."""
    weights, biases = (tuple(f"{name}.{kind}" for name in torch) for kind in ("weight", "bias"))
    return Row(weights, f"{ours}.kernel", LINEAR), Row(biases, f"{ours}.bias")


def layer_norm(torch: str, ours: str) -> tuple[Row, ...]:
    """Returns the rows of a LayerNorm."""
    return Row(f"{torch}.weight", f"{ours}.scale"), Row(f"{torch}.bias", f"{ours}.bias")


def attention(torch: str, ours: str) -> tuple[Row, ...]:
    """Returns the rows of a `torch.nn.MultiheadAttention`."""
    return (
        Row(f"{torch}.in_proj_weight", f"{ours}.in_proj.kernel", LINEAR),
        Row(f"{torch}.in_proj_bias", f"{ours}.in_proj.bias"),
        *linear(f"{torch}.out_proj", f"{ours}.out_proj"),
    )


def clip_block(torch: str, ours: str) -> tuple[Row, ...]:
    """Returns the rows of a CLIP block, which blocks that started from one have too."""
    return (
        *attention(f"{torch}.attn", f"{ours}.attn"),
        *layer_norm(f"{torch}.ln_1", f"{ours}.ln_1"),
        *linear(f"{torch}.mlp.c_fc", f"{ours}.mlp.c_fc"),
        *linear(f"{torch}.mlp.c_proj", f"{ours}.mlp.c_proj"),
        *layer_norm(f"{torch}.ln_2", f"{ours}.ln_2"),
    )


def from_torch(
    table: Table,
    state: State,
    expected: Mapping[str, Shape],
    source: str = "the checkpoint",
) -> dict[str, np.ndarray]:
    """Turns PyTorch's state into our parameters, in float32, in host memory.

    Nothing is read before all names and shapes are known to fit, and then tensor by tensor: of a
    state whose tensors are read on demand, one at a time is in memory.

    Args:
        table: names of the model.
        state: arrays by PyTorch's names; a `module.` prefix is ignored.
        expected: shape of each of our parameters, by our names.
        source: where the state comes from, for the error message.

    Raises:
        UserError: parameters are missing, not expected or of the wrong shape; all of them at once.
    """
    state = {table.canonical(name): array for name, array in state.items()}
    missing, misshapen, used = [], [], set()
    for ours, shape in expected.items():
        row = table.row(ours)
        for name in (name for pieces in _torch_names(row, shape) for name in pieces):
            used.add(name)
            if name not in state:
                missing.append(name)
            elif tuple(state[name].shape) != (should := _piece_shape(row, shape)):
                found = list(state[name].shape)
                misshapen.append(f"{name} is {found} and should be {list(should)}")
    unexpected = [name for name in state if name not in used and not table.ignores(name)]
    if missing or unexpected or misshapen:
        raise UserError(
            f"{source} does not hold this model's parameters: "
            + "; ".join(
                f"{len(found)} {what}: {listing(found)}"
                for what, found in (
                    ("missing", missing),
                    ("not expected", unexpected),
                    ("of the wrong shape", misshapen),
                )
                if found
            )
            + ". Give a file that was saved from this model, or a config that fits the file."
        )
    return {ours: _read(table.row(ours), state, shape) for ours, shape in expected.items()}


def to_torch(table: Table, parameters: State) -> dict[str, np.ndarray]:
    """Turns our parameters into PyTorch's state, in float32; the inverse of `from_torch`."""
    state = {}
    for ours, value in parameters.items():
        row, value = table.row(ours), np.asarray(value, np.float32)
        arrays = value if row.stacked else [value]
        for names, array in zip(_torch_names(row, value.shape), arrays, strict=True):
            joined = row.transform.to_torch(array)
            pieces = [joined] if len(names) == 1 else np.split(joined, len(names))
            for name, piece in zip(names, pieces, strict=True):
                state[name] = np.array(piece, order="C")
    return state


def shapes(table: Table, state: State) -> dict[str, Shape]:
    """Returns shapes of the parameters that a state holds, where no config gives them.

    A stack is as deep as its deepest tensor says. A row of which a tensor is missing has a shape
    too, for `from_torch` to name what is missing.

    Args:
        table: names of the model; every row is looked for.
        state: arrays by PyTorch's names.
    """
    state = {table.canonical(name): array for name, array in state.items()}
    depths: dict[str, int] = {}
    for name, row in table.holders(state).items():
        if row.stacked:
            stack = _stack(row)
            (layer,) = map(int, re.findall(r"\.(\d+)\.", name)[:1])
            depths[stack] = max(depths.get(stack, 0), layer + 1)
    result = {}
    for row in table.rows:
        leading = (depths.get(_stack(row), 1),) if row.stacked else ()
        tensors = [
            [state[name] for name in pieces if name in state]
            for pieces in _torch_names(row, leading)
        ]
        whole = next((found for found in tensors if len(found) == len(row.names)), None)
        if whole is None:
            result[row.ours] = leading
            continue
        first, *rest = whole[0].shape or (None,)
        joined = () if first is None else (len(whole) * first, *rest)
        blank = np.broadcast_to(np.float32(0), joined)
        try:
            result[row.ours] = (*leading, *row.transform.from_torch(blank).shape)
        except (ValueError, IndexError):  # a tensor of too few axes; it will not fit
            result[row.ours] = leading
    return result


def torch_names(table: Table, ours: str, shape: Shape) -> list[tuple[str, ...]]:
    """Returns PyTorch's names of a parameter of ours: the tensors joined, layer by layer."""
    return _torch_names(table.row(ours), shape)


def dtype(name: str) -> np.dtype:
    """Returns NumPy's dtype of a name such as "float16"; "bfloat16" too."""
    return np.dtype(getattr(jnp, name))


def listing(names: Collection[str]) -> str:
    """Lists the first of some names, for a message."""
    return ", ".join(list(names)[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def _stack(row: Row) -> str:
    """Names the stack of a row's layers, as PyTorch does."""
    return row.names[0].split(LAYER)[0]


def _torch_names(row: Row, shape: Shape) -> list[tuple[str, ...]]:
    if not row.stacked:
        return [row.names]
    return [
        tuple(name.replace(LAYER, f".{layer}.") for name in row.names) for layer in range(shape[0])
    ]


def _torch_shape(row: Row, shape: Shape) -> Shape:
    """Returns the shape of PyTorch's tensor (of one layer), from an array without contents."""
    layer = shape[1:] if row.stacked else shape
    return row.transform.to_torch(np.broadcast_to(np.float32(0), layer)).shape


def _piece_shape(row: Row, shape: Shape) -> Shape:
    """Returns the shape of each of the tensors that a row joins."""
    try:
        joined = _torch_shape(row, shape)
    except (ValueError, IndexError):  # a shape that no tensor transforms to
        return (-1,)
    return joined if len(row.names) == 1 else (joined[0] // len(row.names), *joined[1:])


def _read(row: Row, state: State, shape: Shape) -> np.ndarray:
    result = np.empty(shape, np.float32)
    for layer, names in enumerate(_torch_names(row, shape)):
        pieces = [np.asarray(state[name], np.float32) for name in names]
        joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        result[layer if row.stacked else ...] = row.transform.from_torch(joined)
    return result
