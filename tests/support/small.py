"""The model at a size that tests can afford, in PyTorch and in JAX with the same weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from save_jax import parameters as params
from save_jax.batch import Batch
from save_jax.models.ast import ASTConfig
from save_jax.models.clip import CLIPConfig
from save_jax.models.save import SAVE, SAVEConfig
from save_jax.weights.names import save as table
from save_jax.weights.table import from_torch
from tests.support import reference

SIZES = reference.Sizes(
    embed_dim=128,
    image_size=32,
    patch_size=8,
    vision_width=96,
    vision_layers=2,
    vision_heads=3,
    vocab_size=100,
    context_length=16,
    text_width=128,
    text_layers=3,
    text_heads=4,
    fbank_frames=56,
    mel_bins=36,
    audio_width=48,
    audio_layers=2,
    audio_heads=4,
    fusion_layers=2,
    fusion_heads=2,
    queries=5,
)
AVIGATE = {"vision_weight": 0.95, "sound_weight": 0.05, "speech_weight": 0.0}
CLIP4CLIP = {"sound_weight": 0.0, "speech_weight": 0.0, "frame_positions": False}
TEACHER = 24  # width of the teacher's vectors here


def config(sizes: reference.Sizes = SIZES, dtype: str = "float32") -> SAVEConfig:
    """Our configuration of the same sizes."""
    return SAVEConfig(
        clip=CLIPConfig(**{f.name: getattr(sizes, f.name) for f in dataclasses.fields(CLIPConfig)}),
        ast=ASTConfig(
            fbank_frames=sizes.fbank_frames,
            mel_bins=sizes.mel_bins,
            patch_size=sizes.audio_patch,
            stride=sizes.audio_stride,
            width=sizes.audio_width,
            layers=sizes.audio_layers,
            heads=sizes.audio_heads,
        ),
        vision_weight=sizes.vision_weight,
        sound_weight=sizes.sound_weight,
        speech_weight=sizes.speech_weight,
        frame_positions=sizes.frame_positions,
        fusion_layers=sizes.fusion_layers,
        audio_queries=sizes.queries,
        dtype=dtype,
    )


def abstract(config: SAVEConfig) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct]]:
    """Structure and shapes of our model, without computing its parameters."""
    return params.split(nnx.eval_shape(lambda: SAVE(config, nnx.Rngs(params=0))))


def numpy_state(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in module.state_dict().items()}


def on_device(parameters: dict[str, np.ndarray]) -> params.Parameters:
    return jax.tree.map(jnp.asarray, parameters)


def shapes(parameters: dict[str, jax.ShapeDtypeStruct]) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in parameters.items()}


def pair(
    sizes: reference.Sizes = SIZES, dtype: str = "float32", seed: int = 0
) -> tuple[reference.SAVE, nnx.GraphDef, params.Parameters]:
    """The reference in float64, and our model with its weights."""
    theirs = reference.SAVE(sizes, seed)
    graphdef, expected = abstract(config(sizes, dtype))
    ours = on_device(from_torch(table.TABLE, numpy_state(theirs), shapes(expected)))
    return theirs.double(), graphdef, ours


def captions(rng: np.random.Generator, count: int, length: int, vocab: int) -> np.ndarray:
    """Start, some tokens, end (the two largest ids), zeros."""
    ids = np.zeros((count, length), np.int32)
    for row in ids:
        words = rng.integers(1, length - 1)
        row[: words + 2] = [vocab - 2, *rng.integers(1, vocab - 2, words), vocab - 1]
    return ids


def batch(
    seed: int = 0,
    clips: int = 6,
    frames: int = 4,
    length: int = 12,
    sizes: reference.Sizes = SIZES,
) -> Batch:
    """Random clips: some without sound, some without speech, with garbage in padding frames."""
    rng = np.random.default_rng(seed)
    side, vocab = sizes.image_size, sizes.vocab_size
    mask = np.arange(frames) < rng.integers(1, frames + 1, clips)[:, None]
    has_audio = np.arange(clips) % 3 != 1
    transcript = captions(rng, clips, length, vocab)
    transcript[np.arange(clips) % 2 == 1] = 0
    fbank = rng.normal(size=(clips, sizes.fbank_frames, sizes.mel_bins))
    return Batch(
        frames=rng.integers(0, 256, (clips, frames, side, side, 3), np.uint8),
        frame_mask=mask,
        caption_ids=captions(rng, clips, length, vocab),
        transcript_ids=transcript,
        fbank=np.where(has_audio[:, None, None], fbank, 0).astype(np.float16),
        has_audio=has_audio,
        teacher_video=rng.normal(size=(clips, TEACHER)).astype(np.float32),
        teacher_audio=rng.normal(size=(clips, TEACHER)).astype(np.float32),
        has_teacher=np.ones(clips, bool),
        index=np.arange(clips, dtype=np.int32),
    )


def run_reference(model: reference.SAVE, batch: Batch) -> tuple[torch.Tensor, reference.Video]:
    """The reference's embeddings of captions and of videos."""
    video = model.video(
        *map(torch.tensor, (batch.frames, batch.frame_mask)),
        *map(torch.tensor, (batch.fbank, batch.transcript_ids)),
    )
    return model.clip.text(torch.tensor(batch.caption_ids)), video
