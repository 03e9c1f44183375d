"""CLIP's names: PyTorch's as in OpenAI's checkpoints, ours as in `save_jax.models.clip.CLIP`."""

from save_jax.weights.tables import PATCHES, Row, Table, clip_block, layer_norm

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
    # Sizes that OpenAI's TorchScript archives keep beside the parameters.
    unused=("input_resolution", "context_length", "vocab_size"),
)
