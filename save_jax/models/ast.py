"""The audio spectrogram transformer (spec section 2; Gong et al. 2021), without its classifier."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from save_jax.batch import FBANK_FRAMES, MEL_BINS
from save_jax.models import layers

EPSILON = 1e-6  # of every LayerNorm in the trunk


@dataclasses.dataclass(frozen=True)
class ASTConfig:
    """Sizes of the trunk; the input is `fbank_frames` × `mel_bins`."""

    fbank_frames: int = FBANK_FRAMES
    mel_bins: int = MEL_BINS
    patch_size: int = 16
    stride: int = 10
    width: int = 768
    layers: int = 12
    heads: int = 12

    @property
    def grid(self) -> tuple[int, int]:
        """The numbers of patches along frequency and along time."""
        rows, columns = (
            (n - self.patch_size) // self.stride + 1 for n in (self.mel_bins, self.fbank_frames)
        )
        return rows, columns

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]


VARIANTS = {"base": ASTConfig()}


class AST(nnx.Module):
    """Filterbanks in, one state per patch out, with the pooled token first."""

    def __init__(
        self,
        config: ASTConfig,
        *,
        init_std: float = layers.INIT_STD,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        width, normal = config.width, nnx.initializers.normal(init_std)
        init = layers.BlockInit(normal, normal, normal, normal)
        self.patch_embed = nnx.Conv(
            1,
            width,
            (config.patch_size, config.patch_size),
            strides=config.stride,
            padding="VALID",
            dtype=dtype,
            rngs=rngs,
        )
        self.cls_token = nnx.Param(normal(rngs.params(), (width,)))
        self.dist_token = nnx.Param(normal(rngs.params(), (width,)))
        self.pos_embed = nnx.Param(normal(rngs.params(), (config.patches + 2, width)))
        self.blocks = layers.Stack(
            lambda rngs: layers.Block(
                width,
                config.heads,
                activation=layers.exact_gelu,
                epsilon=EPSILON,
                dtype=dtype,
                rngs=rngs,
                init=init,
            ),
            config.layers,
            rngs,
        )
        self.norm = layers.layer_norm(width, EPSILON, dtype, rngs)

    def __call__(self, fbank: Float[Array, "batch time mel"]) -> Float[Array, "batch tokens width"]:
        """Returns the trunk's states after the final LayerNorm."""
        return self.norm(self.trunk(fbank))

    def trunk(self, fbank: Float[Array, "batch time mel"]) -> Float[Array, "batch tokens width"]:
        """Returns [mean of class and distillation tokens; patch tokens], before `norm`."""
        # The trunk sees an image of frequency (rows) × time (columns) with one channel.
        x = self.patch_embed(fbank.swapaxes(1, 2)[..., None])
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        tokens = jnp.stack([self.cls_token[...], self.dist_token[...]]).astype(x.dtype)
        tokens = jnp.broadcast_to(tokens, (x.shape[0], *tokens.shape))
        x = jnp.concatenate([tokens, x], axis=1) + self.pos_embed[...].astype(x.dtype)
        x = self.blocks(x)
        return jnp.concatenate([x[:, :2].mean(1, keepdims=True), x[:, 2:]], axis=1)
