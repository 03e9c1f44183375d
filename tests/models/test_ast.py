"""AST against the implementation in `transformers`, with the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from save_jax import parameters as params
from save_jax.models.ast import AST, VARIANTS, ASTConfig
from save_jax.weights.names import ast as table
from save_jax.weights.table import from_torch
from tests.support import small

FLOAT32 = jnp.dtype("float32")


def original_names(model: transformers.ASTModel) -> dict[str, np.ndarray]:
    """`transformers`' AST under the names of the original checkpoints."""
    state = small.numpy_state(model)
    result = {
        "v.cls_token": state["embeddings.cls_token"],
        "v.dist_token": state["embeddings.distillation_token"],
        "v.pos_embed": state["embeddings.position_embeddings"],
    }
    for kind in ("weight", "bias"):
        projection = state[f"embeddings.patch_embeddings.projection.{kind}"]
        result[f"v.patch_embed.proj.{kind}"] = projection
        result[f"v.norm.{kind}"] = state[f"layernorm.{kind}"]
        for n in range(model.config.num_hidden_layers):
            source, target = f"layers.{n}", f"v.blocks.{n}"
            result[f"{target}.attn.qkv.{kind}"] = np.concatenate(
                [state[f"{source}.attention.{p}_proj.{kind}"] for p in "qkv"]
            )
            for theirs, ours in (
                ("attention.o_proj", "attn.proj"),
                ("layernorm_before", "norm1"),
                ("layernorm_after", "norm2"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            ):
                result[f"{target}.{ours}.{kind}"] = state[f"{source}.{theirs}.{kind}"]
    return result


def abstract(config: ASTConfig):
    return params.split(nnx.eval_shape(lambda: AST(config, dtype=FLOAT32, rngs=nnx.Rngs(params=0))))


@pytest.mark.parametrize("depth", [2, 12], ids=["shallow", "full size"])
def test_equals_transformers(depth):
    torch.manual_seed(0)
    theirs = transformers.ASTModel(transformers.ASTConfig(num_hidden_layers=depth)).eval()
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if value.ndim == 1 or name.startswith("embeddings."):
                value += 0.1 * torch.randn_like(value)
    config = ASTConfig(layers=depth)
    graphdef, expected_shapes = abstract(config)
    ours = from_torch(table.TABLE, original_names(theirs), small.shapes(expected_shapes))

    # Normalised filterbanks: sound has a few units, zero-padding is a constant near 0.79.
    fbank = np.random.default_rng(0).normal(size=(1, 1024, 128)).astype(np.float32)
    fbank[:, 900:] = 5.118 / (2 * 3.2527153)
    states = []
    theirs.layernorm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    with torch.no_grad():
        theirs(torch.tensor(fbank))
        before = states[0]
        pooled = before[:, :2].mean(dim=1, keepdim=True)
        # The LayerNorm comes after the mean of the two tokens, not before as in `transformers`.
        expected = theirs.layernorm(torch.cat([pooled, before[:, 2:]], dim=1)).numpy()

    out = np.asarray(jax.jit(lambda p, x: params.merge(graphdef, p)(x))(ours, fbank))
    assert out.shape == (1, 1213, 768)
    assert np.abs(out - expected).max() / np.abs(expected).max() < 1e-3
    norms = [np.linalg.norm(x, axis=-1, keepdims=True) for x in (out, expected)]
    np.testing.assert_allclose(out / norms[0], expected / norms[1], atol=2e-5)


def test_patches_run_along_time_within_a_band_of_frequencies():
    """Rows are frequency, columns time: a steady tone reaches one row of patches, throughout."""
    config = ASTConfig(fbank_frames=76, mel_bins=46, width=8, layers=1, heads=1)
    assert config.grid == (4, 7)
    graphdef, expected = abstract(config)
    zeros = {name: jnp.zeros(value.shape) for name, value in expected.items()}
    # Each patch's state is its sum over the patch (in one channel), straight to the output.
    kernel = zeros["patch_embed.kernel"].at[..., 0].set(1)
    ours = {**zeros, "patch_embed.kernel": kernel, "norm.scale": jnp.ones(8)}
    tone = np.zeros((1, 76, 46), np.float32)
    tone[:, :, 5] = 1  # the first ten bins are seen by the first row of patches alone
    out = params.merge(graphdef, ours)(jnp.array(tone))
    lit = np.asarray(out[0, 1:, 0] > 0).reshape(4, 7)
    assert lit[0].all() and not lit[1:].any()


def test_a_clip_does_not_depend_on_its_neighbours():
    _, graphdef, ours = small.pair()
    ast = jax.jit(lambda x: params.merge(graphdef, ours).ast(x))
    fbank = np.random.default_rng(0).normal(size=(3, 56, 36)).astype(np.float32)
    np.testing.assert_allclose(ast(fbank)[1:2], ast(fbank[1:2]), atol=1e-5)


def test_full_size():
    assert VARIANTS["base"].patches == 1212
    _, parameters = abstract(VARIANTS["base"])
    assert parameters["pos_embed"].shape == (1214, 768)
    # DeiT-base's 12 blocks, patches of one channel, tokens and positions, final LayerNorm.
    blocks = 12 * (12 * 768**2 + 13 * 768)
    rest = 16 * 16 * 768 + 768 + 1214 * 768 + 2 * 768 + 2 * 768
    assert sum(value.size for value in parameters.values()) == blocks + rest
