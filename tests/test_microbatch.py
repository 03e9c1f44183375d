"""Work in blocks: the same results and gradients as at once, in the order of the rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from save_jax import microbatch


def test_blocks_are_strided_and_joined_in_order():
    rows = {"a": jnp.arange(12.0), "b": jnp.arange(24).reshape(12, 2)}
    seen = microbatch.map_blocks(lambda block: block, rows, 3)
    np.testing.assert_array_equal(seen["a"], [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]])
    jax.tree.map(np.testing.assert_array_equal, microbatch.join(seen), rows)


def test_one_block_is_all_rows():
    np.testing.assert_array_equal(
        microbatch.map_blocks(lambda x: 2 * x, jnp.arange(3), 1), [[0, 2, 4]]
    )


def test_the_gradient_is_that_of_all_rows_at_once():
    weights = jax.random.normal(jax.random.key(0), (5, 4))
    rows = jax.random.normal(jax.random.key(1), (12, 5))

    def loss(weights, count):
        encoded = microbatch.join(
            microbatch.map_blocks(lambda x: jnp.tanh(x @ weights), rows, count)
        )
        return jax.nn.logsumexp(encoded @ encoded.T)  # every row meets every other

    expected = jax.grad(loss)(weights, 1)
    for count in (2, 12):
        np.testing.assert_allclose(jax.grad(loss)(weights, count), expected, rtol=1e-5)


def test_unequal_blocks_are_refused():
    with pytest.raises(ValueError, match="10 rows do not divide into 4"):
        microbatch.map_blocks(lambda x: x, jnp.arange(10), 4)


@pytest.mark.parametrize(
    ("rows", "shards", "most", "expected"),
    [(128, 1, 1000, 1), (128, 1, 64, 2), (128, 8, 10, 2), (96, 8, 5, 3), (24, 8, 0, 3)],
)
def test_the_fewest_blocks_that_fit(rows, shards, most, expected):
    assert microbatch.fewest_blocks(rows, shards, most) == expected
