"""AST's names: PyTorch's as in the original checkpoints, ours as in `save_jax.models.ast.AST`."""

from save_jax.weights.tables import (
    CONVOLUTION,
    LINEAR,
    ONE_LEADING,
    TWO_LEADING,
    Row,
    Table,
    layer_norm,
    linear,
)

_THEIRS, _OURS = "v.blocks.*", "blocks.layer"

TABLE = Table(
    rows=(
        Row("v.cls_token", "cls_token", TWO_LEADING),
        Row("v.dist_token", "dist_token", TWO_LEADING),
        Row("v.pos_embed", "pos_embed", ONE_LEADING),
        Row("v.patch_embed.proj.weight", "patch_embed.kernel", CONVOLUTION),
        Row("v.patch_embed.proj.bias", "patch_embed.bias"),
        *layer_norm(f"{_THEIRS}.norm1", f"{_OURS}.ln_1"),
        Row(f"{_THEIRS}.attn.qkv.weight", f"{_OURS}.attn.in_proj.kernel", LINEAR),
        Row(f"{_THEIRS}.attn.qkv.bias", f"{_OURS}.attn.in_proj.bias"),
        *linear(f"{_THEIRS}.attn.proj", f"{_OURS}.attn.out_proj"),
        *layer_norm(f"{_THEIRS}.norm2", f"{_OURS}.ln_2"),
        *linear(f"{_THEIRS}.mlp.fc1", f"{_OURS}.mlp.c_fc"),
        *linear(f"{_THEIRS}.mlp.fc2", f"{_OURS}.mlp.c_proj"),
        *layer_norm("v.norm", "norm"),
    ),
    # Classifiers, of AudioSet's labels and of ImageNet's.
    unused=("v.head*", "mlp_head*"),
)
