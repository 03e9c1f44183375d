"""AST's names: the original's and Hugging Face's, and ours as in `save_jax.models.ast.AST`."""

from save_jax.weights.table import (
    CONVOLUTION,
    LINEAR,
    ONE_LEADING,
    TWO_LEADING,
    Row,
    Table,
    joined_linear,
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

_THEIRS = "encoder.layer.*"

HUGGING_FACE = Table(
    rows=(
        Row("embeddings.cls_token", "cls_token", TWO_LEADING),
        Row("embeddings.distillation_token", "dist_token", TWO_LEADING),
        Row("embeddings.position_embeddings", "pos_embed", ONE_LEADING),
        Row("embeddings.patch_embeddings.projection.weight", "patch_embed.kernel", CONVOLUTION),
        Row("embeddings.patch_embeddings.projection.bias", "patch_embed.bias"),
        *layer_norm(f"{_THEIRS}.layernorm_before", f"{_OURS}.ln_1"),
        *joined_linear(
            [f"{_THEIRS}.attention.attention.{x}" for x in ("query", "key", "value")],
            f"{_OURS}.attn.in_proj",
        ),
        *linear(f"{_THEIRS}.attention.output.dense", f"{_OURS}.attn.out_proj"),
        *layer_norm(f"{_THEIRS}.layernorm_after", f"{_OURS}.ln_2"),
        *linear(f"{_THEIRS}.intermediate.dense", f"{_OURS}.mlp.c_fc"),
        *linear(f"{_THEIRS}.output.dense", f"{_OURS}.mlp.c_proj"),
        *layer_norm("layernorm", "norm"),
    ),
    unused=("classifier.*",),
    renamed={
        # The model without its classifier has no prefix.
        r"^audio_spectrogram_transformer\.": "",
        # Names that modules have in transformers 5, whose files keep those above.
        r"^layers\.": "encoder.layer.",
        r"\.attention\.q_proj\.": ".attention.attention.query.",
        r"\.attention\.k_proj\.": ".attention.attention.key.",
        r"\.attention\.v_proj\.": ".attention.attention.value.",
        r"\.attention\.o_proj\.": ".attention.output.dense.",
        r"\.mlp\.fc1\.": ".intermediate.dense.",
        r"\.mlp\.fc2\.": ".output.dense.",
    },
)
