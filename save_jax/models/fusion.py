"""The audio resampler and the gated fusion (spec sections 3 and 4; AVIGATE's)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from save_jax.models import layers

EPSILON = 1e-12  # of every LayerNorm in this file; CLIP's own is 1e-5


class ResamplerBlock(nnx.Module):
    """Self-attention over the queries, cross-attention to the sound, MLP; residual around each."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        init_std: float = layers.INIT_STD,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        init = layers.BlockInit.normal(init_std)
        self.attn = layers.Attention(width, heads, init=init, dtype=dtype, rngs=rngs)
        self.cross_attn = layers.Attention(width, heads, init=init, dtype=dtype, rngs=rngs)
        self.mlp = layers.MLP(
            width, activation=layers.quick_gelu, init=init, dtype=dtype, rngs=rngs
        )
        self.ln_1 = layers.layer_norm(width, EPSILON, dtype, rngs)
        self.ln_2 = layers.layer_norm(width, EPSILON, dtype, rngs)
        self.ln_3 = layers.layer_norm(width, EPSILON, dtype, rngs)

    def __call__(
        self, q: Float[Array, "batch queries width"], a: Float[Array, "batch tokens width"]
    ) -> Float[Array, "batch queries width"]:
        q = q + self.attn(self.ln_1(q))
        q = q + self.cross_attn(self.ln_3(q), self.ln_3(a))  # the same LayerNorm on both
        return q + self.mlp(self.ln_2(q))


class AudioResampler(nnx.Module):
    """A fixed number of learned queries that summarise the sound's tokens (spec section 3)."""

    def __init__(
        self,
        width: int,
        heads: int,
        depth: int,
        queries: int,
        *,
        init_std: float = layers.INIT_STD,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        # Stored [width, queries], as the reference does: the orthogonal vectors are its columns.
        self.query_tokens = nnx.Param(
            nnx.initializers.orthogonal()(rngs.params(), (width, queries))
        )
        self.query_positions = nnx.Param(
            nnx.initializers.normal(init_std)(rngs.params(), (queries, width))
        )
        self.blocks = layers.Stack(
            lambda rngs: ResamplerBlock(width, heads, init_std=init_std, dtype=dtype, rngs=rngs),
            depth,
            rngs,
        )

    def __call__(
        self, a: Float[Array, "batch tokens width"]
    ) -> Float[Array, "batch queries width"]:
        q = (self.query_tokens[...].T + self.query_positions[...]).astype(self.dtype)
        return self.blocks(jnp.broadcast_to(q, (a.shape[0], *q.shape)), a)


class Gate(nnx.Module):
    """One scalar per clip in (−1, 1): how much of a modality to let in (spec section 4, step 1)."""

    def __init__(
        self, width: int, *, init_std: float = layers.INIT_STD, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        def linear(n_in: int, n_out: int) -> nnx.Linear:
            return nnx.Linear(
                n_in,
                n_out,
                use_bias=False,
                kernel_init=nnx.initializers.normal(init_std),
                dtype=dtype,
                rngs=rngs,
            )

        self.fc = linear(2 * width, width // 2)
        self.proj = linear(width // 2, 1)

    def __call__(self, summary: Float[Array, "batch features"]) -> Float[Array, "batch 1 1"]:
        return jnp.tanh(self.proj(layers.quick_gelu(self.fc(summary))))[..., None]


class FusionBlock(nnx.Module):
    """One block of gated fusion: the modality comes in through two gates (spec section 4)."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        init_std: float = layers.INIT_STD,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        init = layers.BlockInit.normal(init_std)
        self.attn_gate = Gate(width, init_std=init_std, dtype=dtype, rngs=rngs)
        self.ff_gate = Gate(width, init_std=init_std, dtype=dtype, rngs=rngs)
        self.cross_attn = layers.Attention(width, heads, init=init, dtype=dtype, rngs=rngs)
        self.cross_ff = layers.MLP(
            width, activation=layers.quick_gelu, init=init, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.attn = layers.Attention(width, heads, init=init, dtype=dtype, rngs=rngs)
        self.mlp = layers.MLP(
            width, activation=layers.quick_gelu, init=init, dtype=dtype, rngs=rngs
        )
        self.ln_1 = layers.layer_norm(width, EPSILON, dtype, rngs)
        self.ln_2 = layers.layer_norm(width, EPSILON, dtype, rngs)
        self.ln_3 = layers.layer_norm(width, EPSILON, dtype, rngs)
        self.ln_4 = layers.layer_norm(width, EPSILON, dtype, rngs)

    def gates(
        self, x: Float[Array, "batch frames width"], m: Float[Array, "batch tokens width"]
    ) -> tuple[Float[Array, "batch 1 1"], Float[Array, "batch 1 1"]]:
        """Returns the gates of cross-attention and of the feed-forward layer."""
        # Both gates see the block's input; the means run over padded frames too.
        summary = jnp.concatenate([x.mean(axis=1), m.mean(axis=1)], axis=-1)
        return self.attn_gate(summary), self.ff_gate(summary)

    def __call__(
        self, x: Float[Array, "batch frames width"], m: Float[Array, "batch tokens width"]
    ) -> Float[Array, "batch frames width"]:
        attn_gate, ff_gate = self.gates(x, m)
        x = x + attn_gate * self.cross_attn(self.ln_3(x), m)
        x = x + ff_gate * self.cross_ff(self.ln_4(x))
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GatedFusion(nnx.Module):
    """Frames that have taken in a modality's tokens; the tokens themselves never change."""

    def __init__(
        self,
        width: int,
        heads: int,
        depth: int,
        *,
        init_std: float = layers.INIT_STD,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.blocks = layers.Stack(
            lambda rngs: FusionBlock(width, heads, init_std=init_std, dtype=dtype, rngs=rngs),
            depth,
            rngs,
        )

    def __call__(
        self, v: Float[Array, "batch frames width"], m: Float[Array, "batch tokens width"]
    ) -> Float[Array, "batch frames width"]:
        return self.blocks(v, m)

    def with_gates(
        self, v: Float[Array, "batch frames width"], m: Float[Array, "batch tokens width"]
    ) -> tuple[Float[Array, "batch frames width"], Float[Array, "batch layers 2"]]:
        """Returns the frames as a call does, and each block's gates: attention, feed-forward."""

        def gates(block: FusionBlock, x: Array, m: Array) -> Array:
            return jnp.concatenate(block.gates(x, m), axis=-1)[:, 0]

        fused, found = self.blocks.observed(gates, v, m)
        return fused, found.swapaxes(0, 1)
