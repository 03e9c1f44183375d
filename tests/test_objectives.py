"""The losses against the reference (spec section 6), and the inputs that break such losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from save_jax import objectives
from save_jax.models.save import VideoEmbedding
from save_jax.objectives import (
    LossConfig,
    adaptive_margin,
    contrastive_loss,
    losses,
    soft_albef_loss,
)
from tests.support import reference

NAMES = ("text", "fused", "visual", "audio")  # what has a gradient, and then the scale


def data(clips=8, frames=4, dim=16, seed=0):
    """Embeddings of a batch: related enough that the margin is not constant."""
    rng = np.random.default_rng(seed)
    topic = rng.normal(size=(clips, 1, dim)) + 2 * rng.normal(size=dim)
    arrays = {
        "text": topic[:, 0] + rng.normal(size=(clips, dim)),
        "fused": topic + rng.normal(size=(clips, frames, dim)),
        "visual": topic + rng.normal(size=(clips, frames, dim)),
        "audio": topic + rng.normal(size=(clips, 3, dim)),
        "teacher_video": topic[:, 0] + rng.normal(size=(clips, dim)),
        "teacher_audio": topic[:, 0] + rng.normal(size=(clips, dim)),
    }
    arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
    mask = np.arange(frames) < rng.integers(1, frames + 1, clips)[:, None]
    mask[0] = np.arange(frames) < 1  # a single frame
    return arrays | {"mask": mask, "usable": np.arange(clips) % 3 != 1}


@functools.partial(jax.jit, static_argnames="config")
def _run(arrays, logit_scale, config):
    def total(parts, logit_scale):
        video = VideoEmbedding(parts["fused"], parts["visual"], parts["audio"], arrays["mask"])
        teacher = arrays["teacher_video"], arrays["teacher_audio"], arrays["usable"]
        result = losses(parts["text"], video, *teacher, logit_scale, config)
        return result.total, result

    parts = {name: arrays[name] for name in NAMES}
    gradient, result = jax.grad(total, argnums=(0, 1), has_aux=True)(parts, logit_scale)
    return result, gradient[0] | {"logit_scale": gradient[1]}


def run(arrays, logit_scale=2.66, **config):
    """Our losses, and the gradient of the total by name."""
    return _run(arrays, np.float32(logit_scale), LossConfig(**config))


def run_reference(arrays, logit_scale, beta=0.2, delta=0.1):
    leaves = {name: torch.tensor(arrays[name]).double().requires_grad_() for name in NAMES}
    leaves["logit_scale"] = torch.tensor(float(np.float32(logit_scale)), dtype=torch.double)
    leaves["logit_scale"].requires_grad_()
    video = reference.Video(leaves["fused"], leaves["visual"], leaves["audio"])
    contrastive = reference.contrastive(
        leaves["text"], video, torch.tensor(arrays["mask"]), leaves["logit_scale"], beta, delta
    )
    soft_albef = reference.soft_albef(
        video.visual,
        video.audio,
        torch.tensor(arrays["teacher_video"]).double(),
        torch.tensor(arrays["teacher_audio"]).double(),
        torch.tensor(arrays["usable"]),
    )
    (contrastive + soft_albef).backward()
    gradient = {k: np.zeros(v.shape) if v.grad is None else v.grad for k, v in leaves.items()}
    return contrastive.item(), soft_albef.item(), gradient


@pytest.mark.parametrize("delta", [0.1, 0.05])
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_equals_the_reference_with_gradients(scale, delta):
    arrays = data()
    result, gradient = run(arrays, np.log(scale), margin_delta=delta)
    contrastive, soft_albef, expected = run_reference(arrays, np.log(scale), delta=delta)
    np.testing.assert_allclose(result.contrastive, contrastive, rtol=2e-5)
    np.testing.assert_allclose(result.soft_albef, soft_albef, rtol=2e-5)
    np.testing.assert_allclose(result.total, contrastive + soft_albef, rtol=2e-5)
    for name, value in expected.items():
        error = np.abs(gradient[name] - np.asarray(value)).max()
        assert error <= 1e-4 * np.abs(np.asarray(value)).max(), name


def square_margin(text, visual, delta):
    """The margin of every caption with every video of a batch."""
    return adaptive_margin(text, visual, text, visual, jnp.eye(len(text)) > 0, 0.2, delta)


def test_margin_by_hand():
    text = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
    margin = square_margin(text, text[jnp.array([0, 0, 0])], 0.1)
    # t·t is 0, 0.8 and 0.6, g·g is 1: β(1 − (t·t + 1)/2) = 0.1, 0.02 and 0.04.
    expected = [[0, 0.1, 0.02], [0.1, 0, 0.04], [0.02, 0.04, 0]]
    np.testing.assert_allclose(margin, expected, atol=1e-6)
    opposite = jnp.array([[1.0, 0.0], [-1.0, 0.0]])
    np.testing.assert_allclose(square_margin(opposite, opposite, 0.1)[0, 1], 0.1)
    gradient = jax.grad(lambda t: square_margin(t, t, 1.0).sum())(text)
    assert not gradient.any()


def test_switches():
    arrays = data()
    both, _ = run(arrays)
    off, _ = run(arrays, margin_delta=0.0, soft_albef_weight=0.0)
    expected, _, _ = run_reference(arrays, 2.66, delta=0.0)
    np.testing.assert_allclose(off.total, expected, rtol=2e-5)
    assert off.soft_albef == 0
    double, _ = run(arrays, soft_albef_weight=2.0)
    np.testing.assert_allclose(double.total, both.contrastive + 2 * both.soft_albef, rtol=1e-6)


def test_contrastive_loss_by_hand():
    # One frame a video: local and global similarity are both the cosine, times the scale e⁰ = 1.
    text = jnp.array([[1.0, 0.0], [0.8, 0.6]])
    frames = jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    video = VideoEmbedding(frames, frames, None, jnp.ones((2, 1), bool))
    loss = contrastive_loss(text, video, jnp.zeros(()), LossConfig(margin_delta=0.0))
    logits = np.array([[1.0, 0.0], [0.8, 0.6]])
    rows = np.log(np.exp(logits).sum(1)) - np.diag(logits)
    columns = np.log(np.exp(logits).sum(0)) - np.diag(logits)
    np.testing.assert_allclose(loss, (rows.mean() + columns.mean()) / 2, rtol=1e-6)


@pytest.mark.parametrize("most", [1, 48 * 48 * 4 // 3])
def test_blocks_do_not_change_the_losses(monkeypatch, most):
    arrays = data(clips=48)
    whole, gradient = run(arrays)
    monkeypatch.setattr(objectives, "MOST_SCORES", most)
    _run.clear_cache()
    blocks, gradient_of_blocks = run(arrays)
    _run.clear_cache()
    np.testing.assert_allclose(blocks, whole, rtol=1e-5)
    for name in gradient:
        np.testing.assert_allclose(gradient_of_blocks[name], gradient[name], atol=1e-5)


def sizes_of(jaxpr) -> list[int]:
    """Elements of every array that a program makes, those of its inner programs included."""
    sizes = []
    for equation in jaxpr.eqns:
        sizes += [v.aval.size for v in equation.outvars]
        for inner in jaxprs_in_params(equation.params):
            sizes += sizes_of(inner)
    return sizes


def test_no_array_of_all_pairs_and_frames_is_ever_made(monkeypatch):
    clips, frames, dim = 48, 4, 16
    arrays = data(clips, frames, dim)
    names = ("mask", "teacher_video", "teacher_audio", "usable")

    def total(parts, mask, *teacher):
        text, fused, visual, audio = parts
        video = VideoEmbedding(fused, visual, audio, mask)
        return losses(text, video, *teacher, jnp.float32(2.66), LossConfig()).total

    def largest():
        parts = tuple(arrays[name] for name in NAMES)
        program = jax.make_jaxpr(jax.grad(total))(parts, *(arrays[name] for name in names))
        return max(sizes_of(program.jaxpr))

    assert largest() >= clips * clips * frames  # small enough for one block
    monkeypatch.setattr(objectives, "MOST_SCORES", clips * frames * 8)
    assert largest() <= clips * frames * dim


def test_the_order_of_the_batch_is_immaterial():
    arrays, order = data(), np.array([5, 2, 7, 0, 1, 6, 4, 3])
    result, gradient = run(arrays)
    permuted, gradient_2 = run({name: value[order] for name, value in arrays.items()})
    np.testing.assert_allclose(permuted, result, rtol=1e-5)
    for name in NAMES:
        np.testing.assert_allclose(gradient_2[name], gradient[name][order], atol=1e-5)


def test_padding_frames_are_immaterial_to_the_contrastive_loss():
    arrays = data()
    config = {"soft_albef_weight": 0.0}  # soft-ALBEF's mean is over all frames
    changed = {
        name: np.where(arrays["mask"][..., None], arrays[name], np.float32(7))
        for name in ("fused", "visual")
    }
    result, gradient = run(arrays, **config)
    np.testing.assert_array_equal(run(arrays | changed, **config)[0].total, result.total)
    assert not gradient["fused"][~arrays["mask"]].any()


def test_soft_albef_ignores_unusable_clips():
    arrays = data()
    unusable = ~arrays["usable"]
    result, gradient = run(arrays)
    changed = dict(arrays)
    for name in ("audio", "teacher_video", "teacher_audio"):
        changed[name] = arrays[name].copy()
        changed[name][unusable] = 1e3
    assert run(changed)[0].soft_albef == result.soft_albef
    assert not gradient["audio"][unusable].any()
    assert gradient["audio"][~unusable].any()


@pytest.mark.parametrize("count", [0, 1])
def test_with_fewer_than_two_usable_clips_soft_albef_is_zero(count):
    arrays = data() | {"usable": np.arange(8) < count}
    result, gradient = run(arrays)
    assert result.soft_albef == 0
    assert not gradient["audio"].any()
    assert all(np.isfinite(value).all() for value in gradient.values())


def test_missing_teachers_are_finite():
    arrays = data()
    arrays["teacher_audio"][~arrays["usable"]] = 0
    arrays["teacher_video"][~arrays["usable"]] = 0
    result, gradient = run(arrays)
    assert np.isfinite(result.total)
    assert all(np.isfinite(value).all() for value in gradient.values())


def alike(count, dim=16):
    """`count` equal vectors."""
    return np.broadcast_to(np.random.default_rng(0).normal(size=dim), (count, dim))


@pytest.mark.parametrize("teacher_too", [False, True])
@pytest.mark.parametrize("clips", [2, 49, 128])
def test_soft_albef_of_equal_embeddings_is_defined(clips, teacher_too):
    """A collapsed student, or teacher, correlates with nothing: distance 1 in each direction."""
    rng = np.random.default_rng(1)
    student = np.float32(alike(clips) / np.linalg.norm(alike(clips), axis=1, keepdims=True))
    # Equal but for the last digit, as rounding leaves them.
    student = np.where(
        rng.random(student.shape) < 0.5, student, np.nextafter(student, np.float32(2))
    )
    teacher = alike(clips) if teacher_too else rng.normal(size=(clips, 16))
    loss, gradient = jax.jit(jax.value_and_grad(soft_albef_loss, argnums=(0, 1)))(
        student, student, np.float32(teacher), np.float32(teacher), np.ones(clips, bool)
    )
    np.testing.assert_allclose(loss, 2.0, atol=1e-3)
    # A rounding error must not become a direction.
    assert max(np.abs(value).max() for value in gradient) < 1e3


def test_equal_embeddings_give_finite_gradients():
    arrays = data()
    for name in NAMES:
        arrays[name] = np.ones_like(arrays[name])
    result, gradient = run(arrays, np.log(100))
    np.testing.assert_allclose(result.contrastive, np.log(8), atol=1.0)
    assert all(np.isfinite(value).all() for value in gradient.values())


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_scale_does_not_overflow(sign):
    """Captions exactly on, or exactly opposite to, their videos at scale 100."""
    arrays = data()
    arrays["text"] = sign * arrays["fused"][:, 0]
    result, gradient = run(arrays, np.log(100))
    expected, _, _ = run_reference(arrays, np.log(100))
    np.testing.assert_allclose(result.contrastive, expected, rtol=1e-4, atol=1e-5)
    assert all(np.isfinite(value).all() for value in gradient.values())


def test_a_video_without_frames_gives_finite_gradients():
    arrays = data()
    arrays["mask"][3] = False
    result, gradient = run(arrays)
    assert np.isfinite(result.total)
    assert all(np.isfinite(value).all() for value in gradient.values())


def test_eight_devices_compute_what_one_does():
    arrays = data(clips=16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    parts = tuple(arrays[name] for name in NAMES)
    rest = tuple(arrays[name] for name in ("mask", "teacher_video", "teacher_audio", "usable"))

    def total(parts, mask, teacher_video, teacher_audio, usable):
        text, fused, visual, audio = parts
        video = VideoEmbedding(fused, visual, audio, mask)
        scale = jnp.float32(2.66)
        return losses(text, video, teacher_video, teacher_audio, usable, scale, LossConfig()).total

    step = jax.jit(jax.value_and_grad(total))
    one = step(parts, *rest)
    parts, *rest = jax.device_put((parts, *rest), sharding)
    eight = step(parts, *rest)
    assert len(eight[1][0].sharding.device_set) == 8
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-6)
    for a, b in zip(eight[1], one[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
