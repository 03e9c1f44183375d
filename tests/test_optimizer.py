"""The optimiser against the reference's (spec section 7), and the whole model over five steps."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from save_jax import optimizer
from save_jax import parameters as params
from save_jax.models.save import SAVEConfig
from save_jax.objectives import LossConfig, losses
from save_jax.optimizer import OptimizerConfig
from save_jax.weights.names import save as table
from save_jax.weights.table import to_torch
from tests.support import reference, small

TOTAL = 20  # so that five steps see the warm-up, its end and the cosine
CONFIG = OptimizerConfig(total_steps=TOTAL)
STACKED = small.abstract(small.config())[0].stacked


@pytest.fixture(scope="module")
def model():
    return small.pair()


@functools.cache  # compiled once for all tests
def update_step(config):
    transformation = optimizer.make_optimizer(config, STACKED)

    @jax.jit
    def step(gradient, state, trained):
        updates, state = transformation.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state

    return transformation, step


def assert_equal_parameters(ours, theirs, started):
    """Ours equal the reference's within 1e-6 (query tokens 1e-5), and have moved."""
    expected = {name: value.detach().numpy() for name, value in theirs.named_parameters()}
    found = to_torch(table.TABLE, ours)
    assert found.keys() == expected.keys()
    start = to_torch(table.TABLE, started)
    for name, value in found.items():
        tolerance = 1e-5 if name == "query_tokens" else 1e-6
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=tolerance, err_msg=name)
        if reference.group_of(name) == "frozen":
            np.testing.assert_array_equal(value, start[name], err_msg=name)
        else:
            # Rates sum to 3.4 peaks over the steps; an update is about 1 unless decay dominates.
            moved = np.abs(expected[name] - start[name]).max()
            assert moved > 0.01 * reference.PEAK_RATES[reference.group_of(name)], name


# Random gradients of a large and of a small norm: with the global clip and without.
@pytest.mark.parametrize("size", [1e-2, 1e-5])
def test_five_steps_equal_the_reference(model, size):
    theirs, _, started = model
    theirs = reference.SAVE(small.SIZES).double()
    theirs.load_state_dict(model[0].state_dict())
    their_optimizer = reference.BertAdam(dict(theirs.named_parameters()), TOTAL)
    trained, frozen = optimizer.partition(started, CONFIG)
    transformation, step = update_step(CONFIG)
    state = jax.jit(transformation.init)(trained)
    rng = np.random.default_rng(0)
    for _ in range(5):
        gradient = {
            name: (size * rng.normal(size=value.shape)).astype(np.float32)
            for name, value in trained.items()
        }
        trained, state = step(gradient, state, trained)
        for name, value in to_torch(table.TABLE, gradient).items():
            theirs.get_parameter(name).grad = torch.tensor(value).double()
        their_optimizer.step()
    assert_equal_parameters({**trained, **frozen}, theirs, started)


def test_five_steps_of_the_whole_model_equal_the_reference(model):
    """Gradients of every parameter, and the parameters after five steps on real losses."""
    _, graphdef, started = model
    theirs = reference.SAVE(small.SIZES).double()
    theirs.load_state_dict(model[0].state_dict())
    their_optimizer = reference.BertAdam(dict(theirs.named_parameters()), TOTAL)
    trained, frozen = optimizer.partition(started, CONFIG)
    transformation, step = update_step(CONFIG)
    state = jax.jit(transformation.init)(trained)

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradient(trained, frozen, batch):
        net = params.merge(graphdef, {**trained, **frozen})
        text, video = net(batch)
        return losses(
            text,
            video,
            batch.teacher_video,
            batch.teacher_audio,
            batch.has_audio & batch.has_teacher,
            net.clip.logit_scale[...],
            LossConfig(),
        ).total

    for n in range(5):
        batch = small.batch(seed=n)
        loss, gradient = loss_and_gradient(trained, frozen, batch)
        trained, state = step(gradient, state, trained)

        theirs.zero_grad()
        text, video = small.run_reference(theirs, batch)
        mask, usable = torch.tensor(batch.frame_mask), torch.tensor(batch.has_audio)
        teacher = [torch.tensor(x).double() for x in (batch.teacher_video, batch.teacher_audio)]
        expected = reference.contrastive(
            text, video, mask, theirs.clip.logit_scale, beta=0.2, delta=0.1
        ) + reference.soft_albef(video.visual, video.audio, *teacher, usable)
        expected.backward()
        np.testing.assert_allclose(loss, expected.item(), rtol=1e-4)
        assert_equal_gradients(gradient, theirs)
        their_optimizer.step()
    assert_equal_parameters({**trained, **frozen}, theirs, started)


def assert_equal_gradients(ours, theirs):
    """Every tensor within 1e-3 of its norm, but for those whose gradient is 0 up to rounding."""
    found = to_torch(table.TABLE, ours)
    expected = {name: theirs.get_parameter(name).grad.numpy() for name in found}
    total = math.sqrt(sum(np.sum(value**2) for value in expected.values()))
    for name, value in found.items():
        error = np.linalg.norm(value - expected[name])
        assert error <= 1e-3 * np.linalg.norm(expected[name]) + 1e-7 * total, name


def test_groups_equal_the_references_at_full_size():
    _, parameters = small.abstract(SAVEConfig())
    groups = {}
    for name in parameters:
        theirs = table.TABLE.row(name).torch.replace(".*.", ".0.")
        groups.setdefault(reference.group_of(theirs), set()).add(optimizer.group_of(name))
    assert groups == {
        "clip": {"clip", "ast_norm"},
        "frozen": {"clip_stem", "ast"},
        "new": {"new"},
        "query": {"query_tokens"},
    }
    rates = {name: CONFIG.rate(name) for name in optimizer.GROUPS}
    assert rates == {
        "clip": 1e-7,
        "clip_stem": 0.0,
        "ast": 0.0,
        "ast_norm": 1e-7,
        "new": 1e-4,
        "query_tokens": 1e-2,
    }
    assert CONFIG.weight_decay == 0.2


def test_decay_spares_biases_alone():
    _, parameters = small.abstract(small.config())
    for name in parameters:
        theirs = table.TABLE.row(name).torch
        assert optimizer.is_decayed(name) == ("bias" not in theirs), name


def test_frozen_groups_have_no_state(model):
    started = model[2]
    trained, frozen = optimizer.partition(started, CONFIG)
    assert trained.keys() | frozen.keys() == started.keys()
    assert not trained.keys() & frozen.keys()
    assert "clip.text.token_embedding" in frozen and "ast.norm.scale" in trained
    state = jax.eval_shape(optimizer.make_optimizer(CONFIG, STACKED).init, trained)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    scalars = 2 * sum(value.ndim == 0 for value in trained.values())
    assert moments + scalars == 2 * sum(value.size for value in trained.values())


def test_a_rate_of_zero_freezes_its_group(model):
    config = dataclasses.replace(CONFIG, clip=0.0, ast_norm=0.0)
    trained, _ = optimizer.partition(model[2], config)
    assert {optimizer.group_of(name) for name in trained} == {"new", "query_tokens"}
    assert optimizer.learning_rates(config, 1).keys() == {"new", "query_tokens"}
    state = jax.eval_shape(optimizer.make_optimizer(config, STACKED).init, trained)
    assert {leaf.shape for leaf in jax.tree.leaves(state)} <= {
        (), *(value.shape for value in trained.values())
    }  # fmt: skip


def test_schedule_by_hand():
    rate = optimizer.schedule(2.0, optimizer.Pace.of(100))
    cosine = {step: 1 + math.cos(math.pi * step / 100) for step in (10, 50, 75, 99)}
    for step, expected in {0: 0.0, 1: 0.2, 5: 1.0, 9: 1.8, **cosine}.items():
        np.testing.assert_allclose(rate(step), expected, atol=1e-6)
    # Half of the cosine is over when half of *all* steps are.
    np.testing.assert_allclose(rate(50), 1.0, rtol=1e-6)


@pytest.mark.parametrize("total", [1, 7, 30, 50, 110, 7030])
def test_schedule_equals_the_reference_when_compiled(total):
    """Step total/10 is the first of the cosine, also where total/10·(1/total) rounds below 0.1."""
    rate = jax.jit(optimizer.schedule(1.0, optimizer.Pace.of(total)))
    for step in {0, 1, total // 10 - 1, total // 10, total // 10 + 1, total - 1}:
        if 0 <= step < total:
            expected = reference.learning_rate(1.0, step, total)
            np.testing.assert_allclose(rate(jnp.int32(step)), expected, atol=1e-6)


def test_the_first_update_has_rate_zero_but_moments_advance():
    trained = {"frame_positions": jnp.ones((2, 3))}
    transformation, step = update_step(CONFIG)
    gradient = {"frame_positions": jnp.full((2, 3), 0.1)}
    moved, state = step(gradient, transformation.init(trained), trained)
    np.testing.assert_array_equal(moved["frame_positions"], 1)
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    np.testing.assert_allclose(moments[0], 0.01, rtol=1e-6)  # (1 − 0.9)·0.1
    np.testing.assert_allclose(moments[1], 0.0002, rtol=1e-5)  # (1 − 0.98)·0.1²


def test_an_update_by_hand():
    """The second of two equal gradients, without bias correction, at a known rate."""
    config = OptimizerConfig(total_steps=100)
    trained = {"frame_positions": jnp.full((1, 4), 2.0)}
    transformation, step = update_step(config)
    gradient = {"frame_positions": jnp.full((1, 4), 0.1)}  # norm 0.2: no clip
    state = jax.jit(transformation.init)(trained)
    for _ in range(2):
        trained, state = step(gradient, state, trained)
    m, v = 0.019, 0.02 * 0.01 * (1 + 0.98)
    update = m / (math.sqrt(v) + 1e-6) + 0.2 * 2
    np.testing.assert_allclose(trained["frame_positions"], 2 - 1e-5 * update, rtol=1e-7)


def test_clips_by_hand():
    gradient = {
        "scalar": jnp.float32(-3),
        "blocks.layer.kernel": jnp.array([[[3.0, 4.0]], [[0.3, 0.4]]]),
    }
    clipped, _ = optimizer.clip_by_global_norm().update(gradient, None)
    norm = math.sqrt(9 + 25 + 0.25)
    np.testing.assert_allclose(clipped["scalar"], -3 / (norm + 1e-6), rtol=1e-6)
    clipped, _ = optimizer.clip_by_tensor_norm({"blocks.layer.kernel"}).update(gradient, None)
    np.testing.assert_allclose(clipped["scalar"], -1, rtol=1e-5)
    # A stacked tensor is one tensor a layer: the second layer is below 1, and stays.
    layers = [[[0.6, 0.8]], [[0.3, 0.4]]]
    np.testing.assert_allclose(clipped["blocks.layer.kernel"], layers, rtol=1e-5)
    small_gradient = {"x": jnp.array([0.3, 0.4])}
    clipped, _ = optimizer.clip_by_global_norm().update(small_gradient, None)
    np.testing.assert_array_equal(clipped["x"], small_gradient["x"])


def test_zero_gradients_are_finite():
    for clip in (optimizer.clip_by_global_norm(), optimizer.clip_by_tensor_norm(())):
        clipped, _ = clip.update({"x": jnp.zeros(3), "s": jnp.float32(0)}, None)
        assert not clipped["x"].any() and clipped["s"] == 0


def test_describe_names_every_group():
    _, parameters = small.abstract(SAVEConfig())
    text = optimizer.describe(parameters, CONFIG)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()}
    assert list(rows) == ["group", *optimizer.GROUPS, "total"]
    assert rows["query_tokens"] == ["6,144", "1.0e-02", "0.20", "0"]
    assert rows["ast_norm"] == ["1,536", "1.0e-07", "0.20", "768"]
    assert rows["ast"][1] == rows["clip_stem"][1] == "frozen"
    sizes = {name: int(row[0].replace(",", "")) for name, row in rows.items() if name != "group"}
    assert sizes["clip"] + sizes["clip_stem"] == 151_277_313
    assert sizes["total"] == sum(value.size for value in parameters.values())
    trained = sizes["total"] - sizes["ast"] - sizes["clip_stem"]
    assert rows["total"][-2:] == [f"{trained:,}", "train"]
