"""The resampler and the gated fusion against the reference (spec sections 3 and 4)."""

import jax
import numpy as np
import pytest
import torch

from save_jax import parameters as params
from tests.support import small

WIDTH = small.SIZES.embed_dim


@pytest.fixture(scope="module")
def models():
    """The reference, our parameters, and our parts as functions of parameters and inputs."""
    theirs, graphdef, ours = small.pair()
    parts = ("audio_resampler", "audio_fusion", "speech_fusion")
    calls = {
        part: jax.jit(lambda p, *args, part=part: getattr(params.merge(graphdef, p), part)(*args))
        for part in parts
    }
    return theirs, ours, calls


def resample(models, a):
    _, ours, calls = models
    return np.asarray(calls["audio_resampler"](ours, a))


def fuse(models, x, m, name="audio_fusion", **changed):
    _, ours, calls = models
    return np.asarray(calls[name](ours | changed, x, m))


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Inputs of 1e-5 tell an epsilon of 1e-12 inside LayerNorm's root from CLIP's 1e-5.
@pytest.mark.parametrize("size", [1.0, 1e-5])
def test_resampler_equals_the_reference(models, size):
    theirs, a = models[0], size * random(2, 9, WIDTH)
    q = theirs.query_tokens.T + theirs.query_position_embeddings.weight
    expected = theirs.Audio_Resampler(q.expand(2, -1, -1), torch.tensor(a).double()).detach()
    out = resample(models, a)
    assert out.shape == (2, small.SIZES.queries, WIDTH)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_resampler_ignores_the_order_of_sound_tokens(models):
    a = random(2, 9, WIDTH)
    np.testing.assert_allclose(resample(models, a[:, ::-1]), resample(models, a), atol=1e-5)


@pytest.mark.parametrize("size", [1.0, 1e-5])
@pytest.mark.parametrize("name", ["audio_fusion", "speech_fusion"])
def test_fusion_equals_the_reference(models, name, size):
    theirs = models[0].transformerClip
    if name == "speech_fusion":
        theirs = models[0].transformerClip_ASR
    x, m = size * random(3, 4, WIDTH), random(3, 7, WIDTH, seed=1)
    expected = theirs(torch.tensor(x).double(), torch.tensor(m).double()).detach()
    out = fuse(models, x, m, name)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_fusion_ignores_the_order_of_modality_tokens(models):
    x, m = random(3, 4, WIDTH), random(3, 7, WIDTH, seed=1)
    np.testing.assert_allclose(fuse(models, x, m[:, ::-1]), fuse(models, x, m), atol=1e-5)


def test_fusion_moves_with_the_order_of_frames(models):
    """Positions are added before the fusion: inside it, frames are a set."""
    x, m = random(3, 4, WIDTH), random(3, 7, WIDTH, seed=1)
    np.testing.assert_allclose(fuse(models, x[:, ::-1], m), fuse(models, x, m)[:, ::-1], atol=1e-5)


def test_closed_gates_keep_the_modality_out(models):
    ours = models[1]
    closed = {name: 0 * ours[name] for name in ours if "gate.proj" in name}
    assert len(closed) == 4  # two gates of audio, two of speech
    x, m = random(3, 4, WIDTH), random(3, 7, WIDTH, seed=1)
    np.testing.assert_array_equal(fuse(models, x, m, **closed), fuse(models, x, 9 * m, **closed))
    assert np.abs(fuse(models, x, m) - fuse(models, x, 9 * m)).max() > 0.01


def test_gates_of_a_clip_do_not_depend_on_other_clips(models):
    x, m = random(3, 4, WIDTH), random(3, 7, WIDTH, seed=1)
    others = np.where(np.arange(3)[:, None, None] == 1, x, 5)
    np.testing.assert_allclose(fuse(models, others, m)[1], fuse(models, x, m)[1], atol=1e-5)
