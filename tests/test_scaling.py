"""However a step is spread over devices, blocks and time, it is the same step."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from save_jax import sharding, train
from save_jax.flops import count_flops
from save_jax.objectives import LossConfig
from save_jax.optimizer import OptimizerConfig
from tests.support import synthetic
from tests.support.training import FIVE

STEPS = 3
FROZEN_CLIP = dataclasses.replace(FIVE, clip=0.0, clip_stem=0.0)
ALL = {"axes": (("data", 2), ("fsdp", 2)), "remat": "blocks", "micro_batch": 8}


@functools.cache
def result(
    axes: tuple[tuple[str, int], ...],
    micro_batch: int = 0,
    remat: str = "none",
    rates: OptimizerConfig = FIVE,
) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """Scalars of a few steps, and the parameters after them."""
    step, state, mesh = compiled(axes, micro_batch, remat, rates)
    scalars = []
    for seed in range(STEPS):
        state, found = step(state, sharding.put_batch(synthetic.clips(seed, 16), mesh))
        scalars.append({name: float(value) for name, value in found.items()})
    return scalars, jax.tree.map(np.asarray, state.trained)


def compiled(axes, micro_batch=0, remat="none", rates=FIVE):
    """The step as it runs, a fresh state for it, and their mesh; each is compiled once."""
    step, state, mesh = _compiled(axes, micro_batch, remat, rates, sharding.LEAST_SLICED)
    return step, jax.tree.map(jnp.copy, state), mesh  # the step is given it


@functools.cache
def _compiled(axes, micro_batch, remat, rates, least_sliced):
    sizes = dict(axes)
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    mesh = sharding.make_mesh(sizes, devices)
    model = dataclasses.replace(synthetic.MODEL, remat=remat)
    graphdef, state = train.create_state(model, rates, 0, mesh)
    step = train.make_train_step(graphdef, rates, LossConfig(), mesh, micro_batch)
    return train.jit_train_step(step, state), state, mesh


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"micro_batch": 2, "remat": "products"}, marks=pytest.mark.soak),
        ALL,
        {"axes": (("data", 1), ("fsdp", 8))},
        {
            "axes": (("data", 2), ("fsdp", 2)),
            "micro_batch": 4,
            "remat": "products",
            "rates": FROZEN_CLIP,
        },
    ],
    ids=["caching", "all", "fsdp", "frozen"],
)
def test_the_step_is_the_same(monkeypatch, changed):
    scalars, parameters = result((("data", 1),), rates=changed.get("rates", FIVE))
    monkeypatch.setattr(sharding, "LEAST_SLICED", 1)
    other_scalars, other_parameters = result(**{"axes": (("data", 1),)} | changed)
    for one, other in zip(scalars, other_scalars, strict=True):
        assert other == pytest.approx(one, abs=1e-5, rel=1e-6)
    for name, value in parameters.items():
        np.testing.assert_allclose(other_parameters[name], value, atol=1e-5, err_msg=name)


def test_parameters_and_moments_are_sliced_and_stay_so(monkeypatch):
    monkeypatch.setattr(sharding, "LEAST_SLICED", 1)
    step, state, mesh = compiled(**ALL)
    for seed in range(2):
        name = "clip.text.blocks.layer.mlp.c_fc.kernel"
        for array in (state.trained[name], *moments(state, name)):
            assert array.sharding.spec == jax.P(None, None, "fsdp")
            assert {s.data.size for s in array.addressable_shards} == {array.size // 2}
        assert state.trained["clip.logit_scale"].sharding.is_fully_replicated
        state, _ = step(state, sharding.put_batch(synthetic.clips(seed, 16), mesh))


def moments(state, name: str) -> list[jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    found = [leaf for path, leaf in leaves if jax.tree_util.keystr(path).endswith(f"['{name}']")]
    assert len(found) == 2
    return found


def test_a_sliced_layer_is_put_together_where_it_is_used(monkeypatch):
    """The compiled step gathers weights and scatters their gradients, layer by layer."""
    monkeypatch.setattr(sharding, "LEAST_SLICED", 1)  # as above: the same program
    step, state, mesh = compiled((("data", 1), ("fsdp", 8)))
    batch = sharding.put_batch(synthetic.clips(0, 16), mesh)
    program = step.lower(state, batch).compile()
    assert re.search(r"= f32\[(1,)?16,64\]\S* all-gather", program.as_text())
    whole = program.memory_analysis()
    sizes = sum(x.size * 4 for x in jax.tree.leaves(state))
    assert whole.argument_size_in_bytes < sizes / 2 + 2**20


@pytest.mark.parametrize(
    ("rates", "encoder", "passes"),
    [
        (FIVE, "ast", 1),
        (dataclasses.replace(FIVE, ast=1e-3), "ast", 4),
        (FROZEN_CLIP, "clip", 1),
        (FIVE, "clip", 4),
    ],
)
def test_gradient_caching_computes_what_is_frozen_once(rates, encoder, passes):
    """A backward pass of one more layer counts twice: what trains takes 3 passes, and then 4."""
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])

    def flops(layers: int, micro_batch: int) -> float:
        sizes = {"layers": layers} if encoder == "ast" else {"vision_layers": layers}
        part = dataclasses.replace(getattr(synthetic.MODEL, encoder), **sizes)
        model = dataclasses.replace(synthetic.MODEL, **{encoder: part})
        graphdef, state = train.abstract_state(model, rates, mesh)
        step = train.make_train_step(graphdef, rates, LossConfig(), mesh, micro_batch)
        batch = sharding.abstract_batch(synthetic.clips(0, 16), mesh)
        return count_flops(jax.jit(step).trace(state, batch).jaxpr)

    whole, cached = (flops(3, size) - flops(2, size) for size in (0, 4))
    forward = whole / (passes if passes == 1 else passes - 1)
    assert forward > 0 and cached == pytest.approx(passes * forward)


@pytest.mark.parametrize("absent", ["sound_weight", "speech_weight"])
def test_gradient_caching_leaves_alone_what_a_model_has_not(absent):
    """The batch has it all the same."""
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    model = dataclasses.replace(synthetic.MODEL, **{absent: 0.0})
    graphdef, state = train.abstract_state(model, FROZEN_CLIP, mesh)
    loss = LossConfig(soft_albef_weight=float(bool(model.sound_weight)))
    batch = sharding.abstract_batch(synthetic.clips(0, 16), mesh)
    whole, cached = (
        count_flops(
            jax.jit(train.make_train_step(graphdef, FROZEN_CLIP, loss, mesh, size))
            .trace(state, batch)
            .jaxpr
        )
        for size in (0, 4)
    )
    assert whole < cached < 2 * whole
