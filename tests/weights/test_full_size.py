"""Published sizes with random weights, through Hugging Face's own files, against its models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from save_jax import parameters as params
from save_jax import weights
from save_jax.models.ast import AST
from save_jax.models.clip import CLIP, VARIANTS
from save_jax.models.save import SAVE, SAVEConfig
from tests.support import small

FLOAT32 = jnp.dtype("float32")


def unit(x) -> np.ndarray:
    x = np.asarray(x)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def relative(ours, theirs) -> float:
    """Largest error over the largest value."""
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def shake(model: torch.nn.Module) -> None:
    """Biases and LayerNorms start as constants; they too must matter."""
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1:
                value += 0.1 * torch.randn_like(value)


def read(directory, **sizes):
    """Our parameters from a directory, for a model of frames and text only unless sizes differ."""
    config = SAVEConfig(speech_weight=0.0, frame_positions=False, **sizes)
    expected = params.split(nnx.eval_shape(lambda: SAVE(config, nnx.Rngs(params=0))))[1]
    return weights.load(str(directory), config, expected)


@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-B/16", "ViT-L/14"])
def test_clip_equals_transformers(name, tmp_path):
    config = VARIANTS[name]
    ids = small.captions(np.random.default_rng(0), 2, 32, config.vocab_size)
    side = config.image_size
    images = np.random.default_rng(1).normal(size=(1, side, side, 3)).astype(np.float32)

    def reference():
        """Writes the model's directory and gives its outputs; the model itself goes."""
        torch.manual_seed(0)
        theirs = transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config={
                    "hidden_size": config.text_width,
                    "intermediate_size": 4 * config.text_width,
                    "num_hidden_layers": config.text_layers,
                    "num_attention_heads": config.text_heads,
                    "eos_token_id": 49407,
                },
                vision_config={
                    "hidden_size": config.vision_width,
                    "intermediate_size": 4 * config.vision_width,
                    "num_hidden_layers": config.vision_layers,
                    "num_attention_heads": config.vision_heads,
                    "image_size": config.image_size,
                    "patch_size": config.patch_size,
                },
                projection_dim=config.embed_dim,
            )
        ).eval()
        shake(theirs)
        theirs.save_pretrained(tmp_path)
        with torch.no_grad():
            text = theirs.text_model(torch.tensor(ids).long())
            vision = theirs.vision_model(torch.tensor(images).permute(0, 3, 1, 2))
            return [
                x.numpy()
                for x in (
                    vision.last_hidden_state,
                    theirs.visual_projection(vision.pooler_output),
                    text.last_hidden_state,
                    theirs.text_projection(text.pooler_output),
                )
            ]

    frames, image, words, text = reference()
    loaded = read(tmp_path, clip=config, sound_weight=0.0)
    assert loaded.absent == ()
    ours = {k.removeprefix("clip."): v for k, v in loaded.parameters.items()}
    graphdef, _ = params.split(
        nnx.eval_shape(lambda: CLIP(config, dtype=FLOAT32, rngs=nnx.Rngs(params=0)))
    )

    @jax.jit
    def run(parameters, images, ids):
        model: CLIP = params.merge(graphdef, parameters)
        states = {}

        def keep(name, module):
            def call(x, inner=module):
                states[name] = inner(x)
                return states[name]

            return call

        model.visual.blocks = keep("vision", model.visual.blocks)
        model.text.ln_final = keep("text", model.text.ln_final)
        image, text = model.visual(images), model.text.pool(ids)
        return states["vision"], image, states["text"], text

    frames_ours, image_ours, words_ours, text_ours = run(ours, images, ids)
    print(
        f"{name}: relative error of hidden states {relative(frames_ours, frames):.1e}, "
        f"{relative(words_ours, words):.1e}; of unit embeddings "
        f"{np.abs(unit(image_ours) - unit(image)).max():.1e}, "
        f"{np.abs(unit(text_ours) - unit(text)).max():.1e}"
    )
    assert relative(frames_ours, frames) < 1e-3
    assert relative(words_ours, words) < 1e-3
    np.testing.assert_allclose(unit(image_ours), unit(image), atol=2e-5)
    np.testing.assert_allclose(unit(text_ours), unit(text), atol=2e-5)


def test_ast_equals_transformers(tmp_path):
    torch.manual_seed(0)
    theirs = transformers.ASTForAudioClassification(transformers.ASTConfig(num_labels=527)).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    fbank = np.random.default_rng(0).normal(size=(1, 1024, 128)).astype(np.float32)
    trunk, states = theirs.audio_spectrogram_transformer, []
    trunk.layernorm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    with torch.no_grad():
        trunk(torch.tensor(fbank))
        (before,) = states
        # The LayerNorm comes after the mean of the two tokens, not before as in `transformers`.
        merged = torch.cat([before[:, :2].mean(dim=1, keepdim=True), before[:, 2:]], dim=1)
        expected = trunk.layernorm(merged).numpy()

    loaded = read(tmp_path)
    ours = {k.removeprefix("ast."): v for k, v in loaded.parameters.items()}
    config = SAVEConfig().ast
    graphdef, _ = params.split(
        nnx.eval_shape(lambda: AST(config, dtype=FLOAT32, rngs=nnx.Rngs(params=0)))
    )
    out = np.asarray(jax.jit(lambda p, x: params.merge(graphdef, p)(x))(ours, fbank))
    print(f"AST: {relative(out, expected):.1e}, {np.abs(unit(out) - unit(expected)).max():.1e}")
    assert relative(out, expected) < 1e-3
    np.testing.assert_allclose(unit(out), unit(expected), atol=2e-5)
