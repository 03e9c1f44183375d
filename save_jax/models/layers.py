"""Attention, MLP and transformer blocks that more than one model uses.

Parameters are float32; `dtype` is the compute dtype. Softmax and LayerNorm statistics are float32
whatever the dtype. Parameter names follow CLIP's, so that a checkpoint table reads like a list.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from save_jax import sharding

Initializer = nnx.Initializer
Activation = Callable[[Array], Array]

# What a block keeps for the backward pass: everything; the results of its matrix products with
# parameters; its input alone, so that all of it is recomputed.
REMAT_POLICIES = {
    "none": None,
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "blocks": jax.checkpoint_policies.nothing_saveable,
}
ATTENTION_KERNELS = ("xla", "cudnn")  # the second: fused, NVIDIA only, bfloat16 only

INIT_STD = 0.02  # of what starts from nothing (spec section 7); it belongs to a width near 512


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Applies CLIP's approximation of GELU, x·σ(1.702x) (spec section 2)."""
    return x * jax.nn.sigmoid(1.702 * x)


def exact_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Applies GELU by the error function, as in AST and ImageBind (spec sections 2 and 8)."""
    return jax.nn.gelu(x, approximate=False)


def layer_norm(width: int, epsilon: float, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Makes a LayerNorm with statistics in float32 and epsilon inside the root."""
    # The fast variance E[x²] − E[x]² cancels catastrophically where |mean| >> std.
    return nnx.LayerNorm(width, epsilon=epsilon, dtype=dtype, use_fast_variance=False, rngs=rngs)


class BlockInit(NamedTuple):
    """Initialisers of a block's four matrices; biases start at zero."""

    in_proj: Initializer
    out_proj: Initializer
    c_fc: Initializer
    c_proj: Initializer

    @classmethod
    def clip(cls, width: int, layers: int) -> "BlockInit":
        """Returns CLIP's, for towers trained from scratch: residual branches scaled by depth."""
        normal = nnx.initializers.normal
        residual = width**-0.5 * (2 * layers) ** -0.5
        return cls(
            normal(width**-0.5), normal(residual), normal((2 * width) ** -0.5), normal(residual)
        )

    @classmethod
    def normal(cls, std: float = INIT_STD) -> "BlockInit":
        """Returns those of spec section 7: normal, with Xavier-uniform in-projections."""
        normal = nnx.initializers.normal(std)
        return cls(nnx.initializers.xavier_uniform(), normal, normal, normal)


class Attention(nnx.Module):
    """Multi-head attention with one fused in-projection, as in PyTorch's MultiheadAttention."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        init: BlockInit | None = None,
        bias_kv: bool = False,
    ):
        init = init or BlockInit.normal()
        if width % heads:
            raise ValueError(f"attention width {width} is not a multiple of its {heads} heads")
        self.heads = heads
        self.kernel = ATTENTION_KERNELS[0]
        self.in_proj = nnx.Linear(
            width, 3 * width, kernel_init=init.in_proj, dtype=dtype, rngs=rngs
        )
        self.out_proj = nnx.Linear(width, width, kernel_init=init.out_proj, dtype=dtype, rngs=rngs)
        self.bias_kv = bias_kv
        if bias_kv:
            # One more key and value, learned and the same for every input, as ImageBind has.
            self.bias_k = nnx.Param(nnx.initializers.normal(INIT_STD)(rngs.params(), (width,)))
            self.bias_v = nnx.Param(nnx.initializers.normal(INIT_STD)(rngs.params(), (width,)))

    def __call__(
        self,
        x: Float[Array, "batch queries width"],
        context: Float[Array, "batch keys width"] | None = None,
        *,
        causal: bool = False,
    ) -> Float[Array, "batch queries width"]:
        """Attends from `x` to `context`, or to `x` itself when there is none."""
        if context is None:
            q, k, v = jnp.split(self.in_proj(x), 3, axis=-1)
        else:
            assert self.in_proj.bias is not None  # made with one, above
            kernel, bias, dtype = self.in_proj.kernel[...], self.in_proj.bias[...], x.dtype
            width = x.shape[-1]
            q = x @ kernel[:, :width].astype(dtype) + bias[:width].astype(dtype)
            kv = context @ kernel[:, width:].astype(dtype) + bias[width:].astype(dtype)
            k, v = jnp.split(kv, 2, axis=-1)
        if self.bias_kv:
            k, v = _append(k, self.bias_k[...]), _append(v, self.bias_v[...])
        q, k, v = (a.reshape(*a.shape[:-1], self.heads, -1) for a in (q, k, v))
        out = attend(q, k, v, causal=causal, kernel=self.kernel)
        return self.out_proj(out.reshape(x.shape))


def attend(
    q: Float[Array, "batch queries heads channels"],
    k: Float[Array, "batch keys heads channels"],
    v: Float[Array, "batch keys heads channels"],
    *,
    causal: bool,
    kernel: str,
) -> Float[Array, "batch queries heads channels"]:
    """Computes softmax(q·kᵀ / √channels)·v for each head.

    JAX has no gradient of cuDNN's kernel for odd numbers of queries or keys, so that kernel gets
    even ones. The result is the same: no query sees the added key, and what the added query finds
    is cut off.

    Args:
        q, k, v: queries, keys and values.
        causal: query n sees keys 0 to n only.
        kernel: one of ATTENTION_KERNELS.
    """
    queries, keys = q.shape[1], k.shape[1]
    query_lengths = key_lengths = None
    if kernel == "cudnn":
        q, k, v = _even(q), _even(k), _even(v)
        if keys % 2:
            # The added query counts as a real one: a softmax over no keys is no number, which the
            # gradient's zeros would not remove.
            query_lengths, key_lengths = _lengths(q, q.shape[1]), _lengths(k, keys)
    out = jax.nn.dot_product_attention(
        *(q, k, v),
        is_causal=causal,
        query_seq_lengths=query_lengths,
        key_value_seq_lengths=key_lengths,
        implementation=cast(Literal["xla", "cudnn"], kernel),
    )
    return out[:, :queries]


def _even(
    x: Float[Array, "batch tokens heads channels"],
) -> Float[Array, "batch even_tokens heads channels"]:
    """Appends a token of zeros to an odd number of tokens."""
    return jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) if x.shape[1] % 2 else x


def _lengths(x: Float[Array, "batch ..."], length: int) -> Int[Array, " batch"]:
    """Returns the same length for each row of x, sharded as x is."""
    return sharding.shard_rows(jnp.full(len(x), length, jnp.int32))


def _append(
    x: Float[Array, "batch tokens width"], token: Float[Array, " width"]
) -> Float[Array, "batch tokens+1 width"]:
    last = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, x.shape[2]))
    return jnp.concatenate([x, last], axis=1)


class MLP(nnx.Module):
    """Two linear layers around an activation."""

    def __init__(
        self,
        width: int,
        *,
        activation: Activation,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        init: BlockInit | None = None,
        use_bias: bool = True,
        expansion: int = 4,
    ):
        init = init or BlockInit.normal()
        self.activation = activation
        self.c_fc = nnx.Linear(
            width,
            expansion * width,
            use_bias=use_bias,
            dtype=dtype,
            kernel_init=init.c_fc,
            rngs=rngs,
        )
        self.c_proj = nnx.Linear(
            expansion * width,
            width,
            use_bias=use_bias,
            dtype=dtype,
            kernel_init=init.c_proj,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nnx.Module):
    """Pre-LayerNorm transformer block of CLIP, AST and ImageBind (spec sections 2 and 8)."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        activation: Activation,
        epsilon: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        init: BlockInit | None = None,
        causal: bool = False,
        bias_kv: bool = False,
    ):
        self.causal = causal
        self.ln_1 = layer_norm(width, epsilon, dtype, rngs)
        self.attn = Attention(width, heads, dtype=dtype, rngs=rngs, init=init, bias_kv=bias_kv)
        self.ln_2 = layer_norm(width, epsilon, dtype, rngs)
        self.mlp = MLP(width, activation=activation, dtype=dtype, rngs=rngs, init=init)

    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        x = x + self.attn(self.ln_1(x), causal=self.causal)
        return x + self.mlp(self.ln_2(x))


class Stack(nnx.Module):
    """`depth` blocks of one kind, their parameters stacked along a leading layer axis.

    One `lax.scan` runs them: the program holds one block's code whatever the depth, which keeps
    the compile time of twelve layers near that of one. Sharded parameters (`save_jax.sharding`)
    are all-gathered one layer at a time.
    """

    def __init__(self, make_block: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs):
        self.depth = depth
        self.remat = "none"
        create = nnx.split_rngs(splits=depth)(nnx.vmap(make_block, in_axes=0, out_axes=0))
        self.layer = create(rngs)

    def __call__(
        self, x: Float[Array, "batch tokens width"], *context: Array
    ) -> Float[Array, "batch tokens width"]:
        """Runs x through the blocks; every block also gets the `context` arrays unchanged."""
        return self._scan(x, context, None)[0]

    def observed(
        self, observe: Callable[..., Array], x: Float[Array, "batch tokens width"], *context: Array
    ) -> tuple[Float[Array, "batch tokens width"], Float[Array, "layers ..."]]:
        """Runs x through the blocks, and returns what `observe` finds in each of them too.

        Args:
            observe: (block, its input, *context) -> an array.
            x, context: as in a call.
        """
        return self._scan(x, context, observe)

    def _scan(
        self, x: Array, context: tuple[Array, ...], observe: Callable[..., Array] | None
    ) -> tuple[Array, Any]:
        graphdef, layers = nnx.split(self.layer)

        def body(x, layer):
            block = nnx.merge(graphdef, sharding.all_gather(layer))
            x = sharding.shard_rows(x)
            return block(x, *context), observe(block, x, *context) if observe else None

        run: Callable[..., Any] = body
        if self.remat != "none":
            run = jax.checkpoint(body, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        return jax.lax.scan(run, x, layers)


def set_execution(model: nnx.Module, *, remat: str, attention: str) -> None:
    """Sets, in place, how a model is computed; its results stay the same.

    Args:
        model: any model made of the layers above.
        remat: one of REMAT_POLICIES, for every Stack.
        attention: one of ATTENTION_KERNELS, for every Attention.
    """
    for _, module in nnx.iter_graph(model):
        if isinstance(module, Stack):
            module.remat = remat
        elif isinstance(module, Attention):
            module.kernel = attention


def patches(
    images: Float[Array, "batch height width channels"], size: int
) -> Float[Array, "batch patches features"]:
    """Cuts images into non-overlapping patches, row by row; features are (y, x, channel).

    A strided convolution whose stride is its kernel is a matrix product over these.
    """
    b, h, w, c = images.shape
    if h % size or w % size:
        raise ValueError(f"images of {h}x{w} pixels do not divide into patches of {size}")
    grid = images.reshape(b, h // size, size, w // size, size, c)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(b, math.prod((h // size, w // size)), -1)
