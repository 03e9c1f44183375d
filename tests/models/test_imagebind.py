"""ImageBind's towers against a PyTorch reference with the same random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from save_jax import parameters as params
from save_jax.errors import UserError
from save_jax.models import imagebind
from save_jax.models.imagebind import ImageBindConfig
from save_jax.weights.names import imagebind as table
from save_jax.weights.table import from_torch
from tests.support import imagebind_reference as reference
from tests.support import small

TINY = ImageBindConfig(
    embed_dim=24,
    image_size=28,
    patch_size=7,
    vision_width=32,
    vision_layers=3,
    vision_heads=4,
    fbank_frames=46,
    mel_bins=36,
    audio_width=24,
    audio_layers=2,
    audio_heads=3,
)


def sizes(config: ImageBindConfig) -> reference.Sizes:
    return reference.Sizes(
        **{f.name: getattr(config, f.name) for f in dataclasses.fields(reference.Sizes)}
    )


def pair(config: ImageBindConfig):
    """The reference, and our parameters out of its state."""
    theirs = reference.ImageBind(sizes(config)).eval()
    _, expected = imagebind.abstract(config)
    ours = from_torch(table.TABLE, small.numpy_state(theirs), small.shapes(expected))
    return theirs, small.on_device(ours)


def clips(config: ImageBindConfig, count: int, frames: int, pieces: int):
    """Random inputs; filterbanks end in the constant that padding becomes."""
    rng = np.random.default_rng(0)
    side = config.image_size
    images = rng.integers(0, 256, (count, frames, side, side, 3), np.uint8)
    fbanks = rng.normal(size=(count, pieces, config.fbank_frames, config.mel_bins))
    fbanks[:, :, -6:] = 4.268 / 9.138
    return images, fbanks.astype(np.float32)


def outputs(theirs: reference.ImageBind, images: np.ndarray, fbanks: np.ndarray):
    with torch.no_grad():
        mel = torch.from_numpy(fbanks).to(next(theirs.parameters()).dtype)
        mel = mel.swapaxes(2, 3)[:, :, None]  # [clips, pieces, 1, mel, time]
        return (
            theirs("vision", torch.from_numpy(images)).numpy(),
            theirs("audio", mel).numpy(),
        )


@pytest.fixture(scope="module")
def tiny():
    theirs, parameters = pair(TINY)
    return theirs.double(), parameters


def test_equals_the_reference_at_full_width_and_two_blocks():
    config = ImageBindConfig(vision_layers=2, audio_layers=2)
    theirs, parameters = pair(config)
    images, fbanks = clips(config, 1, frames=2, pieces=3)
    video, audio = outputs(theirs, images, fbanks)
    assert video.shape == audio.shape == (1, 1024)
    assert np.linalg.norm(audio) > 10  # the factor of 20

    embed = imagebind.make_embed(config, lambda: parameters, jax.devices()[:1])
    found_video, found_audio = embed.video(images), embed.audio(fbanks)
    print(
        f"largest error: video {np.abs(found_video - video).max():.1e} of unit vectors, "
        f"audio {np.abs(found_audio - audio).max():.1e} of vectors of length 20"
    )
    np.testing.assert_allclose(found_video, video, atol=1e-5 * np.abs(video).max())
    np.testing.assert_allclose(found_audio, audio, atol=1e-5 * np.abs(audio).max())


def test_equals_the_reference_in_small(tiny):
    """So closely that another epsilon of a LayerNorm, or the approximate GELU, would show."""
    theirs, parameters = tiny
    images, fbanks = clips(TINY, 5, frames=4, pieces=3)
    video, audio = outputs(theirs, images, fbanks)
    embed = imagebind.make_embed(TINY, lambda: parameters, jax.devices()[:2])
    np.testing.assert_allclose(embed.video(images), video, atol=2e-6)
    np.testing.assert_allclose(embed.audio(fbanks), audio, atol=1e-5)


def test_every_parameter_matters(tiny):
    """A table that swaps or drops one would go unnoticed where the parameter had no effect."""
    _, parameters = tiny
    images, fbanks = map(jnp.array, clips(TINY, 1, frames=2, pieces=2))
    graphdef, _ = imagebind.abstract(TINY)

    def loss(parameters):
        model = params.merge(graphdef, parameters)
        weights = jnp.arange(1.0, 1 + TINY.embed_dim)
        return (model.embed_video(images) @ weights + model.embed_audio(fbanks) @ weights).sum()

    for name, gradient in jax.jit(jax.grad(loss))(parameters).items():
        assert float(jnp.abs(gradient).max()) > 1e-6, name


def test_a_vector_does_not_depend_on_its_neighbours_nor_on_the_devices(tiny):
    _, parameters = tiny
    images, fbanks = clips(TINY, 5, frames=4, pieces=3)
    one = imagebind.make_embed(TINY, lambda: parameters, jax.devices()[:1])
    four = imagebind.make_embed(TINY, lambda: parameters, jax.devices()[:4])
    assert (one.clips, four.clips) == (1, 4)
    for kind, inputs in (("video", images), ("audio", fbanks)):
        together = getattr(four, kind)(inputs)
        assert together.shape == (5, TINY.embed_dim) and together.dtype == np.float32
        for n in range(5):
            alone = getattr(four, kind)(inputs[n : n + 1])
            np.testing.assert_array_equal(alone[0], together[n])
        np.testing.assert_allclose(getattr(one, kind)(inputs), together, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_near(tiny):
    theirs, parameters = tiny
    images, fbanks = clips(TINY, 3, frames=4, pieces=3)
    embed = imagebind.make_embed(
        dataclasses.replace(TINY, dtype="bfloat16"), lambda: parameters, jax.devices()[:1]
    )
    for found, expected in zip(
        (embed.video(images), embed.audio(fbanks)), outputs(theirs, images, fbanks), strict=True
    ):
        assert found.dtype == np.float32
        cosine = (found * expected).sum(1) / np.linalg.norm(found, axis=1)
        assert (cosine / np.linalg.norm(expected, axis=1) > 0.999).all()
        assert np.abs(found - expected).max() > 1e-6  # and it is another computation


def test_other_dtypes_are_refused():
    with pytest.raises(UserError, match="float32 or bfloat16, found 'float16'"):
        imagebind.make_embed(dataclasses.replace(TINY, dtype="float16"), dict)


def test_full_size():
    _, parameters = imagebind.abstract(imagebind.VARIANTS["huge"])
    vision = 32 * (12 * 1280**2 + 13 * 1280) + 588 * 1280 + 258 * 1280 + 4 * 1280 + 1024 * 1280
    audio = 12 * (12 * 768**2 + 15 * 768) + 256 * 768 + 230 * 768 + 4 * 768 + 1024 * 768 + 1
    assert sum(value.size for value in parameters.values()) == vision + audio
