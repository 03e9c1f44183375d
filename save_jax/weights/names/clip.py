"""CLIP's names: OpenAI's and Hugging Face's, and ours as in `save_jax.models.clip.CLIP`."""

from save_jax.weights.table import (
    LINEAR,
    PATCHES,
    Row,
    Table,
    clip_block,
    joined_linear,
    layer_norm,
    linear,
)

TABLE = Table(
    rows=(
        Row("visual.conv1.weight", "visual.conv1.kernel", PATCHES),
        Row("visual.class_embedding", "visual.class_embedding"),
        Row("visual.positional_embedding", "visual.positional_embedding"),
        *layer_norm("visual.ln_pre", "visual.ln_pre"),
        *clip_block("visual.transformer.resblocks.*", "visual.blocks.layer"),
        *layer_norm("visual.ln_post", "visual.ln_post"),
        # The two projections are stored [in, out], unlike the linear layers.
        Row("visual.proj", "visual.proj"),
        Row("token_embedding.weight", "text.token_embedding"),
        Row("positional_embedding", "text.positional_embedding"),
        *clip_block("transformer.resblocks.*", "text.blocks.layer"),
        *layer_norm("ln_final", "text.ln_final"),
        Row("text_projection", "text.text_projection"),
        Row("logit_scale", "logit_scale"),
    ),
    # Sizes that OpenAI's TorchScript archives keep beside the parameters, and a constant.
    unused=("input_resolution", "context_length", "vocab_size", "attn_mask"),
)


def _hugging_face_block(torch: str, ours: str) -> tuple[Row, ...]:
    return (
        *joined_linear([f"{torch}.self_attn.{x}_proj" for x in "qkv"], f"{ours}.attn.in_proj"),
        *linear(f"{torch}.self_attn.out_proj", f"{ours}.attn.out_proj"),
        *layer_norm(f"{torch}.layer_norm1", f"{ours}.ln_1"),
        *linear(f"{torch}.mlp.fc1", f"{ours}.mlp.c_fc"),
        *linear(f"{torch}.mlp.fc2", f"{ours}.mlp.c_proj"),
        *layer_norm(f"{torch}.layer_norm2", f"{ours}.ln_2"),
    )


HUGGING_FACE = Table(
    rows=(
        Row("vision_model.embeddings.patch_embedding.weight", "visual.conv1.kernel", PATCHES),
        Row("vision_model.embeddings.class_embedding", "visual.class_embedding"),
        Row("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
        *layer_norm("vision_model.pre_layrnorm", "visual.ln_pre"),  # sic
        *_hugging_face_block("vision_model.encoder.layers.*", "visual.blocks.layer"),
        *layer_norm("vision_model.post_layernorm", "visual.ln_post"),
        Row("visual_projection.weight", "visual.proj", LINEAR),
        Row("text_model.embeddings.token_embedding.weight", "text.token_embedding"),
        Row("text_model.embeddings.position_embedding.weight", "text.positional_embedding"),
        *_hugging_face_block("text_model.encoder.layers.*", "text.blocks.layer"),
        *layer_norm("text_model.final_layer_norm", "text.ln_final"),
        Row("text_projection.weight", "text.text_projection", LINEAR),
        Row("logit_scale", "logit_scale"),
    ),
    unused=("*.embeddings.position_ids",),
)
