"""A model's parameters as one flat dictionary: name -> array.

Names are dotted paths ("clip.text.blocks.layer.attn.in_proj.kernel"). What a group, a checkpoint
or a table of weights says about a parameter, it says by this name.
"""

from collections.abc import Mapping

import jax
from flax import nnx

Parameters = dict[str, jax.Array | jax.ShapeDtypeStruct]  # the latter of an abstract model

STACKED = ".layer."  # parameters of a Stack have a leading layer axis; see models/layers.py


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Parameters]:
    """Takes a model apart into its structure and its parameters, sorted by name.

    An abstract model (`nnx.eval_shape`) gives abstract parameters.
    """
    graphdef, state = nnx.split(model)
    flat = {".".join(map(str, path)): value for path, value in nnx.to_flat_state(state)}
    return graphdef, {name: flat[name].get_value() for name in sorted(flat)}


def merge(graphdef: nnx.GraphDef, parameters: Mapping[str, jax.Array]) -> nnx.Module:
    """Puts a model together again; the inverse of `split`."""
    flat = {tuple(name.split(".")): nnx.Param(value) for name, value in parameters.items()}
    return nnx.merge(graphdef, nnx.from_flat_state(flat))
