"""Counts a program's floating-point operations, and knows the peak rates of devices.

The compiler's own count (`cost_analysis`) takes a loop's body once, however often it runs. Here
operations are counted on the jaxpr, which has the length of every scan.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

# JAX's names of cuDNN's fused attention, and the matrix products that the plain one is made of.
_FUSED = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 4}


class Peak(NamedTuple):
    """A device's published peak rates of matrix products, dense, in operations per second.

    Attributes:
        bfloat16: with sums in float32.
        float32: of full precision, as `save_jax.config` asks for: no TF32.
    """

    bfloat16: float
    float32: float


def _tpu(bfloat16: float) -> Peak:
    """Returns a TPU's peaks: a float32 product of full precision is six bfloat16 products."""
    return Peak(bfloat16, bfloat16 / 6)


# Google's documentation, cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}: a device is a chip.
_V4, _V5E, _V5P, _V6E = _tpu(275e12), _tpu(197e12), _tpu(459e12), _tpu(918e12)
# NVIDIA's data sheets of H100, H200 and A100 (half of what these give with sparsity), and its white
# paper on GA102, appendix A.
_HOPPER_SXM, _HOPPER_NVL = Peak(989.5e12, 67e12), Peak(835.5e12, 60e12)
_A100 = Peak(312e12, 19.5e12)
PEAKS = {  # by JAX's `device_kind`, of which TPUs have two spellings
    "TPU v4": _V4,
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "NVIDIA H100 80GB HBM3": _HOPPER_SXM,
    "NVIDIA H100 NVL": _HOPPER_NVL,
    "NVIDIA H100 PCIe": Peak(756.5e12, 51e12),
    "NVIDIA H200": _HOPPER_SXM,
    "NVIDIA H200 NVL": _HOPPER_NVL,
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA GeForce RTX 3090": Peak(71e12, 35.6e12),
}


def peak(devices: Sequence[jax.Device], dtype: str) -> float | None:
    """Returns the peak operations per second of all devices together.

    Args:
        devices: of all processes.
        dtype: of the matrix products, "bfloat16" or "float32".

    Returns:
        None where PEAKS lacks one of the devices.
    """
    found = [PEAKS.get(device.device_kind) for device in devices]
    return None if None in found else math.fsum(getattr(each, dtype) for each in found)


def count_flops(jaxpr: Any) -> float:
    """Counts the floating-point operations of all matrix products and convolutions in a jaxpr.

    A multiply-add counts as two; all devices are counted together. What a backward pass computes
    again counts again. A scan's body counts as often as it runs, and of a `cond` the most expensive
    branch. A `while` has no known length: its body counts once. A fused attention counts as much as
    the plain one.

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
    if name in _FUSED:
        queries, keys = (variable.aval for variable in eqn.invars[:2])
        return 2.0 * _FUSED[name] * queries.size * keys.shape[1]  # [batch, tokens, heads, channels]
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
