"""The mesh, and batches on it."""

import jax
import numpy as np
import pytest

from save_jax import sharding
from save_jax.errors import UserError
from tests.support import synthetic


def test_minus_one_takes_the_remaining_devices():
    assert sharding.make_mesh({"data": -1}).shape == {"data": 8}
    assert sharding.make_mesh({"data": -1, "fsdp": 2}).shape == {"data": 4, "fsdp": 2}


@pytest.mark.parametrize(
    "axes",
    [
        {"data": 3},
        {"fsdp": 8},
        {"data": -1, "fsdp": -1},
        {"data": -1, "model": 2},
        {"data": -2, "fsdp": -4},
        {"data": 0, "fsdp": -1},
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(axes):
    with pytest.raises(UserError, match=r"config\.mesh"):
        sharding.make_mesh(axes)


@pytest.mark.parametrize(("size", "better"), [(12, 16), (0, 8), (-4, 8), (1, 8)])
def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(size, better):
    with pytest.raises(UserError, match=f"multiple of 8, say {better}"):
        sharding.check_batch_size("batch_size", size, sharding.make_mesh({"data": -1}))
    sharding.check_batch_size("batch_size", better, sharding.make_mesh({"data": -1}))


def test_batches_are_split_by_rows_and_arrive_in_order():
    mesh = sharding.make_mesh({"data": -1})
    batches = [synthetic.clips(seed, 16)._replace(fbank=None) for seed in range(5)]
    seen = list(sharding.prefetch(batches, mesh))
    assert len(seen) == 5
    for original, (host, device) in zip(batches, seen, strict=True):
        assert host is original and device.fbank is None
        np.testing.assert_array_equal(device.frames, original.frames)
        assert {s.data.shape[0] for s in device.frames.addressable_shards} == {2}


def test_a_batch_that_does_not_divide_is_not_cut():
    mesh = sharding.make_mesh({"data": -1})
    with pytest.raises(ValueError, match="partitioned 8 times"):
        sharding.put_batch(synthetic.clips(0, 12), mesh)


def test_prefetch_stays_ahead_and_no_further():
    drawn = []

    def source():
        for seed in range(6):
            drawn.append(seed)
            yield synthetic.clips(seed, 8)

    batches = sharding.prefetch(source(), sharding.make_mesh({"data": -1}, jax.devices()[:1]))
    next(batches)
    assert drawn == [0, 1]
    next(batches)
    assert drawn == [0, 1, 2]
