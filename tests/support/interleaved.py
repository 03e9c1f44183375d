"""Runs a command on a mesh whose devices are interleaved over the processes, as on a TPU pod.

As a program, `python -m tests.support.interleaved MODULE ARGUMENTS …` is `python -m MODULE
ARGUMENTS …` with the devices in the order that JAX gives them on a v4 2x2x2: process 0, 1, 0, 1,
and so on. JAX sorts the devices of a TPU slice by topology, and leaves those of CPUs as they are.
"""

import runpy
import sys

import jax

from save_jax import sharding

_make_mesh = sharding.make_mesh


def devices() -> list[jax.Device]:
    """Returns all devices, one of each process in turn."""
    return sorted(jax.devices(), key=lambda d: (d.id % jax.local_device_count(), d.process_index))


def make_mesh(axes) -> jax.sharding.Mesh:
    """Makes `sharding.make_mesh`'s mesh of the devices in that order."""
    mesh = _make_mesh(axes, devices())
    owners = [device.process_index for device in mesh.devices.flat]
    assert owners[: jax.process_count()] == list(range(jax.process_count())), owners
    return mesh


if __name__ == "__main__":
    sharding.make_mesh = make_mesh
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
