"""A model's parameters as one flat dictionary: name -> array.

Names are dotted paths ("clip.text.blocks.layer.attn.in_proj.kernel"). What a group, a checkpoint
or a table of weights says about a parameter, it says by this name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from save_jax.models.layers import Stack

Parameters = dict[str, jax.Array | jax.ShapeDtypeStruct]  # the latter of an abstract model


@dataclasses.dataclass(frozen=True)
class Structure:
    """A model without its parameters; hashable, so that compiled functions may close over it.

    Attributes:
        graphdef: how the modules hang together.
        stacked: names of the parameters of a `layers.Stack`, which have a leading layer axis. What
            treats a layer as one array (sharding, the norm of a gradient) goes by this set.
    """

    graphdef: nnx.GraphDef
    stacked: frozenset[str]


def split(model: nnx.Module) -> tuple[Structure, Parameters]:
    """Takes a model apart into its structure and its parameters, sorted by name.

    An abstract model (`nnx.eval_shape`) gives abstract parameters.
    """
    graphdef, state = nnx.split(model)
    flat = {_name(path): value for path, value in nnx.to_flat_state(state)}
    stacks = [_name(path) for path, module in nnx.iter_graph(model) if isinstance(module, Stack)]
    stacked = frozenset(
        name for name in flat if any(name.startswith(f"{stack}.") or not stack for stack in stacks)
    )
    return Structure(graphdef, stacked), {name: flat[name].get_value() for name in sorted(flat)}


def merge(
    structure: Structure, parameters: Mapping[str, jax.Array | jax.ShapeDtypeStruct]
) -> nnx.Module:
    """Puts a model together again; the inverse of `split`."""
    flat: dict[tuple[Any, ...], nnx.Param] = {
        tuple(name.split(".")): nnx.Param(value) for name, value in parameters.items()
    }
    return nnx.merge(structure.graphdef, nnx.from_flat_state(flat))


def _name(path: tuple) -> str:
    return ".".join(map(str, path))
