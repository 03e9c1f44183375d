"""SAVE at the published sizes against the reference: losses, gradients and five steps.

Random weights, float32 on either side. The batch is small, for time; for which AST's blocks too,
which dwarf the rest and are frozen, run once on either side.
"""

import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from save_jax import optimizer
from save_jax import parameters as params
from save_jax.objectives import LossConfig, losses
from save_jax.similarity import similarity
from save_jax.weights.names import save as table
from save_jax.weights.table import from_torch
from tests.support import reference, small
from tests.test_optimizer import (
    CONFIG,
    TOTAL,
    assert_equal_gradients,
    assert_equal_parameters,
)

SIZES, STEPS = reference.Sizes(), 5
# Of the rest of the tests most time is compilation; here it is what is compiled.
OPTIMISED = {"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": True}


def ours(started, graphdef, batch):
    """Similarity, losses and gradients before the first step, and parameters after the last."""

    @functools.partial(jax.jit, compiler_options=OPTIMISED)
    def audio_states(parameters, fbank):
        return params.merge(graphdef, parameters).encode_audio(fbank)

    def total(trained, frozen, states, batch):
        model = params.merge(graphdef, {**trained, **frozen})
        text, video = model(batch._replace(ast_states=states))
        scale = model.clip.logit_scale[...]
        found = losses(
            text,
            video,
            batch.teacher_video,
            batch.teacher_audio,
            batch.has_audio & batch.has_teacher,
            scale,
            LossConfig(),
        )
        scores = similarity(text, video.fused, video.mask, jnp.exp(scale))
        return found.total, (scores, found)

    transformation = optimizer.make_optimizer(CONFIG, graphdef.stacked)

    def update(gradient, state, trained):
        updates, state = transformation.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state

    states = audio_states(started, batch.fbank.astype(np.float32))
    compute = jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=OPTIMISED)
    update = jax.jit(
        update, donate_argnums=(1, 2), compiler_options=OPTIMISED
    )  # at this size copies count
    trained, frozen = optimizer.partition(started, CONFIG)
    trained = jax.tree.map(jnp.copy, trained)
    state, first = jax.jit(transformation.init)(trained), None
    for _ in range(STEPS):
        (_, aux), gradient = compute(trained, frozen, states, batch)
        if first is None:
            first = jax.tree.map(np.array, (*aux, gradient))
        trained, state = update(gradient, state, trained)
    return *first, {**trained, **frozen}


@pytest.fixture
def whole_model():
    """The reference and our structure and parameters, all in float32; gone after the test."""
    theirs = reference.SAVE(SIZES)
    graphdef, expected = small.abstract(small.config(SIZES))
    started = small.on_device(
        from_torch(table.TABLE, small.numpy_state(theirs), small.shapes(expected))
    )
    yield theirs, graphdef, started
    gc.collect()
    jax.clear_caches()


@pytest.mark.soak  # 10 GB, and two minutes
def test_the_whole_model_over_five_steps(whole_model):
    theirs, graphdef, started = whole_model
    batch = small.batch(clips=3, frames=2, length=8, sizes=SIZES)
    # Three, for of two numbers the correlation in soft-ALBEF is ±1 whatever they are.
    batch = batch._replace(has_audio=np.ones(3, bool))
    scores, found, gradient, trained = ours(started, graphdef, batch)

    trunk, states = theirs.clip.audio["v"], []
    for name, value in theirs.named_parameters():
        value.requires_grad_(reference.group_of(name) != "frozen")
    hook = trunk.norm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    with torch.no_grad():
        trunk(torch.tensor(batch.fbank).float())
    hook.remove()
    trunk.forward = lambda fbank: trunk.norm(states[0])

    steps = reference.BertAdam(dict(theirs.named_parameters()), TOTAL)
    mask, usable = torch.tensor(batch.frame_mask), torch.tensor(batch.has_audio)
    teacher = [torch.tensor(x) for x in (batch.teacher_video, batch.teacher_audio)]
    for n in range(STEPS):
        theirs.zero_grad()
        text, video = small.run_reference(theirs, batch)
        logit_scale = theirs.clip.logit_scale
        contrastive = reference.contrastive(text, video, mask, logit_scale, beta=0.2, delta=0.1)
        soft_albef = reference.soft_albef(video.visual, video.audio, *teacher, usable)
        (contrastive + soft_albef).backward()
        if n == 0:
            scale = logit_scale.exp()
            expected = reference.similarity(text, video.fused, mask, scale).detach().numpy()
            print(
                f"largest error of the similarity {np.abs(scores - expected).max() / scale:.1e} × "
                f"scale, of the losses {abs(found.contrastive - contrastive.item()):.1e} and "
                f"{abs(found.soft_albef - soft_albef.item()):.1e}"
            )
            np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4 * scale.item())
            np.testing.assert_allclose(found.contrastive, contrastive.item(), rtol=0, atol=1e-5)
            np.testing.assert_allclose(found.soft_albef, soft_albef.item(), rtol=0, atol=1e-5)
            assert_equal_gradients(gradient, theirs)
            del gradient
        steps.step()
    del steps
    theirs.zero_grad()
    assert_equal_parameters(trained, theirs, started)
