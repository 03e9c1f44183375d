"""The device mesh, and how arrays are sharded on it.

One program, `jax.jit` over global arrays: the compiler inserts the collectives, and the same code
runs on 1 device and 256. A batch is split by rows over all devices. Parameters are
replicated along the "data" axis and sharded along the "fsdp" axis, with the optimiser's state; a
layer is all-gathered where it is used (Rajbhandari et al. 2020, ZeRO stage 3).
"""

import collections
import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from save_jax.batch import Batch
from save_jax.errors import UserError

DATA, FSDP = "data", "fsdp"  # both split the batch; the second also splits the parameters
LEAST_SLICED = 2**14  # elements; a smaller array (a bias) costs more to gather than to hold


def make_mesh(axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh with the axes "data" and, if wanted, "fsdp", along the links between devices.

    Neighbours in the mesh are neighbours in a TPU slice, so its order is in general neither that of
    `jax.devices()` nor that of the processes. Several slices are joined by the data centre's
    network only: "data" is split over them, and parameters are gathered within each.

    Args:
        axes: size by name; −1 takes the devices that the other leaves.
        devices: what to build it of; None = all devices of all processes.

    Raises:
        UserError: an axis is missing or unknown, or the sizes do not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dict(axes)
    if DATA not in sizes or set(sizes) - {DATA, FSDP} or list(sizes.values()).count(-1) > 1:
        raise UserError(
            f"config.mesh = {sizes}: expected an axis named 'data', perhaps one named 'fsdp', and "
            "at most one size of -1"
        )
    known = math.prod(n for n in sizes.values() if n != -1)
    for name, size in sizes.items():
        if size == -1 and known > 0:
            sizes[name] = len(devices) // known
    names = tuple(name for name in (DATA, FSDP) if name in sizes)
    shape, slices = tuple(sizes[name] for name in names), _count_slices(devices)
    if min(shape) < 1 or math.prod(shape) != len(devices) or sizes[DATA] % slices:
        in_slices = f" in {slices} slices, which share out 'data'" if slices > 1 else ""
        fitting = [n for n in range(1, len(devices) + 1) if len(devices) // slices % n == 0]
        raise UserError(
            f"config.mesh = {dict(axes)} does not fit the {len(devices)} devices here{in_slices}: "
            "expected data x fsdp = "
            + ", ".join(f"{len(devices) // n} x {n}" for n in fitting)
            + " (-1 = the rest)"
        )
    return Mesh(_lay_out(shape, devices, slices), names, axis_types=(AxisType.Auto,) * len(names))


def _count_slices(devices: Sequence[jax.Device]) -> int:
    """Counts the TPU slices that devices belong to.

    JAX calls each host of GPUs a slice too. They need no such care: their fabric takes any mesh,
    and JAX puts those of a host next to each other.

    Raises:
        UserError: the slices are not equally large.
    """
    found = collections.Counter(
        getattr(device, "slice_index", 0) if device.platform == "tpu" else 0 for device in devices
    )
    if len(set(found.values())) > 1:
        raise UserError(
            f"the TPU slices have {', '.join(map(str, found.values()))} devices: expected as many "
            "in each"
        )
    return len(found)


def _lay_out(shape: tuple[int, ...], devices: Sequence[jax.Device], slices: int) -> np.ndarray:
    """Arranges devices in the shape of a mesh.

    Raises:
        UserError: they do not fill a box of each slice, so that JAX cannot tell their links.
    """
    try:
        if slices == 1:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        data, *others = shape
        return mesh_utils.create_hybrid_device_mesh(
            (data // slices, *others),
            (slices, *(1 for _ in others)),
            devices,
            allow_split_physical_axes=True,
        )
    except AssertionError as error:
        raise UserError(
            f"no mesh can be made of the {len(devices)} devices here: expected one device per TPU "
            f"chip, and chips that fill a box in each slice. JAX says: {str(error)[:200]}"
        ) from error


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding in which every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its leading axis is split over all devices."""
    return NamedSharding(mesh, _row_spec(mesh))


def mesh_of(x: jax.Array | jax.ShapeDtypeStruct) -> Mesh:
    """Returns the mesh that an array (or an abstract one) is placed on."""
    placed = x.sharding
    assert isinstance(placed, NamedSharding) and isinstance(placed.mesh, Mesh)
    return placed.mesh


def tree_shardings(tree: Any, stacked: Collection[str], mesh: Mesh) -> Any:
    """Returns shardings of parameters, optimiser state or both, one per (abstract) array.

    Args:
        tree: arrays whose path ends in their parameter's name, as in a TrainState.
        stacked: names of the parameters that have a leading layer axis, which is never sharded.
        mesh: devices.
    """

    def place(path: tuple, x: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        layers = int(getattr(path[-1], "key", None) in stacked)
        return NamedSharding(
            mesh, PartitionSpec(*[None] * layers, *_slice_spec(x.shape[layers:], mesh))
        )

    return jax.tree_util.tree_map_with_path(place, tree)


def _row_spec(mesh: Any) -> PartitionSpec:
    return PartitionSpec(tuple(axis for axis in (DATA, FSDP) if axis in mesh.shape))


def _slice_spec(shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """Shards one layer's parameter along its longest axis that the fsdp axis divides."""
    parts = mesh.shape.get(FSDP, 1)
    divisible = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or math.prod(shape) < LEAST_SLICED or not divisible:
        return PartitionSpec()
    longest = max(divisible, key=lambda axis: shape[axis])
    return PartitionSpec(*[None] * longest, FSDP)


#### Inside a compiled function: shardings of intermediate results.


def on_mesh(mesh: Mesh) -> contextlib.AbstractContextManager:
    """Makes the constraints below refer to this mesh while a function is traced."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def _constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty or mesh.size == 1 else jax.lax.with_sharding_constraint(x, spec)


def shard_rows(tree: Any) -> Any:
    """Constrains arrays to be split by rows, as the batch is. Without a mesh, nothing happens."""
    mesh = jax.sharding.get_abstract_mesh()
    return tree if mesh.empty else jax.tree.map(lambda x: _constrain(x, _row_spec(mesh)), tree)


def replicate(tree: Any) -> Any:
    """Constrains arrays to be whole on every device. Without a mesh, nothing happens."""
    return jax.tree.map(lambda x: _constrain(x, PartitionSpec()), tree)


def all_gather(tree: Any) -> Any:
    """Gathers the sharded parameters of one layer; their gradients are reduce-scattered."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get(FSDP, 1) == 1:
        return tree
    return jax.tree.map(lambda x: _whole(x, _slice_spec(x.shape, mesh)), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _whole(x: jax.Array, slices: PartitionSpec) -> jax.Array:
    return _constrain(x, PartitionSpec())


def _whole_forward(x: jax.Array, slices: PartitionSpec) -> tuple[jax.Array, None]:
    return _whole(x, slices), None


def _whole_backward(slices: PartitionSpec, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # A constraint's own transpose would ask for the whole gradient on every device.
    return (_constrain(gradient, slices),)


_whole.defvjp(_whole_forward, _whole_backward)


def check_batch_size(name: str, batch_size: int, mesh: Mesh) -> None:
    """Raises UserError unless the global batch divides over the devices."""
    if batch_size <= 0 or batch_size % mesh.size:
        above = max(1, -(-batch_size // mesh.size)) * mesh.size
        raise UserError(
            f"config.{name} = {batch_size} does not divide over the {mesh.size} devices of the "
            f"mesh: expected a multiple of {mesh.size}, say {above}"
        )


def check_batch_sizes(config: Mapping[str, Any], mesh: Mesh) -> None:
    """Raises UserError unless every batch that a run's config names divides over the devices."""
    for key in ("batch_size", "eval_batch_size"):
        check_batch_size(key, config[key], mesh)
    if config["micro_batch"]:
        check_batch_size("micro_batch", config["micro_batch"], mesh)


@functools.cache
def process_rows(mesh: Mesh, count: int, process: int | None = None) -> np.ndarray:
    """Returns which rows of a global batch the devices of a process hold, int [rows], ascending.

    They are in general neither one block nor the process's part of as many as there are
    processes (see `make_mesh`).

    Args:
        mesh: devices.
        count: rows of the global batch, a multiple of the devices.
        process: None = this one.
    """
    process = jax.process_index() if process is None else process
    held = np.zeros(count, bool)
    for device, rows in batch_sharding(mesh).devices_indices_map((count,)).items():
        if device.process_index == process:
            held[rows] = True
    found = np.flatnonzero(held)
    found.setflags(write=False)  # all callers share it
    return found


def global_array(host: np.ndarray, placed: Sharding, rows: np.ndarray | None = None) -> jax.Array:
    """Makes a global array of host arrays, in which an element's place is its own index.

    Each device gets what its index in the global array says, whichever process it belongs to. All
    that goes from hosts to devices goes this way: where it were the process's number that
    decides, arrays would come out permuted on a TPU slice, and nothing would tell. A transfer
    guard lets them pass.

    Args:
        host: the whole array, the same on every process; or some rows of it.
        placed: sharding of the result, with `rows` that of a batch.
        rows: which rows of the global array `host` has, if not all: those of `process_rows`.
    """
    if rows is None:
        # Copies: a CPU's devices may use host memory as it is, and what shares memory with another
        # array cannot be donated.
        return _make_array(host.shape, placed, lambda index: np.array(host[index]))
    each = len(rows) // len(placed.addressable_devices)

    def read(index: Any) -> np.ndarray:
        first = np.searchsorted(rows, index[0].start or 0)
        return host[first : first + each]

    return _make_array((each * placed.num_devices, *host.shape[1:]), placed, read)


def _make_array(shape: tuple[int, ...], placed: Sharding, read: Callable) -> jax.Array:
    with jax.transfer_guard_host_to_device("allow"):  # JAX counts this one as implicit
        return jax.make_array_from_callback(shape, placed, read)


def even_size(count: int, most: int, multiple: int) -> int:
    """Returns the size of equal batches, as few as there must be, that are hardly padded.

    Args:
        count: rows in all, at least 1.
        most: rows of a batch, before rounding up.
        multiple: what the size must divide by, such as the number of devices.
    """
    batches = -(-count // most)
    return -(-count // (batches * multiple)) * multiple


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Puts this process's rows of a global batch (`process_rows`) on its devices."""
    count = len(batch.index) * mesh.size // len(mesh.local_devices)
    placed, rows = batch_sharding(mesh), process_rows(mesh, count)
    return jax.tree.map(
        lambda host: global_array(np.asarray(host), placed, rows),
        batch._replace(caption_index=None),
    )


def host_rows(array: jax.Array) -> np.ndarray:
    """Returns the rows of a batch on the mesh that this process's devices hold (`process_rows`).

    Args:
        array: [count, ...], sharded as `batch_sharding` says.
    """
    held = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in held])


def put_rows(rows: np.ndarray, count: int, mesh: Mesh) -> jax.Array:
    """Puts a host array that every process holds whole on the mesh, split by rows.

    Args:
        rows: [n, ...], the same on every process.
        count: rows of the global array, at least n; those beyond n are zero.
        mesh: devices.

    Returns:
        [count, ...], sharded as `batch_sharding` says.
    """
    padded = np.zeros((count, *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    return global_array(padded, batch_sharding(mesh))


def abstract_batch(shapes: Batch, mesh: Mesh) -> Batch:
    """Returns the shapes and shardings of `put_batch`'s result; nothing is copied."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda rows: jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=sharding), shapes
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
