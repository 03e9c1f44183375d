"""SAVE's names (spec section 12): PyTorch's as in the paper's checkpoints, and AVIGATE's."""

from save_jax.weights.names import ast, clip
from save_jax.weights.table import Row, Table, attention, clip_block, layer_norm, linear


def _gated_fusion(torch: str, ours: str) -> tuple[Row, ...]:
    return (
        *linear(f"{torch}.attn_gate.ag_fc", f"{ours}.attn_gate.fc", bias=False),
        *linear(f"{torch}.attn_gate.ag_proj", f"{ours}.attn_gate.proj", bias=False),
        *linear(f"{torch}.ff_gate.fg_fc", f"{ours}.ff_gate.fc", bias=False),
        *linear(f"{torch}.ff_gate.fg_proj", f"{ours}.ff_gate.proj", bias=False),
        *attention(f"{torch}.cross_attn", f"{ours}.cross_attn"),
        *linear(f"{torch}.cross_ff.cross_fc", f"{ours}.cross_ff.c_fc", bias=False),
        *linear(f"{torch}.cross_ff.cross_proj", f"{ours}.cross_ff.c_proj", bias=False),
        *clip_block(torch, ours),
        *layer_norm(f"{torch}.ln_3", f"{ours}.ln_3"),
        *layer_norm(f"{torch}.ln_4", f"{ours}.ln_4"),
    )


TABLE = Table(
    rows=(
        *(row.under("clip.", "clip.") for row in clip.TABLE.rows),
        *(row.under("clip.audio.", "ast.") for row in ast.TABLE.rows),
        # Stored [in, out], like CLIP's projections.
        Row("clip.audio_projection", "audio_projection.kernel"),
        Row("query_tokens", "audio_resampler.query_tokens"),
        Row("query_position_embeddings.weight", "audio_resampler.query_positions"),
        *clip_block("Audio_Resampler.resblocks.*", "audio_resampler.blocks.layer"),
        *attention(
            "Audio_Resampler.resblocks.*.cross_attn", "audio_resampler.blocks.layer.cross_attn"
        ),
        *layer_norm("Audio_Resampler.resblocks.*.ln_3", "audio_resampler.blocks.layer.ln_3"),
        Row("frame_position_embeddings.weight", "frame_positions"),
        *_gated_fusion("transformerClip.resblocks.*", "audio_fusion.blocks.layer"),
        *_gated_fusion("transformerClip_ASR.resblocks.*", "speech_fusion.blocks.layer"),
    ),
    unused=(
        "asr_query_tokens",
        *(f"clip.{name}" for name in clip.TABLE.unused),
        *(f"clip.audio.{name}" for name in ast.TABLE.unused),
    ),
    # AVIGATE's name of the resampler.
    renamed={r"^transformer_Fusion\.": "Audio_Resampler."},
)
