"""The device mesh, and how arrays lie on it.

One program, `jax.jit` over global arrays: parameters are replicated, batches are split along the
mesh's data axis, and the compiler inserts the collectives. The same code runs on 1 device and 256.
"""

import collections
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from save_jax.batch import Batch
from save_jax.errors import UserError

DATA = "data"  # the axis that splits the batch


def make_mesh(axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with named axes; a size of −1 takes the devices that the others leave.

    Raises:
        UserError: no axis is called "data", or the sizes do not multiply to the device count.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dict(axes)
    if DATA not in sizes or list(sizes.values()).count(-1) > 1:
        raise UserError(
            f"config.mesh = {sizes}: expected an axis named 'data', and at most one size of -1"
        )
    known = int(np.prod([n for n in sizes.values() if n != -1]))
    for name, size in sizes.items():
        if size == -1 and known > 0:
            sizes[name] = len(devices) // known
    if int(np.prod(list(sizes.values()))) != len(devices):
        raise UserError(
            f"config.mesh = {dict(axes)} does not fit the {len(devices)} devices here: "
            "the product of its sizes must be the number of devices (-1 = the rest)"
        )
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        devices=devices,
        axis_types=(AxisType.Auto,) * len(sizes),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis is split over the data axis."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def check_batch_size(name: str, batch_size: int, mesh: Mesh) -> None:
    """Raises UserError unless the global batch divides over the data axis and the processes."""
    shards = mesh.shape[DATA]
    if batch_size <= 0 or batch_size % shards or batch_size % jax.process_count():
        unit = math.lcm(shards, jax.process_count())
        above = max(1, -(-batch_size // unit)) * unit
        raise UserError(
            f"config.{name} = {batch_size} does not divide over the {shards} devices of the data "
            f"axis in {jax.process_count()} process(es): expected a "
            f"multiple of {unit}, say {above}"
        )


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Puts this process's rows of a batch on its devices, as rows of one global array."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), batch
    )


def prefetch(batches: Iterable[Batch], mesh: Mesh, ahead: int = 2) -> Iterator[tuple[Batch, Batch]]:
    """Yields (host batch, device batch), copying `ahead` batches before they are asked for."""
    iterator = iter(batches)
    queue = collections.deque()
    while True:
        for host in itertools.islice(iterator, ahead - len(queue)):
            queue.append((host, put_batch(host, mesh)))
        if not queue:
            return
        yield queue.popleft()
