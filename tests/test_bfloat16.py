"""What computing in bfloat16 costs: the similarity, and who comes first."""

import jax
import jax.numpy as jnp
import numpy as np

from save_jax import parameters as params
from save_jax.similarity import similarity
from tests.support import small

CLIPS, QUERIES, FRAMES, WIDTH = 500, 1000, 12, 512
SCALE = jnp.float32(100)  # where training ends


def test_similarity_of_the_same_inputs():
    """Within 2e-2 × scale of float32, with the whole model in bfloat16."""
    _, graphdef, ours = small.pair()
    half, _ = small.abstract(small.config(dtype="bfloat16"))
    batch = small.batch(clips=12)

    def score(graphdef):
        @jax.jit
        def run(parameters, batch):
            text, video = params.merge(graphdef, parameters)(batch)
            return similarity(text, video.fused, video.mask, SCALE)

        return np.asarray(run(ours, batch))

    full = score(graphdef)
    error = np.abs(score(half) - full).max() / SCALE
    print(f"largest error: {error:.1e} × scale")
    assert 0 < error < 2e-2
    assert np.ptp(full) / SCALE > 5e-2  # the scores themselves are not all alike


def test_the_same_clip_comes_first():
    """For 99 % of 1,000 queries on embeddings that are well apart."""
    rng = np.random.default_rng(0)
    frames = rng.normal(size=(CLIPS, 1, WIDTH)) + 0.5 * rng.normal(size=(CLIPS, FRAMES, WIDTH))
    target = rng.integers(CLIPS, size=QUERIES)
    text = frames[target].mean(axis=1) + 2 * rng.normal(size=(QUERIES, WIDTH))
    mask = np.arange(FRAMES) < rng.integers(1, FRAMES + 1, CLIPS)[:, None]
    score = jax.jit(similarity)
    first = [
        np.asarray(score(*(jnp.array(x, dtype) for x in (text, frames)), mask, SCALE)).argmax(1)
        for dtype in (jnp.float32, jnp.bfloat16)
    ]
    assert np.mean(first[0] == target) > 0.9  # the task is neither trivial nor hopeless
    assert np.mean(first[0] == first[1]) >= 0.99
