"""Meshes of TPU slices, one and two, from libtpu's own descriptions of their chips."""

import collections
import functools
import math
import platform
import re
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from jax.experimental import topologies

from launch.compile import program as compile_
from save_jax import sharding
from save_jax.errors import UserError
from tests.support import system

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="libtpu exists for Linux on x86-64 only",
)
FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x4x12", "4x8x8", "4x4x16")
SHAPES = {"v4": CUBES, "v5e": FLAT, "v5p": CUBES, "v6e": FLAT}
ONE = [(f"{kind}:{shape}", 1) for kind, shapes in SHAPES.items() for shape in shapes]
# Two slices, of 4 to 256 chips together.
TWO = [(name, 2) for name, _ in ONE if math.prod(map(int, name.split(":")[1].split("x"))) <= 128]


@pytest.fixture(autouse=True)
def libtpu_environment(monkeypatch):
    system.use_libtpu(monkeypatch)


@functools.cache
def chips(name: str, slices: int = 1) -> list[jax.Device]:
    """The chips of slices as JAX describes them: coordinates, hosts, and the slice if several."""
    if slices == 1:
        return list(compile_.find_target(name).devices)
    options = {"chip_config_name": "megacore"} if name.startswith("v4") else {}
    return topologies.get_topology_desc(
        platform="tpu", topology_name=name, num_slices=slices, **options
    ).devices


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def box(devices) -> int:
    """How many chips there are from the least to the greatest coordinates."""
    coordinates = np.array([device.coords for device in devices])
    return int(np.prod(np.ptp(coordinates, axis=0) + 1))


@pytest.mark.parametrize(("name", "slices"), ONE + TWO)
def test_every_mesh_that_divides_the_chips_is_made(name, slices):
    devices = chips(name, slices)
    count, hosts = len(devices), len({device.process_index for device in devices})
    for fsdp in divisors(count // slices):
        mesh = sharding.make_mesh({"data": count // fsdp, "fsdp": fsdp}, devices)
        assert mesh.axis_names == ("data", "fsdp") and mesh.devices.shape == (count // fsdp, fsdp)
        order = list(mesh.devices.flat)
        assert set(order) == set(devices)
        # A layer is gathered within a slice, over chips that are next to each other.
        for group in mesh.devices:
            assert len({getattr(chip, "slice_index", 0) for chip in group}) == 1
            assert box(group) == fsdp
        # The k-th chip of the mesh holds the k-th rows of a batch; a host holds those of its chips.
        for host in range(hosts):
            own = [k for k, chip in enumerate(order) if chip.process_index == host]
            expected = [row for k in own for row in (3 * k, 3 * k + 1, 3 * k + 2)]
            assert sharding.process_rows(mesh, 3 * count, host).tolist() == expected
        assert sharding.make_mesh({"data": -1, "fsdp": fsdp}, devices) == mesh
        assert sharding.make_mesh({"fsdp": fsdp, "data": -1}, devices) == mesh


@pytest.mark.parametrize(("name", "slices"), ONE + TWO)
def test_every_other_mesh_is_refused_with_those_that_can_be(name, slices):
    devices = chips(name, slices)
    count = len(devices)
    fitting = {(count // fsdp, fsdp) for fsdp in divisors(count // slices)}
    sizes = {-8, 0, 3, 5, 7, *divisors(2 * count)}
    refused = 0
    for data, fsdp in ((data, fsdp) for data in sizes for fsdp in sizes):
        if (data, fsdp) in fitting:
            continue
        with pytest.raises(UserError, match="does not fit") as error:
            sharding.make_mesh({"data": data, "fsdp": fsdp}, devices)
        said = re.findall(r"(\d+) x (\d+)", str(error.value))
        assert {(int(one), int(other)) for one, other in said} == fitting
        refused += 1
    assert refused > 2 * len(fitting)
    assert ("2 slices" in str(error.value)) == (slices == 2)


@pytest.mark.parametrize(
    ("name", "owners"),
    [
        ("v4:2x2x2", [0, 1, 0, 1, 0, 1, 0, 1]),
        ("v5e:4x4", [0, 0, 1, 1, 1, 1, 0, 2, 3, 3, 3, 3, 2, 2, 2, 0]),
    ],
)
def test_rows_are_not_in_the_order_of_the_processes(name, owners):
    mesh = sharding.make_mesh({"data": -1}, chips(name))
    assert [device.process_index for device in mesh.devices.flat] == owners
    for process in set(owners):
        expected = [row for row, owner in enumerate(owners) if owner == process]
        assert sharding.process_rows(mesh, len(owners), process).tolist() == expected


@pytest.mark.parametrize(("name", "slices"), ONE + TWO)
def test_a_host_has_a_mesh_of_its_own_chips(name, slices):
    """As the teacher of preparation wants it; and all chips come host by host, in order.

    On the latter rests `multihost_utils.broadcast_one_to_all`, which makes a mesh of its own.
    """
    devices = chips(name, slices)
    hosts = [device.process_index for device in devices]
    assert hosts == sorted(hosts) and len(set(collections.Counter(hosts).values())) == 1
    for host in sorted(set(hosts)):
        own = [device for device in devices if device.process_index == host]
        assert set(sharding.make_mesh({"data": -1}, own).devices.flat) == set(own)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (lambda: chips("v5e:4x4")[:-1], "15 devices here: expected .* fill a box"),
        (lambda: chips("v4:2x2x2", 2)[:-4], "slices have 8, 4 devices: expected as many in each"),
    ],
)
def test_chips_that_make_no_mesh_are_refused(devices, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh({"data": -1}, devices())


def gpu(number: int) -> jax.Device:
    """One of eight GPUs on a host, as JAX describes them since 0.10."""
    device = mock.Mock(spec=jax.Device, platform="gpu", device_kind="NVIDIA H100", id=number)
    device.process_index = device.slice_index = number // 8
    return device


def test_hosts_of_gpus_take_any_mesh():
    """JAX calls each of them a slice, and `jax.make_mesh` refuses several."""
    # Ids are in the order of the fabric, whatever that of the processes.
    gpus = [gpu(number) for number in (*range(8, 16), *range(8))]
    for fsdp in divisors(16):
        laid_out = sharding._lay_out((16 // fsdp, fsdp), gpus, sharding._count_slices(gpus))
        assert [device.id for device in laid_out.flat] == list(range(16))
