"""The contract between the data pipelines and the model: every array of a batch.

B = clips in this batch, F = frames per clip, L = text tokens, T = filterbank frames (1024 at full
size), M = mel bins (128), D = CLIP's shared width. Arrays that a config does not use (sound
in CLIP4Clip) are None: they are neither decoded nor sent to the device. So are the inputs of an
encoder whose outputs come with the batch, from a cache (`save_jax.cache`).

In the other direction, from model to pipelines: `Embed`, the teacher that preparation calls.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

# The reference's sizes (spec section 1): where what stores arrays and what computes on them meet.
IMAGE_SIZE = 224  # height and width of a frame, in pixels
MAX_FRAMES = 12  # F
MAX_WORDS = 32  # L
FBANK_FRAMES = 1024  # T
MEL_BINS = 128  # M
TEACHER_SIZE = 1024  # of ImageBind's vectors

# A NumPy array on the host, a jax.Array on the device: this file imports neither.
Array = Any


class Batch(NamedTuple):
    """B clips, each with one caption when the batch is for training (spec section 1).

    Attributes:
        frames: uint8 [B, F, height, width, 3], RGB, not normalised; padding frames hold anything,
            because the model masks them after normalising.
        frame_mask: bool [B, F]; True where a frame is real. Real frames come first.
        caption_ids: int32 [B, L], CLIP byte-pair ids: start, tokens, end, zeros. None in batches
            that are for embedding videos.
        transcript_ids: int32 [B, L]; all zero for a clip without a transcript.
        fbank: float16 [B, T, M], log-Mel filterbank, normalised; all zero without an audio track.
        has_audio: bool [B]; False for a clip without an audio track.
        teacher_video: float32 [B, 1024], ImageBind's vector of the clip's video.
        teacher_audio: float32 [B, 1024], ImageBind's vector of the clip's audio.
        has_teacher: bool [B]; False where the teacher's vectors are missing or unusable.
        index: int32 [B], the clip's row in the split, so that a clip can be named; -1 marks a row
            that only fills up the last batch of an evaluation.
        caption_index: int32 [B], the caption's row in the split's table of captions; None in
            batches that are for embedding videos, and on the device, where nothing needs it.
        frame_embeddings: [B, F, D], CLIP's outputs for `frames`, before positions; from a cache, as
            are those below: float32 or bfloat16, or None to compute them.
        caption_embeddings: [B, D], CLIP's outputs for `caption_ids`, not normalised.
        ast_states: [B, states, width], the outputs of AST's trunk for `fbank`, before its last
            LayerNorm.
        speech_states: [B, L, D], CLIP's outputs for `transcript_ids`.
    """

    frames: Array | None
    frame_mask: Array
    caption_ids: Array | None
    transcript_ids: Array | None
    fbank: Array | None
    has_audio: Array | None
    teacher_video: Array | None
    teacher_audio: Array | None
    has_teacher: Array | None
    index: Array
    frame_embeddings: Array | None = None
    caption_embeddings: Array | None = None
    ast_states: Array | None = None
    speech_states: Array | None = None
    caption_index: Array | None = None


class Embed(NamedTuple):
    """The teacher as preparation uses it: arrays of the host in, vectors of the host out.

    `save_jax.models.imagebind.make_embed` makes one.

    Attributes:
        config: has `embed_dim` and the sizes of what goes in: `image_size`, `fbank_frames`,
            `mel_bins`.
        clips: how many clips are computed at a time; other numbers are cut or filled up to it.
        video: uint8 [clips, frames, image_size, image_size, 3] -> float32 [clips, embed_dim].
        audio: float32 [clips, pieces, fbank_frames, mel_bins] -> float32 [clips, embed_dim].
    """

    config: Any
    clips: int
    video: Callable[[Array], Array]
    audio: Callable[[Array], Array]
