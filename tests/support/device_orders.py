"""Runs a command on a mesh whose devices are not in the order of their processes, as on a TPU pod.

As a program, `python -m tests.support.device_orders ORDER MODULE ARGUMENTS …` is `python -m MODULE
ARGUMENTS …` on a mesh in that order. JAX lays a mesh along the links of a TPU slice, and leaves
CPUs as they are given. The orders: "interleaved", one device of each process in turn, as JAX orders
a v4 2x2x2; "reversed"; "random" and "random-N", which are shuffled. A cache has shards of few rows,
so that each process writes some.
"""

import random
import runpy
import sys
from collections.abc import Sequence

import jax
import numpy as np

from save_jax import sharding
from save_jax.cache import shards

_make_mesh = sharding.make_mesh


def arrange(order: str, devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Returns devices, which are in the order of their processes, in another one."""
    if order == "interleaved":
        owners = [device.process_index for device in devices]
        turns = [owners[:place].count(owner) for place, owner in enumerate(owners)]
        return [devices[place] for place in np.argsort(turns, kind="stable")]
    if order == "reversed":
        return list(reversed(devices))
    shuffled = list(devices)
    random.Random(order).shuffle(shuffled)  # the same on every process
    return shuffled


def use(order: str) -> None:
    """Makes `sharding.make_mesh`, from now on, take the devices in an order."""

    def make_mesh(axes, devices=None) -> jax.sharding.Mesh:
        mesh = _make_mesh(axes, arrange(order, devices or jax.devices()))
        owners = [device.process_index for device in mesh.devices.flat]
        assert owners != sorted(owners) or jax.process_count() == 1, owners
        return mesh

    sharding.make_mesh = make_mesh


if __name__ == "__main__":
    use(sys.argv[1])
    shards.CLIPS, shards.CAPTIONS = 2, 16
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
