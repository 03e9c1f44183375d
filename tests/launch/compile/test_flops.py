"""Counting floating-point operations on the jaxpr, against hand counts and the compiler's."""

import functools

import jax
import jax.numpy as jnp
import pytest

from launch.compile import roofline
from launch.compile.program import batch_shapes
from save_jax import sharding, train
from save_jax.models.ast import ASTConfig
from save_jax.models.clip import CLIPConfig
from save_jax.models.save import SAVEConfig
from save_jax.objectives import LossConfig
from tests.support.training import FIVE, mesh_of

X, W = jnp.ones((3, 4)), jnp.ones((4, 4))
ONE = 2 * 3 * 4 * 4  # of x @ w


def flops(f, *args) -> float:
    return roofline.count_flops(jax.make_jaxpr(f)(*args))


@jax.custom_vjp
def custom(x, w):
    return x @ w


custom.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


def loop(x, w, length):
    return jax.lax.scan(lambda c, _: (jnp.sin(c @ w), None), x, length=length)[0]


@pytest.mark.parametrize(
    ("f", "products"),
    [
        (lambda x, w: jnp.sin(x @ w) + 1, 1),
        (lambda x, w: jnp.einsum("ab,bc,cd->ad", x, w, w), 2),
        (lambda x, w: jax.jit(jnp.matmul)(x, w), 1),
        (lambda x, w: loop(x, w, 7), 7),
        (lambda x, w: jax.lax.map(lambda y: y @ w, x), 1),
        (lambda x, w: jax.lax.cond(x.sum() > 0, lambda: loop(x, w, 5), lambda: x @ w), 5),
        (lambda x, w: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ w, x), 1),
        (custom, 1),
        (jax.grad(lambda x, w: custom(x, w).sum()), 3),
        (jax.grad(lambda x, w: jax.checkpoint(loop, static_argnums=2)(x, w, 5).sum()), 15),
        (jax.vmap(jnp.matmul, in_axes=(None, 0)), None),
    ],
)
def test_products_are_counted_wherever_they_are(f, products):
    if products is None:
        assert flops(f, X, jnp.ones((6, 4, 4))) == 6 * ONE
    else:
        assert flops(f, X, W) == products * ONE


def test_a_convolution_counts_its_kernel_for_every_output():
    x, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((2, 2, 3, 5))
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(2, 2),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    assert flops(convolve, x, kernel) == 2 * (2 * 4 * 4 * 5) * (2 * 2 * 3)


def test_one_devices_part_counts_for_all():
    mesh = mesh_of(8)
    rows = jax.P("data")
    split = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, jax.P()), out_specs=rows)
    assert flops(split, jnp.ones((24, 4)), W) == 8 * ONE


MODEL = SAVEConfig(
    clip=CLIPConfig(
        embed_dim=256,
        image_size=32,
        patch_size=8,
        vision_width=256,
        vision_layers=3,
        vision_heads=4,
        vocab_size=128,
        text_width=256,
        text_layers=3,
        text_heads=4,
    ),
    ast=ASTConfig(fbank_frames=64, mel_bins=64, stride=16, width=256, layers=3, heads=4),
    fusion_layers=3,
    audio_queries=4,
)


def test_the_count_of_the_real_step_is_the_compilers_once_it_has_no_loops(monkeypatch):
    """The compiler also counts what is not a product, a few percent at this width."""
    mesh = mesh_of(1)

    config = {"data": {"max_frames": 4, "max_words": 16}, "loss": {"soft_albef_weight": 1.0}}
    batch = sharding.abstract_batch(batch_shapes(config, MODEL, 16, training=True), mesh)
    graphdef, state = train.abstract_state(MODEL, FIVE, mesh)

    def traced() -> jax.stages.Traced:
        return jax.jit(train.make_train_step(graphdef, FIVE, LossConfig(), mesh)).trace(
            state, batch
        )

    looped = traced()
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
    unrolled = traced()
    counted = roofline.count_flops(looped.jaxpr)
    assert counted == roofline.count_flops(unrolled.jaxpr)
    assert unrolled.lower().cost_analysis()["flops"] == pytest.approx(counted, rel=0.05)
    # What the compiler makes of loops, and the reason for all this.
    assert looped.lower().cost_analysis()["flops"] < 0.6 * counted
