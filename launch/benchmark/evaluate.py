"""Measures ranking a split from given embeddings, tile by tile and with the whole matrix.

The embeddings are random, of captions that resemble their own video. At the size of --matrix both
ways run, and find the same metrics but for rounding, which may swap a near pair; at the size of
--captions and --videos, the tiles alone.
Each measurement has a process of its own: "before" is its memory with the embeddings, "peak" the
most that it took, on the host; on a CPU that is the device's too.
"""

import argparse
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.benchmark import processes
from save_jax import metrics, ranking, sharding
from save_jax.batch import MAX_FRAMES
from save_jax.errors import UserError
from save_jax.models.clip import CLIPConfig
from save_jax.objectives import LossConfig
from save_jax.similarity import similarity

SCALE = 100.0  # where CLIP's training ends
NOISE = 2.0  # of a caption, as long as its video's vector: ranks of many sizes


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    for flag, default, meaning in (
        ("--captions", 200_000, "captions to rank"),
        ("--videos", 20_000, "videos to rank"),
        ("--frames", MAX_FRAMES, "frames of a video"),
        ("--dim", CLIPConfig().embed_dim, "width of the embeddings"),
    ):
        parser.add_argument(
            flag, type=int, default=default, metavar="N", help=f"{meaning} (default: %(default)s)"
        )
    parser.add_argument(
        "--local_weight",
        type=float,
        default=LossConfig().local_weight,
        metavar="W",
        help="share of the local score; 0 compares one vector a video (default: %(default)s)",
    )
    parser.add_argument(
        "--matrix",
        type=int,
        nargs=2,
        default=(10_000, 1_000),
        metavar=("CAPTIONS", "VIDEOS"),
        help="the size at which the whole matrix is measured too (default: 10000 1000)",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures everything, prints a table and a line of JSON; returns what the JSON says.

    Raises:
        UserError: a flag is out of range.
    """
    sizes = {"captions": options.captions, "videos": options.videos}
    sizes |= {"frames": options.frames, "dim": options.dim}
    captions, videos = options.matrix
    for name, size in (*sizes.items(), ("matrix", min(captions, videos))):
        if size < 1:
            raise UserError(f"--{name}={size}: expected --{name} of at least 1")
    if not 0 <= options.local_weight <= 1:
        raise UserError(f"--local_weight={options.local_weight}: expected 0 to 1")
    shape, weight = (options.frames, options.dim), options.local_weight
    found = {
        way.__name__: processes.in_own_process(measure, way, captions, videos, *shape, weight)
        for way in (whole_matrix, by_tiles)
    }
    one, other = (way["metrics"] for way in found.values())
    difference = max(
        abs(one[side][key] - other[side][key]) for side in ("t2v", "v2t") for key in one[side]
    )
    large = processes.in_own_process(
        measure, by_tiles, options.captions, options.videos, *shape, weight
    )
    result = {
        **sizes,
        "local_weight": weight,
        "matrix": {"captions": captions, "videos": videos, **found, "difference": difference},
        "by_tiles": large,
    }
    print(f"{'captions × videos':<24}{'way':<14}{'seconds':>9}{'before':>13}{'peak':>12}")
    rows = [(captions, videos, *item) for item in found.items()]
    for n, m, way, took in [*rows, (options.captions, options.videos, "by_tiles", large)]:
        print(
            f"{f'{n:,} × {m:,}':<24}{way.replace('_', ' '):<14}{took['seconds']:>9.1f}"
            f"{took['memory_before']:>9.0f} MiB{took['memory_peak']:>8.0f} MiB"
        )
    print(f"the metrics of both ways differ by up to {difference:.1e}")
    print(json.dumps(result))
    return result


def measure(
    way: Any, captions: int, videos: int, frames: int, dim: int, local_weight: float
) -> dict[str, Any]:
    """Returns the seconds, the memory in MiB and the metrics of a way to rank."""
    split = embeddings(captions, videos, frames, dim)

    def score(scale: jax.Array, text: jax.Array, video: tuple) -> jax.Array:
        return similarity(text, *video, scale, local_weight)

    jax.devices()  # the start of the backend is no part of it
    before, started = processes.memory("VmRSS"), time.monotonic()
    result = way(score, *split)
    seconds = time.monotonic() - started
    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "seconds": seconds,
        "memory_before": before,
        "memory_peak": processes.memory("VmHWM"),
        "metrics": result,
    }


def embeddings(
    captions: int, videos: int, frames: int, dim: int
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Returns random captions, (frames, mask) of videos, and the row of each caption's video."""
    rng = np.random.default_rng(0)
    unit = rng.standard_normal((videos, frames, dim), np.float32)
    mask = np.arange(frames) < rng.integers(1, frames + 1, videos)[:, None]
    own = rng.integers(0, videos, captions).astype(np.int32)
    text = rng.standard_normal((captions, dim), np.float32)
    text *= NOISE
    for first in range(0, captions, 4096):  # in pieces, because memory is what is measured
        text[first : first + 4096] += unit[own[first : first + 4096], 0]
    return text, (unit, mask), own


def by_tiles(score: ranking.Score, text: np.ndarray, video: tuple, own: np.ndarray) -> dict:
    """Ranks as an evaluation does."""
    ranker = ranking.Ranker(score, sharding.make_mesh({sharding.DATA: -1}))
    ranks = ranker.rank(np.float32(SCALE), text, video, own)
    return metrics.of_ranks(ranks.t2v, ranks.v2t[ranks.v2t >= 0], [""] * len(own))


def whole_matrix(score: ranking.Score, text: np.ndarray, video: tuple, own: np.ndarray) -> dict:
    """Ranks by the definition, in a matrix of all similarities."""
    scale, tile = jnp.float32(SCALE), ranking.CAPTIONS_AT_ONCE
    videos, compiled = jax.device_put(video), jax.jit(score)
    parts = [
        np.asarray(compiled(scale, text[first : first + tile], videos))
        for first in range(0, len(text), tile)
    ]
    return metrics.retrieval_metrics(np.concatenate(parts), own, [""] * len(own))
