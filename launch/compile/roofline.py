"""Bounds a program's time by a chip's figures; `save_jax.flops` counts its operations."""

from typing import NamedTuple

from save_jax.flops import PEAKS

GIB = 2**30


class Chip(NamedTuple):
    """One accelerator chip's published figures.

    Attributes:
        kind: JAX's `device_kind`, by which `save_jax.flops` knows its peak rates.
        memory: bytes of HBM.
        bandwidth: bytes per second between HBM and chip.
        interconnect: bytes per second that a chip can receive from its neighbours over all its
            links together: half of the published bidirectional figure.
        shapes: example topologies, for an error message.
    """

    kind: str
    memory: int
    bandwidth: float
    interconnect: float
    shapes: str


# Google's documentation, cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, tables "key specifications".
CHIPS = {
    "v4": Chip("TPU v4", 32 * GIB, 1200e9, 300e9, "v4:2x2x1, v4:2x2x2, v4:4x4x4"),
    "v5e": Chip("TPU v5 lite", 16 * GIB, 819e9, 200e9, "v5e:1x1, v5e:2x4, v5e:16x16"),
    "v5p": Chip("TPU v5", 95 * GIB, 2765e9, 600e9, "v5p:2x2x1, v5p:2x2x2, v5p:4x4x4"),
    "v6e": Chip("TPU v6 lite", 32 * GIB, 1638e9, 400e9, "v6e:1x1, v6e:2x4, v6e:16x16"),
}


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
        flops / getattr(PEAKS[chip.kind], dtype),
        hbm_bytes / chip.bandwidth,
        wire_bytes / chip.interconnect,
    )
