"""The whole model against the reference, and what its config switches (spec sections 1 to 5)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from save_jax import parameters as params
from save_jax.models.save import SAVE, SAVEConfig, copy_clip_into_fusion, create
from save_jax.weights.names import save as table
from save_jax.weights.table import to_torch
from tests.support import small

MODELS = {"save": {}, "avigate": small.AVIGATE, "clip4clip": small.CLIP4CLIP}


@pytest.fixture(scope="module")
def save():
    """The reference, and our whole model as a function of parameters and batch."""
    theirs, graphdef, ours = small.pair()
    return theirs, jax.jit(lambda p, batch: params.merge(graphdef, p)(batch)), ours


def without_unused(batch, sizes):
    """The batch as the pipelines make it for a model: no arrays for branches it lacks."""
    if not sizes.sound_weight:
        batch = batch._replace(fbank=None, has_audio=None)
    if not sizes.speech_weight:
        batch = batch._replace(transcript_ids=None)
    return batch


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_reference(name, save):
    sizes = dataclasses.replace(small.SIZES, **MODELS[name])
    batch = small.batch()
    if name == "save":
        theirs, run, ours = save
    else:
        theirs, graphdef, ours = small.pair(sizes)
        run = jax.jit(lambda p, batch, g=graphdef: params.merge(g, p)(batch))
    text, video = run(ours, without_unused(batch, sizes))
    expected_text, expected = small.run_reference(theirs, batch)
    np.testing.assert_allclose(text, expected_text.detach(), atol=2e-5)
    np.testing.assert_allclose(video.visual, expected.visual.detach(), atol=2e-5)
    np.testing.assert_allclose(video.fused, expected.fused.detach(), atol=2e-5)
    np.testing.assert_array_equal(video.mask, batch.frame_mask)
    if sizes.sound_weight:
        np.testing.assert_allclose(video.audio, expected.audio.detach(), atol=2e-5)
    else:
        assert video.audio is None


@pytest.fixture(scope="module")
def views(save):
    """What an evaluation asks of the whole model."""
    _, graphdef, _ = small.pair()
    return jax.jit(lambda p, batch: params.merge(graphdef, p).encode_views(batch))


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("without_sound", {"sound_weight": 0.0}),
        ("without_speech", {"speech_weight": 0.0}),
        ("vision_alone", {"sound_weight": 0.0, "speech_weight": 0.0}),
    ],
)
def test_a_view_is_the_model_without_those_branches(save, views, name, left_out):
    _, _, ours = save
    batch = small.batch()
    found = views(ours, batch)
    sizes = dataclasses.replace(small.SIZES, **left_out)
    graphdef, expected = small.abstract(small.config(sizes, "float32"))
    run = jax.jit(lambda p, batch: params.merge(graphdef, p).encode_video(batch).fused)
    fused = run({key: ours[key] for key in expected}, without_unused(batch, sizes))
    np.testing.assert_allclose(found.ablated[name], fused, atol=2e-5)
    assert np.abs(found.ablated[name] - found.frames).max() > 0.01


def test_views_of_the_whole_model_and_its_gates(save, views):
    _, run, ours = save
    found = views(ours, small.batch())
    _, video = run(ours, small.batch())
    np.testing.assert_allclose(found.frames, video.fused, atol=1e-5)
    assert set(found.ablated) == {"without_sound", "without_speech", "vision_alone"}
    # The first block's, by hand (spec section 4); of sound, whose tokens are at hand.
    summary = np.concatenate([video.visual.mean(axis=1), video.audio.mean(axis=1)], axis=-1)
    for number, gate in enumerate(("attn_gate", "ff_gate")):
        fc, proj = (
            np.asarray(ours[f"audio_fusion.blocks.layer.{gate}.{part}.kernel"][0])
            for part in ("fc", "proj")
        )
        hidden = summary @ fc
        expected = np.tanh(hidden / (1 + np.exp(-1.702 * hidden)) @ proj)[:, 0]
        np.testing.assert_allclose(found.gates["sound"][:, 0, number], expected, atol=1e-5)
    # Without gates nothing comes in, in any block.
    closed = {name: 0 * ours[name] for name in ours if "gate.proj" in name}
    found = views(ours | closed, small.batch())
    layers = small.SIZES.fusion_layers
    for name in ("sound", "speech"):
        np.testing.assert_array_equal(found.gates[name], np.zeros((len(video.mask), layers, 2)))


def test_padding_frames_hold_anything(save):
    _, run, ours = save
    batch = small.batch()
    real = batch.frame_mask[..., None, None, None]
    assert not real.all()
    one, other = (run(ours, batch._replace(frames=np.where(real, batch.frames, np.uint8(v))))
                  for v in (0, 255))  # fmt: skip
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_order_of_clips_is_immaterial(save):
    _, run, ours = save
    batch, order = small.batch(), np.array([3, 0, 5, 1, 4, 2])
    text, video = run(ours, batch)
    text_2, video_2 = run(ours, jax.tree.map(lambda x: x[order], batch))
    np.testing.assert_allclose(text_2, text[order], atol=1e-5)
    np.testing.assert_allclose(video_2.fused, video.fused[order], atol=1e-5)
    np.testing.assert_allclose(video_2.audio, video.audio[order], atol=1e-5)


def test_bfloat16_stays_close_to_float32(save):
    _, run, ours = save
    graphdef, _ = small.abstract(small.config(dtype="bfloat16"))
    batch = small.batch()
    text, video = run(ours, batch)
    text_16, video_16 = jax.jit(lambda p, batch: params.merge(graphdef, p)(batch))(ours, batch)
    pairs = ((text, text_16), (video.fused, video_16.fused), (video.audio, video_16.audio))
    for full, half in pairs:
        assert half.dtype == jnp.bfloat16
        full, half = np.asarray(full), np.asarray(half, np.float32)
        norms = np.linalg.norm(full, axis=-1) * np.linalg.norm(half, axis=-1)
        assert ((full * half).sum(-1) / norms).min() > 0.999


def test_unused_branches_have_no_parameters():
    tops = {}
    for name, changes in MODELS.items():
        sizes = dataclasses.replace(small.SIZES, **changes)
        tops[name] = {key.split(".")[0] for key in small.abstract(small.config(sizes))[1]}
    audio = {"ast", "audio_projection", "audio_resampler", "audio_fusion"}
    assert tops["clip4clip"] == {"clip"}
    assert tops["avigate"] == {"clip", "frame_positions"} | audio
    assert tops["save"] == tops["avigate"] | {"speech_fusion"}


def test_full_size_has_the_published_parts():
    _, parameters = small.abstract(SAVEConfig())
    assert parameters["audio_resampler.query_tokens"].shape == (512, 12)
    assert parameters["audio_resampler.query_positions"].shape == (12, 512)
    assert parameters["frame_positions"].shape == (77, 512)
    assert parameters["audio_projection.kernel"].shape == (768, 512)
    assert parameters["speech_fusion.blocks.layer.attn_gate.fc.kernel"].shape == (4, 1024, 256)
    assert parameters["audio_fusion.blocks.layer.cross_ff.c_proj.kernel"].shape == (4, 2048, 512)
    assert SAVEConfig().fusion_heads == 8
    assert all(value.dtype == jnp.float32 for value in parameters.values())


@pytest.fixture(scope="module")
def created():
    """A model as training starts it."""
    return create(small.config(), seed=3)


def test_new_parts_start_from_the_text_tower(save, created):
    theirs = small.reference.SAVE(small.SIZES)
    _, started = params.split(created)
    theirs.load_state_dict(
        {name: torch.tensor(value) for name, value in to_torch(table.TABLE, started).items()}
    )
    before = small.numpy_state(theirs)
    theirs.copy_clip()  # changes nothing: `create` has done it
    for name, value in small.numpy_state(theirs).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    # And it is not that everything is alike: the tower's blocks differ from each other.
    kernel = started["audio_fusion.blocks.layer.attn.in_proj.kernel"]
    assert not np.allclose(kernel[0], kernel[1])


def test_random_initialisation(created):
    _, started = params.split(created)
    query = np.asarray(started["audio_resampler.query_tokens"])
    np.testing.assert_allclose(query.T @ query, np.eye(len(query.T)), atol=1e-5)
    deviations = {
        "audio_resampler.query_positions": 0.02,
        "audio_fusion.blocks.layer.attn_gate.fc.kernel": 0.02,
        "audio_fusion.blocks.layer.cross_ff.c_fc.kernel": 0.02,
        "speech_fusion.blocks.layer.cross_attn.out_proj.kernel": 0.02,
        "audio_projection.kernel": small.SIZES.audio_width**-0.5,
    }
    for name, expected in deviations.items():
        assert np.std(started[name]) == pytest.approx(expected, rel=0.1), name
    for name, value in started.items():
        if name.endswith(".bias") and not name.startswith("ast.patch"):
            assert not value.any(), name
    assert started["clip.logit_scale"] == pytest.approx(np.log(1 / 0.07))


def test_parameters_do_not_share_buffers(created):
    """Shared buffers could not be donated to the training step."""
    _, started = params.split(created)
    moved = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(started)
    jax.block_until_ready(moved)


def test_a_text_tower_that_does_not_fit_the_fusion_is_named():
    def build(**changes):
        sizes = dataclasses.replace(small.SIZES, **changes)
        model = SAVE(small.config(sizes), nnx.Rngs(params=0))
        copy_clip_into_fusion(model)
        return model

    with pytest.raises(ValueError, match=r"4 blocks, width 128.*3 blocks of width 128"):
        nnx.eval_shape(lambda: build(fusion_layers=4))
    with pytest.raises(ValueError, match=r"width 128.*3 blocks of width 64"):
        nnx.eval_shape(lambda: build(text_width=64))
