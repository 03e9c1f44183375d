"""Places arrays on meshes in every order of devices, and checks where each row has come to.

As a program, `python -m tests.support.placing RANDOM COORDINATOR PROCESSES ID` is one process of
several, with so many random orders; it prints the meshes on which all was as it should be.
"""

import itertools
import sys

import jax
import numpy as np

from save_jax import distributed, sharding, stopping
from tests.support import device_orders, synthetic

AXES = ({"data": -1}, {"data": -1, "fsdp": 2}, {"data": 1, "fsdp": -1})
EACH = 2  # rows of a batch on each device


def everywhere(tree, mesh: jax.sharding.Mesh):
    """Reads whole what is on the mesh."""
    whole = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(mesh))
    return jax.tree.map(np.asarray, whole(tree))


def check_batch(mesh: jax.sharding.Mesh) -> None:
    """Row i of what is on the mesh is row i of the global batch, and each device has its own."""
    batch = synthetic.clips(3, EACH * mesh.size)
    rows = sharding.process_rows(mesh, EACH * mesh.size)
    placed = sharding.put_batch(synthetic.rows(batch, rows), mesh)
    found = everywhere(placed, mesh)
    for name, value in batch._asdict().items():
        np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)
    order = list(mesh.devices.flat)
    for shard in placed.index.addressable_shards:
        first = EACH * order.index(shard.device)
        np.testing.assert_array_equal(shard.data, np.arange(first, first + EACH))


def check_rows(mesh: jax.sharding.Mesh) -> None:
    """Captions, which every process has, come in their order; zeros fill up."""
    ids = np.random.default_rng(0).integers(1, 99, (EACH * mesh.size - 3, 5))
    found = everywhere(sharding.put_rows(ids, EACH * mesh.size, mesh), mesh)
    np.testing.assert_array_equal(found[:-3], ids)
    assert not found[-3:].any()


def check_weights(mesh: jax.sharding.Mesh) -> None:
    """A parameter that the fsdp axis slices is put together as it was."""
    for shape in ((512, 48), (48, 512), (3,)):
        value = np.random.default_rng(1).normal(size=shape).astype(np.float32)
        (where,) = jax.tree.leaves(
            sharding.tree_shardings({"kernel": jax.ShapeDtypeStruct(shape, "float32")}, (), mesh)
        )
        assert where.is_fully_replicated == (value.size < 512 or mesh.shape.get("fsdp", 1) == 1)
        found = everywhere(sharding.global_array(value, where), mesh)
        np.testing.assert_array_equal(found, value)


def check_votes(mesh: jax.sharding.Mesh) -> None:
    """All stop if any one is asked to, whichever it is, and none if none is."""
    for voter in (None, *range(jax.process_count())):
        stop = stopping.StopRequest(mesh)
        if voter == jax.process_index():
            stop.request()
        stop.count(stop.vote())
        assert stop.agreed == (voter is not None), voter


def main(shuffles: str, coordinator: str, count: str, number: str) -> None:
    distributed.join(coordinator, int(count), int(number))
    orders = ("interleaved", "reversed", *(f"random-{seed}" for seed in range(int(shuffles))))
    for order, axes in itertools.product(orders, AXES):
        device_orders.use(order)
        mesh = sharding.make_mesh(axes)
        for check in (check_batch, check_rows, check_weights, check_votes):
            check(mesh)
        print(f"checked: {order}, {dict(mesh.shape)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
