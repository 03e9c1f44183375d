"""Counting floating-point operations on the jaxpr, against hand counts and the compiler's."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from launch.compile.program import batch_shapes
from save_jax import sharding, train
from save_jax.batch import Batch
from save_jax.flops import PEAKS, count_flops, peak
from save_jax.models import layers
from save_jax.models.ast import ASTConfig
from save_jax.models.clip import CLIPConfig
from save_jax.models.save import SAVEConfig
from save_jax.objectives import LossConfig
from tests.support.training import FIVE, mesh_of

X, W = jnp.ones((3, 4)), jnp.ones((4, 4))
ONE = 2 * 3 * 4 * 4  # of x @ w


def flops(f, *args) -> float:
    return count_flops(jax.make_jaxpr(f)(*args))


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
        vision_layers=2,
        vision_heads=4,
        vocab_size=128,
        text_width=256,
        text_layers=2,
        text_heads=4,
    ),
    ast=ASTConfig(fbank_frames=64, mel_bins=64, stride=16, width=256, layers=2, heads=4),
    fusion_layers=2,
    audio_queries=4,
)


ROWS, F, L = 16, 4, 16
FROZEN = dataclasses.replace(FIVE, clip=0.0, clip_stem=0.0)


def shapes() -> Batch:
    config = {"data": {"max_frames": F, "max_words": L}, "loss": {"soft_albef_weight": 1.0}}
    return batch_shapes(config, MODEL, ROWS, training=True)


def from_cache() -> Batch:
    """What comes with a batch whose frozen encoders' outputs are read instead of computed."""
    dim, ast = MODEL.clip.embed_dim, MODEL.ast
    made = {
        "frame_embeddings": (ROWS, F, dim),
        "caption_embeddings": (ROWS, dim),
        "ast_states": (ROWS, ast.patches + 1, ast.width),
        "speech_states": (ROWS, L, dim),
    }
    made = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in made.items()}
    inputs = dict.fromkeys(("frames", "caption_ids", "fbank", "transcript_ids"))
    return shapes()._replace(**inputs, **made)


def traced(rates=FIVE, micro_batch=0, batch=None, **model) -> jax.stages.Traced:
    """The training step, of a config's variant."""
    mesh = mesh_of(1)
    structure, state = train.abstract_state(dataclasses.replace(MODEL, **model), rates, mesh)
    step = train.make_train_step(structure, rates, LossConfig(), mesh, micro_batch)
    return jax.jit(step).trace(state, sharding.abstract_batch(batch or shapes(), mesh))


@functools.cache
def plain() -> float:
    return count_flops(traced().jaxpr)


def one_by_one(f, rows):
    """`jax.lax.map` without a loop."""
    blocks = [
        f(jax.tree.map(lambda x, i=i: x[i], rows)) for i in range(len(jax.tree.leaves(rows)[0]))
    ]
    return jax.tree.map(lambda *parts: jnp.stack(parts), *blocks)


@pytest.mark.parametrize(
    ("variant", "least", "most"),  # products, as a share of those of the plain step
    [
        ({}, 1, 1),
        ({"rates": FROZEN}, 0.4, 0.7),
        ({"remat": "blocks"}, 1.15, 1.4),
        ({"micro_batch": 8}, 1.15, 1.4),
        ({"rates": FROZEN, "batch": from_cache()}, 0.05, 0.4),
    ],
    ids=["plain", "frozen towers", "remat", "micro_batch", "cache"],
)
def test_the_count_of_the_real_step_is_the_compilers_once_it_has_no_loops(
    monkeypatch, variant, least, most
):
    """The compiler also counts what is not a product, 1 to 8 % at this width.

    It counts before it optimises: two computations of one value in a program without loops would
    be one after.
    """
    looped = traced(**variant)
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
    monkeypatch.setattr(jax.lax, "map", one_by_one)
    unrolled = traced(**variant)
    counted = count_flops(looped.jaxpr)
    assert counted == count_flops(unrolled.jaxpr)
    assert 1 <= unrolled.lower().cost_analysis()["flops"] / counted < 1.08
    # What the compiler makes of loops, and the reason for all this.
    assert looped.lower().cost_analysis()["flops"] < 0.85 * counted
    assert least <= counted / plain() <= most


def test_fused_attention_counts_as_much_as_the_plain_one(monkeypatch):
    """cuDNN's kernel is one operation of the program, which shows no product."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    q, k = jnp.ones((2, 12, 4, 64), jnp.bfloat16), jnp.ones((2, 50, 4, 64), jnp.bfloat16)

    def counted(kernel: str) -> float:
        def f(q, k):
            return layers.attend(q, k, k, causal=False, kernel=kernel).sum()

        return flops(jax.grad(f, argnums=(0, 1)), q, k)

    assert counted("cudnn") == counted("xla") == 6 * 2 * (2 * 12 * 4 * 64) * 50


def device(kind: str) -> jax.Device:
    return mock.Mock(spec=jax.Device, device_kind=kind)


def test_peaks_of_devices():
    v5e = [device("TPU v5 lite")] * 8
    assert peak(v5e, "bfloat16") == 8 * 197e12
    assert peak(v5e, "float32") == pytest.approx(8 * 197e12 / 6)
    assert peak([device("NVIDIA H100 80GB HBM3")], "float32") == 67e12
    assert peak([*v5e, device("cpu")], "bfloat16") is None
    assert peak(jax.devices(), "float32") is None  # of a CPU, nobody publishes one
    assert all(rates.bfloat16 > rates.float32 > 1e13 for rates in PEAKS.values())
