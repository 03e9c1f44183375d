"""Maps a function over micro-batches, rematerialising activations in the backward pass.

`map_blocks` runs one block after the other and keeps only results; in the backward pass it computes
each block again. With an encoder as the function this is gradient caching (Gao et al. 2021,
arXiv 2101.06983): a batch of any size costs the memory of one block and of all results, and the
gradient is that of the whole batch. With a similarity as the function, no matrix over all pairs is
ever held.
"""

from collections.abc import Callable
from typing import Any

import jax

from save_jax import sharding

Tree = Any  # a pytree of arrays that share their leading axis


def map_blocks(f: Callable[[Tree], Tree], rows: Tree, blocks: int) -> Tree:
    """Applies `f` to equal blocks of rows; the results are stacked along a new leading axis.

    Block k holds the rows k, k + blocks, k + 2·blocks, …: when the rows are sharded in
    contiguous parts, every device has its share of every block and no row is moved.

    Args:
        f: from a block [n / blocks, ...] to any results.
        rows: arrays [n, ...].
        blocks: how many; must divide n. With 1, `f` runs on all rows, and nothing is recomputed.

    Raises:
        ValueError: the blocks would not be equal.
    """
    if blocks == 1:
        return jax.tree.map(lambda x: x[None], f(rows))
    block_by_block = jax.checkpoint(lambda block: f(sharding.shard_rows(block)))
    return jax.lax.map(block_by_block, jax.tree.map(lambda x: _split(x, blocks), rows))


def join(results: Tree) -> Tree:
    """Puts results per row, [blocks, n / blocks, ...], into the order of the rows, [n, ...]."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), results)


def fewest_blocks(rows: int, shards: int, most: int) -> int:
    """Returns the fewest equal blocks with at most `most` rows per shard, or one row each.

    Args:
        rows: all rows, a multiple of `shards`.
        shards: devices that the rows are spread over.
        most: rows of a block on one device.
    """
    share = rows // shards
    return next(n for n in range(1, share + 1) if share % n == 0 and share // n <= max(most, 1))


def _split(x: jax.Array, blocks: int) -> jax.Array:
    if len(x) % blocks:
        raise ValueError(f"{len(x)} rows do not divide into {blocks} equal blocks")
    return x.reshape(-1, blocks, *x.shape[1:]).swapaxes(0, 1)
