"""Ranks of a split's captions and videos, counted on the devices tile by tile (spec section 9).

The similarity matrix is never whole. One compiled function scores a tile of captions with a tile of
videos; others count in its result. Captions and videos are sharded over all devices: of a tile,
each device gathers the captions and scores them with its own videos. Host memory grows with the
captions plus the videos, not with their product.

A score is compared with those of its own tile: all come out of one program, so that equal pairs
tie, and rounding decides nothing.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Bool, Int

from save_jax import metrics, sharding
from save_jax.progress import Progress

# The most of a tile on one device: 50 MB of scores per frame, at 12 frames.
CAPTIONS_AT_ONCE, VIDEOS_AT_ONCE = 512, 2048
# Tiles are multiples of this in both directions, as accelerators compute them: at the edge of other
# sizes a kernel may add up in another order, and equal pairs would not tie.
MULTIPLE = 128
BEST = 10  # videos that are named for each caption

# (weights, captions, videos) -> [captions, videos]; each is a pytree, of arrays whose first axis is
# captions or videos in the last two.
Score = Callable[[Any, Any, Any], jax.Array]
# Takes a tile of scores: the rows of its captions, the first row of its videos, and the scores,
# replicated and padded at their ends.
Keep = Callable[[np.ndarray, int, jax.Array], None]

Array = Any  # on a device, or on the way there from the host

_NO_VIDEO, _NO_CAPTION = -1, -2  # rows of padding, which equal no row and not each other


class Ranks(NamedTuple):
    """Ranks from 0; ties count against the model. Rows are those of the split.

    Attributes:
        t2v: int32 [captions], of each caption's own video among all videos.
        own: float32 [captions], the score of that video.
        best: int32 [captions, up to BEST], the videos that score highest, the best first; of
            equal ones, the lower row first.
        best_scores: float32 [captions, up to BEST], their scores.
        v2t: int32 [videos], of each video's own captions among the captions of all videos, of
            which each video's best counts; -1 for a video without captions.
    """

    t2v: np.ndarray
    own: np.ndarray
    best: np.ndarray
    best_scores: np.ndarray
    v2t: np.ndarray


class _Captions(NamedTuple):
    """A tile of captions, sorted by their own video; replicated."""

    column: Array  # int32 [captions], row of the own video; _NO_CAPTION for padding
    own: Array  # float32 [captions], its score


class _Videos(NamedTuple):
    """A tile of videos; sharded."""

    row: Array  # int32 [videos]; _NO_VIDEO for padding
    own: Array  # float32 [videos], the best score of its own captions; infinite without any


class _Found(NamedTuple):
    """What the tiles so far say of a tile's captions; replicated."""

    rank: Array  # int32 [captions]
    scores: Array  # float32 [captions, best]
    videos: Array  # int32 [captions, best]
    broken: Array  # int32, scores that are not finite


class _Beaten(NamedTuple):
    """What the captions so far say of a tile's videos; sharded, but for the last."""

    rank: Array  # int32 [videos], other videos that have a caption as good as the own ones
    open: Array  # bool [videos], whether the last caption's video is counted in it already
    last: Array  # int32, row of that video, whose captions may go on in the next tile


class Ranker:
    """The compiled functions that rank, for one score on one mesh.

    Args:
        score: of a tile, traceable; see `Score`.
        mesh: devices.
        captions_at_once: the most captions of a tile.
        videos_at_once: the most videos of a tile on each device.
        multiple: sizes of tiles are multiples of it.
    """

    def __init__(
        self,
        score: Score,
        mesh: Mesh,
        *,
        captions_at_once: int = CAPTIONS_AT_ONCE,
        videos_at_once: int = VIDEOS_AT_ONCE,
        multiple: int = MULTIPLE,
    ):
        self._mesh, self._multiple = mesh, multiple
        self._captions_at_once, self._videos_at_once = captions_at_once, videos_at_once
        axes = mesh.axis_names
        everywhere, rows = PartitionSpec(), sharding.batch_sharding(mesh).spec
        columns = PartitionSpec(None, *rows)

        def gather(x: jax.Array, axis: int = 0) -> jax.Array:
            return jax.lax.all_gather(x, axes, axis=axis, tiled=True)

        def score_tile(weights: Any, captions: Any, videos: Any) -> jax.Array:
            return score(weights, jax.tree.map(gather, captions), videos)

        def own_scores(scores: jax.Array, column: jax.Array, row: jax.Array) -> jax.Array:
            own = column[:, None] == row
            # One term at most is not 0, so that the sum is that score, bit by bit.
            return jax.lax.psum(jnp.where(own, scores, 0).sum(axis=1), axes)

        def count(
            scores: jax.Array, captions: _Captions, videos: _Videos, found: _Found, beaten: _Beaten
        ) -> tuple[_Found, _Beaten]:
            real = (captions.column[:, None] >= 0) & (videos.row >= 0)
            other = real & (captions.column[:, None] != videos.row)
            ahead = (other & (scores >= captions.own[:, None])).sum(axis=1)
            broken = (real & ~jnp.isfinite(scores)).sum()
            best, at = jax.lax.top_k(
                jnp.where(real, scores, -jnp.inf), min(found.scores.shape[1], len(videos.row))
            )
            # In ascending order of rows, of which `top_k` prefers the lower.
            best = jnp.concatenate([found.scores, gather(best, axis=1)], axis=1)
            named = jnp.concatenate([found.videos, gather(videos.row[at], axis=1)], axis=1)
            best, at = jax.lax.top_k(best, found.scores.shape[1])
            return _Found(
                found.rank + jax.lax.psum(ahead, axes),
                best,
                jnp.take_along_axis(named, at, axis=1),
                found.broken + jax.lax.psum(broken, axes),
            ), _beat(other & (scores >= videos.own), captions.column, beaten)

        def compile_(function: Callable, inputs: Any, outputs: Any) -> Callable:
            # Gathered results are equal on all devices, which JAX cannot see.
            return jax.jit(
                jax.shard_map(
                    function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False
                )
            )

        by_video = _Beaten(rows, rows, everywhere)
        self._score = compile_(score_tile, (everywhere, rows, rows), columns)
        self._own_scores = compile_(own_scores, (columns, everywhere, rows), everywhere)
        self._count = compile_(
            count, (columns, everywhere, rows, everywhere, by_video), (everywhere, by_video)
        )
        self._replicate = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))

    def rank(
        self,
        weights: Any,
        captions: Any,
        videos: Any,
        video_of_caption: np.ndarray,
        keep: Keep | None = None,
    ) -> Ranks:
        """Ranks all captions and videos of a split.

        Every process calls it, with the same arguments.

        Args:
            weights: what the score needs besides; replicated.
            captions: pytree of arrays of the host, [captions, …].
            videos: pytree of arrays of the host, [videos, …].
            video_of_caption: int [captions], the row of each caption's own video.
            keep: gets every tile of scores.

        Raises:
            ValueError: a score is not finite, or a caption's video is not there.
        """
        total, gallery = len(video_of_caption), len(jax.tree.leaves(videos)[0])
        metrics.check_targets(video_of_caption, gallery)
        devices = self._mesh.size
        height = sharding.even_size(
            total, self._captions_at_once, math.lcm(self._multiple, devices)
        )
        width = sharding.even_size(
            gallery, self._videos_at_once * devices, self._multiple * devices
        )
        order = np.argsort(video_of_caption, kind="stable").astype(np.int32)
        column = np.asarray(video_of_caption, np.int32)[order]
        rows = [order[first : first + height] for first in range(0, total, height)]
        tiles = [self._tile(captions, part, height) for part in rows]
        starts = range(0, gallery, width)

        def videos_from(first: int) -> Any:
            return self._tile(videos, slice(first, first + width), width)

        def row_from(first: int) -> jax.Array:
            row = np.arange(first, first + width, dtype=np.int32)
            return self._tile(np.where(row < gallery, row, _NO_VIDEO), slice(None), width)

        #### The score of each caption's own video, of the tiles that hold it.
        columns = [_padded(column[at : at + height], height) for at in range(0, total, height)]
        own = np.zeros(len(rows) * height, np.float32)
        for first in starts:
            begin, end = np.searchsorted(column, [first, first + width])
            if begin == end:
                continue
            tile, row = videos_from(first), row_from(first)
            for k in range(begin // height, -(-end // height)):
                scores = self._score(weights, tiles[k], tile)
                found = self._own_scores(scores, columns[k], row)
                own[k * height : (k + 1) * height] += np.asarray(found)

        #### What scores as much as that, among all.
        captioned = np.bincount(column, minlength=gallery) > 0
        best_own = np.where(captioned, np.float32(-np.inf), np.float32(np.inf))
        with np.errstate(invalid="ignore"):  # what is not finite is told at the end
            np.maximum.at(best_own, column, own[:total])
        sides = [
            self._everywhere(_Captions(columns[k], own[k * height : (k + 1) * height]))
            for k in range(len(rows))
        ]
        best = min(BEST, gallery)
        nothing = self._everywhere(
            _Found(
                np.zeros(height, np.int32),
                np.full((height, best), -np.inf, np.float32),
                np.full((height, best), _NO_VIDEO, np.int32),
                np.zeros((), np.int32),
            )
        )
        found = [nothing] * len(rows)
        v2t = np.zeros(gallery, np.int32)
        progress = Progress("ranking, captions × videos", total * gallery)
        for first in starts:
            tile = videos_from(first)
            side = _Videos(
                row_from(first), self._tile(best_own, slice(first, first + width), width)
            )
            beaten = self._unbeaten(width)
            for k in range(len(rows)):
                scores = self._score(weights, tiles[k], tile)
                if keep:
                    keep(rows[k], first, self._replicate(scores))
                found[k], beaten = self._count(scores, sides[k], side, found[k], beaten)
                jax.block_until_ready(found[k - 1])  # else tiles would pile up on the device
                progress.advance(len(rows[k]) * min(width, gallery - first))
            v2t[first : first + width] = np.asarray(self._replicate(beaten.rank))[: gallery - first]
        progress.close()
        return _collect(found, order, own, np.where(captioned, v2t, -1).astype(np.int32))

    def _tile(self, tree: Any, rows: Any, size: int) -> Any:
        """Puts some rows of arrays of the host on the mesh, sharded and padded to `size`."""
        return jax.tree.map(lambda x: sharding.put_rows(x[rows], size, self._mesh), tree)

    def _everywhere(self, tree: Any) -> Any:
        """Puts whole arrays of the host, the same on every process, on every device."""
        whole = sharding.replicated(self._mesh)
        return jax.tree.map(lambda x: sharding.global_array(x, whole), tree)

    def _unbeaten(self, width: int) -> _Beaten:
        none = np.zeros(width, np.int32)
        last = self._everywhere(np.array(_NO_VIDEO, np.int32))
        return _Beaten(
            self._tile(none, slice(None), width), self._tile(none > 0, slice(None), width), last
        )


def _beat(
    hit: Bool[jax.Array, "captions videos"], column: Int[jax.Array, " captions"], beaten: _Beaten
) -> _Beaten:
    """Counts, for each video, the others of which a caption hits it: each of them once.

    Args:
        hit: whether a caption, of another video, scores as much as the video's own.
        column: row of each caption's own video, so that captions of one video are neighbours.
        beaten: of the captions before; the captions of its last video may go on here.
    """
    changes = jnp.concatenate([jnp.zeros(1, jnp.int32), column[1:] != column[:-1]])
    segment = jnp.cumsum(changes)
    by_video = jax.ops.segment_max(
        hit.astype(jnp.int8), segment, len(column), indices_are_sorted=True
    )
    by_video = by_video > 0  # of a segment that does not exist, the least int8
    before = beaten.open & (column[0] == beaten.last)
    rank = beaten.rank + by_video.sum(axis=0) - (by_video[0] & before)
    return _Beaten(rank, by_video[segment[-1]] | (before & (segment[-1] == 0)), column[-1])


def _padded(column: np.ndarray, size: int) -> np.ndarray:
    return np.pad(column, (0, size - len(column)), constant_values=_NO_CAPTION)


def _collect(found: list[_Found], order: np.ndarray, own: np.ndarray, v2t: np.ndarray) -> Ranks:
    """Puts what was found of sorted captions into the split's order.

    Raises:
        ValueError: a score is not finite, where a comparison would look like a perfect rank.
    """
    total = len(order)
    tiles = [jax.tree.map(np.asarray, tile) for tile in found]
    metrics.check_finite(sum(int(tile.broken) for tile in tiles), total * len(v2t))

    def in_order(parts: list[np.ndarray]) -> np.ndarray:
        joined = np.concatenate(parts)[:total]
        placed = np.empty_like(joined)
        placed[order] = joined
        return placed

    return Ranks(
        in_order([tile.rank for tile in tiles]),
        in_order([own]),
        in_order([tile.videos for tile in tiles]),
        in_order([tile.scores for tile in tiles]),
        v2t,
    )
