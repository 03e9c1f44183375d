"""Similarity against the reference (spec section 5), and where it must not break."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from save_jax import similarity
from tests.support import reference


def data(captions=5, videos=4, frames=6, dim=16, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.arange(frames) < rng.integers(1, frames + 1, videos)[:, None]
    mask[0] = np.arange(frames) < 1  # a single frame
    text = rng.normal(size=(captions, dim)).astype(np.float32)
    return text, rng.normal(size=(videos, frames, dim)).astype(np.float32), mask


def ours(text, frames, mask, scale, *args):
    arrays = map(jnp.array, (text, frames, mask, np.float32(scale)))
    return np.asarray(similarity.similarity(*arrays, *args))


@pytest.mark.parametrize("local_weight", [0.5, 0.0, 1.0])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_equals_the_reference(scale, local_weight):
    text, frames, mask = data()
    expected = reference.similarity(
        torch.tensor(text).double(),
        torch.tensor(frames).double(),
        torch.tensor(mask),
        torch.tensor(scale),
        local_weight,
    )
    result = ours(text, frames, mask, scale, local_weight)
    assert result.shape == (5, 4)
    np.testing.assert_allclose(result, expected, atol=1e-5 * max(scale, 1))


def test_by_hand():
    """One caption, one video of two real frames: cosines 1 and 0, their mean's cosine 1/√2."""
    text = np.array([[2.0, 0.0]], np.float32)
    frames = np.array([[[3.0, 0.0], [0.0, 0.5], [9.0, 9.0]]], np.float32)
    mask = np.array([[True, True, False]])
    expected = (np.log(np.exp(4) + 1) + 4 / np.sqrt(2)) / 2
    np.testing.assert_allclose(ours(text, frames, mask, 4.0), [[expected]], rtol=1e-6)


def test_padding_frames_and_their_number_are_immaterial():
    text, frames, mask = data()
    other = np.where(mask[..., None], frames, 1e3).astype(np.float32)
    more = np.pad(other, ((0, 0), (0, 3), (0, 0)), constant_values=-5)
    result = ours(text, frames, mask, 100.0)
    np.testing.assert_array_equal(ours(text, other, mask, 100.0), result)
    longer = ours(text, more, np.pad(mask, ((0, 0), (0, 3))), 100.0)
    np.testing.assert_allclose(longer, result, rtol=1e-6)


def test_frames_are_a_set_and_lengths_are_immaterial():
    text, frames, mask = data()
    result = ours(text, frames, mask, 14.0)
    np.testing.assert_allclose(ours(text, frames[:, ::-1], mask[:, ::-1], 14.0), result, atol=1e-5)
    np.testing.assert_allclose(ours(3 * text, 0.01 * frames, mask, 14.0), result, atol=1e-5)


@pytest.mark.parametrize("local_weight", [0.5, 0.0])
def test_a_video_without_frames_scores_below_all_and_breaks_nothing(local_weight):
    text, frames, mask = data()
    mask[2] = False

    def score(text, frames):
        return similarity.similarity(text, frames, jnp.array(mask), jnp.float32(100), local_weight)

    result = np.asarray(score(jnp.array(text), jnp.array(frames)))
    assert np.isfinite(result).all()
    if local_weight:
        assert (result[:, 2:3] < np.delete(result, 2, axis=1)).all()
    gradients = jax.grad(lambda t, f: score(t, f)[:, [0, 1, 3]].sum(), argnums=(0, 1))(
        jnp.array(text), jnp.array(frames)
    )
    for gradient in gradients:
        assert np.isfinite(gradient).all()
    assert not gradients[1][~mask].any()


def test_normalise_is_safe_at_zero():
    x = jnp.array([[0.0, 0.0], [3.0, 4.0], [1e-30, 0.0]])
    np.testing.assert_allclose(similarity.normalise(x)[1], [0.6, 0.8], rtol=1e-6)
    assert np.isfinite(similarity.normalise(x)).all()
    assert np.isfinite(jax.grad(lambda x: similarity.normalise(x).sum())(x)).all()


def test_bfloat16_embeddings_are_scored_in_float32():
    text, frames, mask = data(dim=512)
    half = [jnp.array(x, jnp.bfloat16) for x in (text, frames)]
    result = similarity.similarity(*half, jnp.array(mask), jnp.float32(100))
    assert result.dtype == jnp.float32
    rounded = [np.asarray(x, np.float32) for x in half]
    np.testing.assert_allclose(result, ours(*rounded, mask, 100.0), atol=1e-4)
