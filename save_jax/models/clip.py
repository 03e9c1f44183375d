"""CLIP's vision and text towers (spec section 2; Radford et al. 2021)."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from save_jax.batch import IMAGE_SIZE
from save_jax.models import layers

EPSILON = 1e-5  # of every LayerNorm in both towers
INITIAL_LOGIT_SCALE = 2.6592600  # ln(1/0.07), where CLIP's training starts

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1] (spec section 1)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Sizes of both towers; lengths in tokens, sides in pixels."""

    embed_dim: int = 512
    image_size: int = IMAGE_SIZE
    patch_size: int = 32
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    vocab_size: int = 49408
    context_length: int = 77
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8

    @classmethod
    def vit_b32(cls) -> "CLIPConfig":
        return cls()

    @classmethod
    def vit_b16(cls) -> "CLIPConfig":
        return cls(patch_size=16)

    @classmethod
    def vit_l14(cls, image_size: int = IMAGE_SIZE) -> "CLIPConfig":
        return cls(
            embed_dim=768,
            image_size=image_size,
            patch_size=14,
            vision_width=1024,
            vision_layers=24,
            vision_heads=16,
            text_width=768,
            text_heads=12,
        )

    @property
    def image_tokens(self) -> int:
        """The number of tokens of an image: its patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


VARIANTS = {
    "ViT-B/32": CLIPConfig.vit_b32(),
    "ViT-B/16": CLIPConfig.vit_b16(),
    "ViT-L/14": CLIPConfig.vit_l14(),
    "ViT-L/14@336px": CLIPConfig.vit_l14(image_size=336),
}


class VisionTransformer(nnx.Module):
    """Images in, one embedding per image out: the projected class token."""

    def __init__(self, config: CLIPConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, normal = config.vision_width, nnx.initializers.normal(config.vision_width**-0.5)
        init = layers.BlockInit.clip(width, config.vision_layers)
        self.patch_size = config.patch_size
        # CLIP's bias-free patch convolution, as the matrix product that it is.
        self.conv1 = nnx.Linear(
            3 * config.patch_size**2, width, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.class_embedding = nnx.Param(normal(rngs.params(), (width,)))
        self.positional_embedding = nnx.Param(normal(rngs.params(), (config.image_tokens, width)))
        self.ln_pre = layers.layer_norm(width, EPSILON, dtype, rngs)
        self.blocks = layers.Stack(
            lambda rngs: layers.Block(
                width,
                config.vision_heads,
                activation=layers.quick_gelu,
                epsilon=EPSILON,
                dtype=dtype,
                rngs=rngs,
                init=init,
            ),
            config.vision_layers,
            rngs,
        )
        self.ln_post = layers.layer_norm(width, EPSILON, dtype, rngs)
        self.proj = nnx.Param(normal(rngs.params(), (width, config.embed_dim)))

    def __call__(self, images: Float[Array, "batch height width 3"]) -> Float[Array, "batch dim"]:
        x = self.conv1(layers.patches(images, self.patch_size))
        token = jnp.broadcast_to(
            self.class_embedding[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1])
        )
        x = jnp.concatenate([token, x], axis=1) + self.positional_embedding[...].astype(x.dtype)
        x = self.blocks(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj[...].astype(x.dtype)


class TextTransformer(nnx.Module):
    """Byte-pair ids in, one projected state per token out."""

    def __init__(self, config: CLIPConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, normal = config.text_width, nnx.initializers.normal
        init = layers.BlockInit.clip(width, config.text_layers)
        self.dtype = dtype
        self.token_embedding = nnx.Param(normal(0.02)(rngs.params(), (config.vocab_size, width)))
        self.positional_embedding = nnx.Param(
            normal(0.01)(rngs.params(), (config.context_length, width))
        )
        self.blocks = layers.Stack(
            lambda rngs: layers.Block(
                width,
                config.text_heads,
                activation=layers.quick_gelu,
                epsilon=EPSILON,
                dtype=dtype,
                rngs=rngs,
                init=init,
                causal=True,
            ),
            config.text_layers,
            rngs,
        )
        self.ln_final = layers.layer_norm(width, EPSILON, dtype, rngs)
        self.text_projection = nnx.Param(
            normal(width**-0.5)(rngs.params(), (width, config.embed_dim))
        )

    def __call__(self, ids: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens dim"]:
        """Returns all token states, padding included, as speech uses them."""
        x = self.token_embedding[...][ids] + self.positional_embedding[: ids.shape[1]]
        x = self.ln_final(self.blocks(x.astype(self.dtype)))
        return x @ self.text_projection[...].astype(x.dtype)

    def pool(self, ids: Int[Array, "batch tokens"]) -> Float[Array, "batch dim"]:
        """Returns one embedding per text: the state at the end token, which has the largest id."""
        return jnp.take_along_axis(self(ids), ids.argmax(axis=1)[:, None, None], axis=1)[:, 0]


class CLIP(nnx.Module):
    """Both towers and the learned temperature."""

    def __init__(self, config: CLIPConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.visual = VisionTransformer(config, dtype=dtype, rngs=rngs)
        self.text = TextTransformer(config, dtype=dtype, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.float32(INITIAL_LOGIT_SCALE))
