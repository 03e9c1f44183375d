"""CLIP against the implementation in `transformers`, with the same random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from save_jax import parameters as params
from save_jax.models.clip import CLIP, VARIANTS, CLIPConfig
from save_jax.weights.names import clip as table
from save_jax.weights.table import from_torch
from tests.support import small

FLOAT32 = jnp.dtype("float32")


def openai_names(model: transformers.CLIPModel) -> dict[str, np.ndarray]:
    """`transformers`' CLIP under the names of OpenAI's checkpoints."""
    state = small.numpy_state(model)
    result = {
        "logit_scale": state["logit_scale"],
        "text_projection": state["text_projection.weight"].T,
        "visual.proj": state["visual_projection.weight"].T,
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        result[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        result[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        result[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
    for tower, prefix in (("vision", "visual."), ("text", "")):
        depth = getattr(model.config, f"{tower}_config").num_hidden_layers
        for n in range(depth):
            source = f"{tower}_model.encoder.layers.{n}"
            target = f"{prefix}transformer.resblocks.{n}"
            for kind in ("weight", "bias"):
                result[f"{target}.attn.in_proj_{kind}"] = np.concatenate(
                    [state[f"{source}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
                )
                for theirs, ours in (
                    ("self_attn.out_proj", "attn.out_proj"),
                    ("layer_norm1", "ln_1"),
                    ("layer_norm2", "ln_2"),
                    ("mlp.fc1", "mlp.c_fc"),
                    ("mlp.fc2", "mlp.c_proj"),
                ):
                    result[f"{target}.{ours}.{kind}"] = state[f"{source}.{theirs}.{kind}"]
    return result


def build(vision_layers: int, text_layers: int):
    """Both implementations of ViT-B/32 with the given numbers of layers."""
    torch.manual_seed(0)
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={"num_hidden_layers": text_layers, "eos_token_id": 49407},
            vision_config={"num_hidden_layers": vision_layers},
        )
    ).eval()
    with torch.no_grad():
        for value in theirs.parameters():
            if value.ndim == 1:  # biases and LayerNorms too must matter
                value += 0.1 * torch.randn_like(value)
    config = CLIPConfig(vision_layers=vision_layers, text_layers=text_layers)
    graphdef, expected = params.split(
        nnx.eval_shape(lambda: CLIP(config, dtype=FLOAT32, rngs=nnx.Rngs(params=0)))
    )
    ours = small.on_device(from_torch(table.TABLE, openai_names(theirs), small.shapes(expected)))
    return theirs, graphdef, ours


def texts() -> np.ndarray:
    return small.captions(np.random.default_rng(0), 3, 32, 49408)


def unit(x) -> np.ndarray:
    x = np.asarray(x)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def relative(ours, theirs) -> float:
    """Largest error over the largest value."""
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("depth", [(3, 2), (12, 12)], ids=["shallow", "full size"])
def test_equals_transformers(depth):
    theirs, graphdef, ours = build(*depth)
    ids = texts()
    images = np.random.default_rng(1).normal(size=(2, 224, 224, 3)).astype(np.float32)
    with torch.no_grad():
        pixels = torch.tensor(images).permute(0, 3, 1, 2)
        text_states = theirs.text_model(torch.tensor(ids).long())
        tokens = theirs.text_projection(text_states.last_hidden_state).numpy()
        text = theirs.text_projection(text_states.pooler_output).numpy()
        image = theirs.visual_projection(theirs.vision_model(pixels).pooler_output).numpy()

    @jax.jit
    def run(parameters, images, ids):
        model = params.merge(graphdef, parameters)
        return model.visual(images), model.text(ids), model.text.pool(ids)

    image_ours, tokens_ours, text_ours = run(ours, images, ids)
    assert tokens_ours.shape == (3, 32, 512)
    # Every token, padding included: that is what speech uses.
    assert relative(tokens_ours, tokens) < 1e-3
    assert relative(image_ours, image) < 1e-3
    np.testing.assert_allclose(unit(text_ours), unit(text), atol=2e-5)
    np.testing.assert_allclose(unit(image_ours), unit(image), atol=2e-5)
    np.testing.assert_allclose(ours["logit_scale"], theirs.logit_scale.item())


@pytest.fixture(scope="module")
def pool():
    """The small text tower's embeddings of captions."""
    sizes = dataclasses.replace(small.SIZES, **small.CLIP4CLIP)
    _, graphdef, ours = small.pair(sizes)
    return jax.jit(lambda ids: params.merge(graphdef, ours).clip.text.pool(ids))


def test_a_caption_does_not_depend_on_its_padding(pool):
    ids = small.captions(np.random.default_rng(0), 4, 10, small.SIZES.vocab_size)
    longer = np.pad(ids, ((0, 0), (0, 6)))
    np.testing.assert_allclose(pool(longer), pool(ids), atol=1e-5)


def test_a_caption_depends_on_the_order_of_its_words(pool):
    first, second = pool(np.array([[98, 5, 6, 7, 99, 0], [98, 7, 6, 5, 99, 0]]))
    assert np.abs(first - second).max() > 0.01


def test_variants():
    assert VARIANTS["ViT-B/32"].image_tokens == 50
    assert VARIANTS["ViT-B/16"].image_tokens == 197
    assert VARIANTS["ViT-L/14@336px"].image_tokens == 577
    _, b32 = params.split(
        nnx.eval_shape(lambda: CLIP(VARIANTS["ViT-B/32"], dtype=FLOAT32, rngs=nnx.Rngs(params=0)))
    )
    assert sum(value.size for value in b32.values()) == 151_277_313  # as published
