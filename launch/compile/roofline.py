"""Counts a program's floating-point operations and bounds its time by a chip's figures.

The compiler's own count (`cost_analysis`) takes a loop's body once, however often it runs. Here
floating-point operations are counted on the jaxpr, which has the length of every scan.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend import core

GIB = 2**30


class Chip(NamedTuple):
    """One accelerator chip's published figures.

    Attributes:
        kind: JAX's `device_kind`.
        memory: bytes of HBM.
        flops: peak dense bfloat16 operations per second.
        bandwidth: bytes per second between HBM and chip.
        interconnect: bytes per second that a chip can receive from its neighbours over all its
            links together: half of the published bidirectional figure.
        shapes: example topologies, for an error message.
    """

    kind: str
    memory: int
    flops: float
    bandwidth: float
    interconnect: float
    shapes: str


# Google's documentation, cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, tables "key specifications".
CHIPS = {
    "v4": Chip("TPU v4", 32 * GIB, 275e12, 1200e9, 300e9, "v4:2x2x1, v4:2x2x2, v4:4x4x4"),
    "v5e": Chip("TPU v5 lite", 16 * GIB, 197e12, 819e9, 200e9, "v5e:1x1, v5e:2x4, v5e:16x16"),
    "v5p": Chip("TPU v5", 95 * GIB, 459e12, 2765e9, 600e9, "v5p:2x2x1, v5p:2x2x2, v5p:4x4x4"),
    "v6e": Chip("TPU v6 lite", 32 * GIB, 918e12, 1638e9, 400e9, "v6e:1x1, v6e:2x4, v6e:16x16"),
}
# A float32 product of full precision is six bfloat16 products on these chips.
PASSES = {"bfloat16": 1, "float32": 6}


class Roofline(NamedTuple):
    """The least time that a program can take, in seconds, by each of three limits alone."""

    compute: float
    memory: float
    interconnect: float

    @property
    def bound(self) -> str:
        """Returns the name of the highest limit."""
        return max(self._fields, key=lambda name: getattr(self, name))

    @property
    def seconds(self) -> float:
        """Returns the highest limit, as if the others overlapped with it completely."""
        return max(self)


def roofline(chip: Chip, dtype: str, flops: float, hbm_bytes: float, wire_bytes: float) -> Roofline:
    """Computes the limits for one chip's share of a program.

    Args:
        chip: the chip's published figures.
        dtype: dtype of the matrix products.
        flops: operations of matrix products.
        hbm_bytes: bytes read from and written to HBM.
        wire_bytes: bytes received from other chips.
    """
    return Roofline(
        flops * PASSES[dtype] / chip.flops,
        hbm_bytes / chip.bandwidth,
        wire_bytes / chip.interconnect,
    )


def count_flops(jaxpr: Any) -> float:
    """Counts the floating-point operations of all matrix products and convolutions in a jaxpr.

    A multiply-add counts as two; all devices are counted together. A scan's body counts as often as
    it runs, and of a `cond` the most expensive branch. A `while` has no known length: its body
    counts once.

    Args:
        jaxpr: open or closed, as `jax.make_jaxpr` or a traced function's `.jaxpr` gives.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return math.fsum(_flops(eqn) for eqn in jaxpr.eqns)


def _flops(eqn: Any) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        sizes = eqn.invars[0].aval.shape
        return 2.0 * eqn.outvars[0].aval.size * math.prod(sizes[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * eqn.outvars[0].aval.size * kernel.size / outputs
    if name == "scan":
        return params["length"] * count_flops(params["jaxpr"])
    if name == "cond":
        return max(count_flops(branch) for branch in params["branches"])
    inside = math.fsum(count_flops(jaxpr) for jaxpr in _jaxprs(params))
    if name == "shard_map":  # its body is one device's share
        return inside * math.prod(
            params["mesh"].shape[axis] for axis in params["newly_manual_axes"]
        )
    return inside


def _jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    """Yields the jaxprs among an equation's parameters, such as those of jit and checkpoint."""
    for value in params.values():
        if isinstance(value, core.Jaxpr | core.ClosedJaxpr):
            yield value
