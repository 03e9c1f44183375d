"""ImageBind's vision and audio towers, the teacher (spec section 8; Girdhar et al. 2023)."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from save_jax import parameters as params
from save_jax import sharding
from save_jax.batch import TEACHER_SIZE, Embed
from save_jax.config import DTYPES, matmul_precision
from save_jax.errors import UserError
from save_jax.models import layers
from save_jax.models.clip import IMAGE_MEAN, IMAGE_STD

EPSILON = 1e-6  # of every LayerNorm but the one after the audio patches
PATCH_EPSILON = 1e-5
LARGEST_SCALE = 100.0  # of the audio vectors
INITIAL_SCALE = 20.0


@dataclasses.dataclass(frozen=True)
class ImageBindConfig:
    """Sizes of both towers; `dtype` is the compute dtype, "float32" or "bfloat16"."""

    embed_dim: int = TEACHER_SIZE
    image_size: int = 224
    patch_size: int = 14
    vision_width: int = 1280
    vision_layers: int = 32
    vision_heads: int = 16
    fbank_frames: int = 204
    mel_bins: int = 128
    audio_patch: int = 16
    audio_stride: int = 10
    audio_width: int = 768
    audio_layers: int = 12
    audio_heads: int = 12
    dtype: str = "float32"

    @classmethod
    def huge(cls) -> "ImageBindConfig":
        return cls()

    @property
    def image_tokens(self) -> int:
        """The number of tokens of an image: its patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def audio_tokens(self) -> int:
        """The number of tokens of a filterbank: its patches and the class token."""
        rows, columns = (
            (n - self.audio_patch) // self.audio_stride + 1
            for n in (self.mel_bins, self.fbank_frames)
        )
        return rows * columns + 1


VARIANTS = {"huge": ImageBindConfig.huge()}


def _unit(x: Float[Array, "batch dim"]) -> Float[Array, "batch dim"]:
    """Normalises to unit length, in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class _Trunk(nnx.Module):
    """Patches in, one vector per input out: what both towers share."""

    def __init__(
        self,
        config: ImageBindConfig,
        *,
        tokens: int,
        width: int,
        depth: int,
        heads: int,
        rngs: nnx.Rngs,
        norm_first: bool = False,
        bias_kv: bool = False,
    ):
        dtype, normal = jnp.dtype(config.dtype), nnx.initializers.normal(layers.INIT_STD)
        self.cls_token = nnx.Param(normal(rngs.params(), (width,)))
        self.pos_embed = nnx.Param(normal(rngs.params(), (tokens, width)))
        self.ln_pre = layers.layer_norm(width, EPSILON, dtype, rngs) if norm_first else None
        self.blocks = layers.Stack(
            lambda rngs: layers.Block(
                width,
                heads,
                activation=layers.exact_gelu,
                epsilon=EPSILON,
                dtype=dtype,
                rngs=rngs,
                bias_kv=bias_kv,
            ),
            depth,
            rngs,
        )
        self.head_norm = layers.layer_norm(width, EPSILON, dtype, rngs)
        self.head = nnx.Linear(width, config.embed_dim, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, patches: Float[Array, "batch patches width"]) -> Float[Array, "batch dim"]:
        """Returns the unit vector of the class token."""
        b, _, width = patches.shape
        token = jnp.broadcast_to(self.cls_token[...].astype(patches.dtype), (b, 1, width))
        x = jnp.concatenate([token, patches], axis=1) + self.pos_embed[...].astype(patches.dtype)
        x = self.blocks(x if self.ln_pre is None else self.ln_pre(x))
        return _unit(self.head(self.head_norm(x[:, 0])))


class VisionTower(nnx.Module):
    """Images in, one unit vector per image out."""

    def __init__(self, config: ImageBindConfig, *, rngs: nnx.Rngs):
        width, self.dtype = config.vision_width, jnp.dtype(config.dtype)
        self.patch_size = config.patch_size
        # The original's convolution spans two frames and sees the same image in both: the matrix
        # here is the sum of its two halves (see the table of weights).
        self.patch_embed = nnx.Linear(
            3 * config.patch_size**2, width, use_bias=False, dtype=self.dtype, rngs=rngs
        )
        self.trunk = _Trunk(
            config,
            tokens=config.image_tokens,
            width=width,
            depth=config.vision_layers,
            heads=config.vision_heads,
            rngs=rngs,
            norm_first=True,
        )

    def __call__(self, images: UInt8[Array, "batch height width 3"]) -> Float[Array, "batch dim"]:
        x = images.astype(jnp.float32) / 255
        x = ((x - jnp.array(IMAGE_MEAN)) / jnp.array(IMAGE_STD)).astype(self.dtype)
        return self.trunk(self.patch_embed(layers.patches(x, self.patch_size)))


class AudioTower(nnx.Module):
    """Filterbanks of two seconds in, one vector of length 20 per filterbank out."""

    def __init__(self, config: ImageBindConfig, *, rngs: nnx.Rngs):
        width, self.dtype = config.audio_width, jnp.dtype(config.dtype)
        self.patch_embed = nnx.Conv(
            1,
            width,
            (config.audio_patch, config.audio_patch),
            strides=config.audio_stride,
            padding="VALID",
            use_bias=False,
            dtype=self.dtype,
            rngs=rngs,
        )
        self.patch_norm = layers.layer_norm(width, PATCH_EPSILON, self.dtype, rngs)
        self.trunk = _Trunk(
            config,
            tokens=config.audio_tokens,
            width=width,
            depth=config.audio_layers,
            heads=config.audio_heads,
            rngs=rngs,
            bias_kv=True,
        )
        self.log_logit_scale = nnx.Param(jnp.log(jnp.float32(INITIAL_SCALE)))

    def __call__(self, fbank: Float[Array, "batch time mel"]) -> Float[Array, "batch dim"]:
        # An image of frequency (rows) × time (columns) with one channel, as in AST.
        x = self.patch_embed(fbank.astype(self.dtype).swapaxes(1, 2)[..., None])
        x = self.patch_norm(x.reshape(x.shape[0], -1, x.shape[-1]))
        return self.trunk(x) * jnp.minimum(jnp.exp(self.log_logit_scale[...]), LARGEST_SCALE)


class ImageBind(nnx.Module):
    """Both towers; a clip's vector is the mean of its frames', or of its pieces of sound's."""

    def __init__(self, config: ImageBindConfig, rngs: nnx.Rngs):
        self.vision = VisionTower(config, rngs=rngs)
        self.audio = AudioTower(config, rngs=rngs)

    def embed_video(
        self, frames: UInt8[Array, "clips frames height width 3"]
    ) -> Float[Array, "clips dim"]:
        vectors = self.vision(frames.reshape(-1, *frames.shape[2:]))
        return vectors.reshape(*frames.shape[:2], -1).mean(axis=1)

    def embed_audio(
        self, fbanks: Float[Array, "clips pieces time mel"]
    ) -> Float[Array, "clips dim"]:
        vectors = self.audio(fbanks.reshape(-1, *fbanks.shape[2:]))
        return vectors.reshape(*fbanks.shape[:2], -1).mean(axis=1)


def abstract(config: ImageBindConfig) -> tuple[params.Structure, params.Parameters]:
    """Returns structure and shapes, without computing any parameter."""
    return params.split(nnx.eval_shape(lambda: ImageBind(config, nnx.Rngs(params=0))))


def make_embed(
    config: ImageBindConfig,
    load: Callable[[], Mapping[str, np.ndarray | jax.Array]],
    devices: Sequence[Any] | None = None,
) -> Embed:
    """Compiles the towers for this process's devices, one clip per device at a time.

    The frames of one clip keep an accelerator busy, and a clip's vector does not depend on the
    clips that came with it, not even in its last bit.

    Args:
        config: sizes and compute dtype. In float32 products are computed in full precision.
        load: gives the parameters of `ImageBind`, by name; called when they are first needed, since
            they are gigabytes and nothing may be left to compute.
        devices: where to compute; None = all of this process's.

    Raises:
        UserError: there is no such compute dtype.
    """
    if config.dtype not in DTYPES:
        raise UserError(
            f"expected the teacher's dtype {' or '.join(DTYPES)}, found {config.dtype!r}"
        )
    graphdef, _ = abstract(config)
    mesh = sharding.make_mesh({sharding.DATA: -1}, devices or jax.local_devices())
    split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    clips = mesh.size

    @functools.cache
    def parameters() -> params.Parameters:
        return jax.device_put(load(), whole)

    def on_devices(method: str) -> Callable[[np.ndarray], np.ndarray]:
        @jax.jit
        def run(parameters, inputs):
            with jax.default_matmul_precision(matmul_precision(config.dtype)):
                return getattr(params.merge(graphdef, parameters), method)(inputs)

        def call(inputs: np.ndarray) -> np.ndarray:
            results = []
            for start in range(0, len(inputs), clips):
                part = inputs[start : start + clips]
                fill = np.repeat(part[-1:], clips - len(part), axis=0)
                part = jax.device_put(np.concatenate([part, fill]), split)
                results.append(run(parameters(), part))
            rows = [np.asarray(result, np.float32) for result in results]
            return np.concatenate(rows)[: len(inputs)]

        return call

    return Embed(config, clips, on_devices("embed_video"), on_devices("embed_audio"))
