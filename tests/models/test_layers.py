import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch
from flax import nnx

from save_jax.models import layers
from tests.support import reference

FLOAT32 = jnp.dtype("float32")
RNGS = nnx.Rngs(params=0)


def attention(width=24, heads=3):
    """Ours and PyTorch's with the same random weights, biases included."""
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(width, heads, batch_first=True)
    torch.nn.init.normal_(theirs.in_proj_bias)
    torch.nn.init.normal_(theirs.out_proj.bias)
    ours = layers.Attention(width, heads, dtype=FLOAT32, rngs=RNGS)
    ours.in_proj.kernel[...] = jnp.array(theirs.in_proj_weight.detach().numpy().T)
    ours.in_proj.bias[...] = jnp.array(theirs.in_proj_bias.detach().numpy())
    ours.out_proj.kernel[...] = jnp.array(theirs.out_proj.weight.detach().numpy().T)
    ours.out_proj.bias[...] = jnp.array(theirs.out_proj.bias.detach().numpy())
    return ours, theirs


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_annotated_shapes_are_checked():
    ours, _ = attention()
    with pytest.raises(jaxtyping.TypeCheckError):
        ours(jnp.zeros((5, 24)))
    with pytest.raises(jaxtyping.TypeCheckError):
        ours(jnp.zeros((2, 5, 24)), jnp.zeros((3, 5, 24)))


def test_activations():
    x = np.array([-3.0, -1.0, 0.0, 0.5, 4.0], np.float32)
    # x / (1 + exp(-1.702 x))
    expected = [-0.018071, -0.154204, 0.0, 0.350388, 3.995585]
    np.testing.assert_allclose(layers.quick_gelu(jnp.array(x)), expected, atol=1e-5)
    exact = torch.nn.functional.gelu(torch.tensor(x)).numpy()
    np.testing.assert_allclose(layers.exact_gelu(jnp.array(x)), exact, atol=1e-6)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-12])
@pytest.mark.parametrize(("mean", "std"), [(0, 1), (1000, 1), (0, 1e-3)])
def test_layer_norm_keeps_its_digits(epsilon, mean, std):
    x = (mean + std * random(4, 64)).astype(np.float32)
    ours = layers.layer_norm(64, epsilon, FLOAT32, RNGS)(jnp.array(x))
    theirs = torch.nn.functional.layer_norm(torch.tensor(x).double(), (64,), eps=epsilon)
    np.testing.assert_allclose(ours, theirs, atol=2e-4 if mean else 5e-6)


def test_layer_norm_statistics_are_float32_in_bfloat16():
    x = jnp.array(100 + random(4, 512), jnp.bfloat16)
    ours = layers.layer_norm(512, 1e-5, jnp.dtype("bfloat16"), RNGS)(x)
    assert ours.dtype == jnp.bfloat16
    theirs = torch.nn.functional.layer_norm(torch.tensor(np.float64(x)), (512,))
    np.testing.assert_allclose(np.float64(ours), theirs, atol=0.02)


def test_self_attention_equals_pytorch():
    ours, theirs = attention()
    x = random(2, 5, 24)
    expected = theirs(*[torch.tensor(x)] * 3)[0].detach()
    np.testing.assert_allclose(ours(jnp.array(x)), expected, atol=2e-6)


def test_causal_attention_equals_pytorch_and_ignores_the_future():
    ours, theirs = attention()
    x = random(2, 5, 24)
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected = theirs(*[torch.tensor(x)] * 3, attn_mask=future)[0].detach()
    out = ours(jnp.array(x), causal=True)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    x[:, 3:] = 7
    np.testing.assert_allclose(ours(jnp.array(x), causal=True)[:, :3], out[:, :3], atol=2e-6)


def test_cross_attention_equals_pytorch_and_ignores_the_order_of_keys():
    ours, theirs = attention()
    x, context = random(2, 5, 24), random(2, 9, 24, seed=1)
    expected = theirs(torch.tensor(x), *[torch.tensor(context)] * 2)[0].detach()
    out = ours(jnp.array(x), jnp.array(context))
    np.testing.assert_allclose(out, expected, atol=2e-6)
    permuted = ours(jnp.array(x), jnp.array(context[:, ::-1]))
    np.testing.assert_allclose(permuted, out, atol=2e-6)


@pytest.mark.parametrize(
    ("queries", "keys", "causal"),
    [
        (5, 5, False),
        (5, 5, True),
        (4, 4, True),
        (4, 5, False),  # one key more than queries: ImageBind's
        (5, 6, False),
        (12, 1213, False),  # the resampler's
    ],
)
def test_even_numbers_for_cudnn_change_nothing(monkeypatch, queries, keys, causal):
    """Result and gradients, with JAX's own kernel in the place of cuDNN's."""
    attention, seen = jax.nn.dot_product_attention, []

    def stand_in(q, k, v, *, implementation, **options):
        seen.append((implementation, q.shape[1], k.shape[1]))
        return attention(q, k, v, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    shapes = [(2, n, 3, 8) for n in (queries, keys, keys, queries)]
    *qkv, weights = (3 * random(*shape, seed=n) for n, shape in enumerate(shapes))

    def run(kernel):
        def weighted(*qkv):
            out = layers.attend(*qkv, causal=causal, kernel=kernel)
            return (out * weights).sum(), out

        return jax.jit(jax.grad(weighted, argnums=(0, 1, 2), has_aux=True))(*map(jnp.array, qkv))

    expected, found = run("xla"), run("cudnn")
    assert seen == [("xla", queries, keys), ("cudnn", queries + queries % 2, keys + keys % 2)]
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert one.shape == other.shape and np.abs(one).max() > 1
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-6 * np.abs(one).max())


def test_width_that_does_not_divide_into_heads_is_named():
    with pytest.raises(ValueError, match=r"width 10 .* 4 heads"):
        layers.Attention(10, 4, dtype=FLOAT32, rngs=RNGS)


def test_mlp_and_block_equal_the_reference():
    torch.manual_seed(1)
    theirs = reference.CLIPBlock(24, 3)
    ours = layers.Block(24, 3, activation=layers.quick_gelu, epsilon=1e-5, dtype=FLOAT32, rngs=RNGS)
    state = {k: jnp.array(v.numpy()) for k, v in theirs.state_dict().items()}
    for name in ("attn.out_proj", "mlp.c_fc", "mlp.c_proj"):
        part, leaf = name.split(".")
        getattr(getattr(ours, part), leaf).kernel[...] = state[f"{name}.weight"].T
        getattr(getattr(ours, part), leaf).bias[...] = state[f"{name}.bias"]
    ours.attn.in_proj.kernel[...] = state["attn.in_proj_weight"].T
    ours.attn.in_proj.bias[...] = state["attn.in_proj_bias"]
    x = random(2, 5, 24)
    expected = theirs(torch.tensor(x), None).detach()
    np.testing.assert_allclose(ours(jnp.array(x)), expected, atol=2e-6)


def test_stack_runs_its_layers_in_order():
    def make(rngs):
        return layers.MLP(16, activation=layers.exact_gelu, dtype=FLOAT32, rngs=rngs)

    stack = layers.Stack(make, 3, nnx.Rngs(params=0))
    graphdef, state = nnx.split(stack.layer)
    kernels = stack.layer.c_fc.kernel[...]
    assert kernels.shape == (3, 16, 64)
    assert not np.allclose(kernels[0], kernels[1])  # layers are drawn independently
    x = expected = jnp.array(random(2, 5, 16))
    for n in range(3):
        expected = nnx.merge(graphdef, jax.tree.map(lambda a, n=n: a[n], state))(expected)
    np.testing.assert_allclose(stack(x), expected, atol=1e-6)


def test_default_initialisation():
    block = layers.Attention(128, 2, dtype=FLOAT32, rngs=nnx.Rngs(params=0))
    bound = (6 / (128 + 3 * 128)) ** 0.5  # Xavier-uniform, of the fused matrix
    kernel = block.in_proj.kernel[...]
    assert 0.99 * bound < np.abs(kernel).max() <= bound
    np.testing.assert_allclose(block.out_proj.kernel[...].std(), 0.02, rtol=0.05)
    assert not block.in_proj.bias[...].any()


def test_patches_times_kernel_is_the_strided_convolution():
    conv = torch.nn.Conv2d(3, 7, 4, stride=4, bias=False)
    images = random(2, 8, 12, 3)
    expected = conv(torch.tensor(images).permute(0, 3, 1, 2)).flatten(2).mT.detach()
    kernel = conv.weight.detach().numpy().transpose(2, 3, 1, 0).reshape(-1, 7)
    np.testing.assert_allclose(layers.patches(jnp.array(images), 4) @ kernel, expected, atol=1e-5)


def test_images_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match=r"10x8 pixels .* patches of 4"):
        layers.patches(jnp.zeros((1, 10, 8, 3)), 4)
