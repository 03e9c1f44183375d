"""SAVE: sight, sound and speech in; embeddings of captions and videos out (spec sections 1-5)."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from save_jax import parameters
from save_jax.batch import Batch
from save_jax.models import layers
from save_jax.models.ast import AST, ASTConfig
from save_jax.models.clip import CLIP, IMAGE_MEAN, IMAGE_STD, CLIPConfig
from save_jax.models.fusion import AudioResampler, GatedFusion
from save_jax.parameters import Structure

# What starts as a copy of CLIP's text tower (spec section 7), in every block of these stacks.
STACKS_FROM_TEXT = ("audio_resampler", "audio_fusion", "speech_fusion")
FROM_TEXT_BLOCKS = ("attn", "ln_1", "mlp", "ln_2")


class Feature(NamedTuple):
    """An output of an encoder, which a batch may bring already.

    Attributes:
        source: the batch's field that the encoder reads.
        tower: the start of the names of its parameters.
        branch: the weight in SAVEConfig that, at 0, leaves the encoder out; "" = always there.
    """

    source: str
    tower: str
    branch: str = ""


# By the field of a batch that holds it. AST's last LayerNorm comes after, so that it may train.
FEATURES = {
    "frame_embeddings": Feature("frames", "clip.visual."),
    "caption_embeddings": Feature("caption_ids", "clip.text."),
    "ast_states": Feature("fbank", "ast.", "sound_weight"),
    "speech_states": Feature("transcript_ids", "clip.text.", "speech_weight"),
}
_AFTER = "ast.norm."


def tower_parameters(tower: str, parameters: Collection[str]) -> list[str]:
    """Returns the sorted names of the parameters that a tower's features depend on."""
    return sorted(k for k in parameters if k.startswith(tower) and not k.startswith(_AFTER))


@dataclasses.dataclass(frozen=True)
class SAVEConfig:
    """Sizes and branches of the whole model.

    The three weights make ṽ = vision·v + sound·â + speech·ŝ (spec section 5). A branch of weight
    0 does not exist: no parameters, no computation, no inputs. So SAVE is (1, 0.5, 0.5), AVIGATE
    (0.95, 0.05, 0) and CLIP4Clip (1, 0, 0).

    Attributes:
        clip, ast: sizes of the pretrained encoders.
        vision_weight, sound_weight, speech_weight: the branches, as above.
        frame_positions: whether learned positions are added to the frames; CLIP4Clip's mean
            pooling has none.
        fusion_layers: blocks of the resampler and of each fusion stack.
        audio_queries: learned queries of the resampler.
        init_std: standard deviation of the weights that start from nothing. Narrow models want
            more: at width 64, 0.02 leaves the gates nearly closed.
        dtype: compute dtype, "float32" or "bfloat16"; parameters are float32 either way.
        remat: what is recomputed in the backward pass (`layers.REMAT_POLICIES`): memory for
            time, the results are the same.
        attention: which kernel computes attention (`layers.ATTENTION_KERNELS`).
    """

    clip: CLIPConfig = CLIPConfig()
    ast: ASTConfig = ASTConfig()
    vision_weight: float = 1.0
    sound_weight: float = 0.5
    speech_weight: float = 0.5
    frame_positions: bool = True
    fusion_layers: int = 4
    audio_queries: int = 12
    init_std: float = layers.INIT_STD
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "xla"

    def has(self, feature: str) -> bool:
        """Says whether the model has the encoder of a feature (one of FEATURES)."""
        branch = FEATURES[feature].branch
        return not branch or bool(getattr(self, branch))

    @property
    def fusion_heads(self) -> int:
        """8 heads at CLIP's width of 512: 64 channels per head, as in CLIP itself."""
        return max(1, self.clip.embed_dim // 64)


class VideoEmbedding(NamedTuple):
    """B videos in the shared space of D dimensions; nothing here is normalised.

    Attributes:
        fused: [B, F, D], frames with sound and speech merged in (ṽ of spec section 5).
        visual: [B, F, D], frames with their positions, before fusion (v).
        audio: [B, queries, D], resampled sound tokens (r), or None without a sound branch.
        mask: bool [B, F], True where a frame is real.
    """

    fused: Float[Array, "batch frames dim"]
    visual: Float[Array, "batch frames dim"]
    audio: Float[Array, "batch queries dim"] | None
    mask: Bool[Array, "batch frames"]


class Views(NamedTuple):
    """What an evaluation asks of B videos: with all branches, and with some left out.

    Attributes:
        frames: [B, F, D], as `VideoEmbedding.fused`.
        mask: bool [B, F], True where a frame is real.
        ablated: [B, F, D] each, by name: the same without the sound branch ("without_sound"),
            without speech ("without_speech"), without both ("vision_alone"). Of a model with one
            of these branches, the last alone; without both, none.
        gates: [B, layers, 2] each, of "sound" and "speech": how far each block of a fusion stack
            opens its gates of attention and of the feed-forward layer (spec section 4).
    """

    frames: Float[Array, "batch frames dim"]
    mask: Bool[Array, "batch frames"]
    ablated: dict[str, Float[Array, "batch frames dim"]]
    gates: dict[str, Float[Array, "batch layers 2"]]


class SAVE(nnx.Module):
    """The three branches and their encoders."""

    def __init__(self, config: SAVEConfig, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype = jnp.dtype(config.dtype)
        width, depth, heads = config.clip.embed_dim, config.fusion_layers, config.fusion_heads
        self.clip = CLIP(config.clip, dtype=dtype, rngs=rngs)
        if config.frame_positions:
            self.frame_positions = nnx.Param(
                nnx.initializers.normal(config.init_std)(
                    rngs.params(), (config.clip.context_length, width)
                )
            )
        if config.sound_weight:
            self.ast = AST(config.ast, init_std=config.init_std, dtype=dtype, rngs=rngs)
            self.audio_projection = nnx.Linear(
                config.ast.width,
                width,
                use_bias=False,
                dtype=dtype,
                rngs=rngs,
                kernel_init=nnx.initializers.normal(config.ast.width**-0.5),
            )
            self.audio_resampler = AudioResampler(
                width,
                heads,
                depth,
                config.audio_queries,
                init_std=config.init_std,
                dtype=dtype,
                rngs=rngs,
            )
            self.audio_fusion = GatedFusion(
                width, heads, depth, init_std=config.init_std, dtype=dtype, rngs=rngs
            )
        if config.speech_weight:
            self.speech_fusion = GatedFusion(
                width, heads, depth, init_std=config.init_std, dtype=dtype, rngs=rngs
            )
        layers.set_execution(self, remat=config.remat, attention=config.attention)

    def encode_text(self, ids: Int[Array, "batch tokens"]) -> Float[Array, "batch dim"]:
        """Embeds captions, not normalised."""
        return self.clip.text.pool(ids)

    def encode_frames(
        self, frames: UInt8[Array, "batch frames height width 3"], mask: Bool[Array, "batch frames"]
    ) -> Float[Array, "batch frames dim"]:
        """Embeds frames, without positions; padding is the mean colour (spec section 1)."""
        x = frames.astype(jnp.float32) / 255
        x = (x - jnp.array(IMAGE_MEAN)) / jnp.array(IMAGE_STD)
        x = jnp.where(mask[..., None, None, None], x, 0).astype(self.dtype)
        return self.clip.visual(x.reshape(-1, *x.shape[2:])).reshape(*mask.shape, -1)

    def encode_audio(
        self, fbank: Float[Array, "batch time mel"]
    ) -> Float[Array, "batch tokens width"]:
        """Returns the states of AST's trunk, before its final LayerNorm, which may train."""
        return self.ast.trunk(fbank.astype(self.dtype))

    def encode_speech(self, ids: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens dim"]:
        """Returns projected token states of transcripts, padding included."""
        return self.clip.text(ids)

    def encode_video(self, batch: Batch) -> VideoEmbedding:
        """Merges sight, sound and speech of videos into their frames (spec sections 2 to 5).

        Outputs of frozen encoders may be in the batch already (`save_jax.cache`).
        """
        v, audio, branches = self._branches(batch, lambda stack, v, m: stack(v, m))
        return VideoEmbedding(self._fuse(v, branches), v, audio, batch.frame_mask)

    def encode_views(self, batch: Batch) -> Views:
        """Embeds videos as `encode_video`, and as if branches were left out, with the gates."""
        v, _, found = self._branches(batch, lambda stack, v, m: stack.with_gates(v, m))
        branches = {name: fused for name, (fused, _) in found.items()}
        ablated = {}
        if len(branches) > 1:
            for name in branches:
                kept = {other: x for other, x in branches.items() if other != name}
                ablated[f"without_{name}"] = self._fuse(v, kept)
        if branches:
            ablated["vision_alone"] = self._fuse(v, {})
        gates = {name: gates for name, (_, gates) in found.items()}
        return Views(self._fuse(v, branches), batch.frame_mask, ablated, gates)

    def _branches(
        self, batch: Batch, run: Callable[[GatedFusion, Array, Array], Any]
    ) -> tuple[Array, Array | None, dict[str, Any]]:
        """Encodes what the branches read of videos.

        Args:
            batch: the videos.
            run: (fusion stack, frames, tokens of the modality) -> what to return of that branch.

        Returns:
            The frames with their positions (v), the resampled sound tokens (r) or None, and what
            `run` gives, by branch: "sound", "speech".
        """
        v = self._given(batch.frame_embeddings)
        if v is None:
            v = self.encode_frames(_required(batch, "frames"), batch.frame_mask)
        if self.config.frame_positions:
            v = v + self.frame_positions[: v.shape[1]].astype(v.dtype)
        audio, branches = None, {}
        if self.config.sound_weight:
            states = self._given(batch.ast_states)
            if states is None:
                states = self.encode_audio(_required(batch, "fbank"))
            audio = self.audio_resampler(self.audio_projection(self.ast.norm(states)))
            branches["sound"] = run(self.audio_fusion, v, audio)
        if self.config.speech_weight:
            speech = self._given(batch.speech_states)
            if speech is None:
                speech = self.encode_speech(_required(batch, "transcript_ids"))
            branches["speech"] = run(self.speech_fusion, v, speech)
        return v, audio, branches

    def _fuse(self, v: Array, branches: Mapping[str, Array]) -> Array:
        """Returns ṽ, the weighted sum of frames and branches (spec section 5)."""
        fused = self.config.vision_weight * v
        for name, x in branches.items():
            fused = fused + getattr(self.config, f"{name}_weight") * x
        return fused

    def __call__(self, batch: Batch) -> tuple[Float[Array, "batch dim"], VideoEmbedding]:
        """Embeds captions and videos of a training batch."""
        text = self._given(batch.caption_embeddings)
        if text is None:
            text = self.encode_text(_required(batch, "caption_ids"))
        return text, self.encode_video(batch)

    def features(self, batch: Batch, names: Collection[str]) -> dict[str, Array]:
        """Runs encoders on a batch.

        Args:
            batch: with what these encoders read.
            names: which of FEATURES to make.

        Returns:
            The features by name, in the compute dtype.
        """
        make = {
            "frame_embeddings": lambda: self.encode_frames(
                _required(batch, "frames"), batch.frame_mask
            ),
            "caption_embeddings": lambda: self.encode_text(_required(batch, "caption_ids")),
            "ast_states": lambda: self.encode_audio(_required(batch, "fbank")),
            "speech_states": lambda: self.encode_speech(_required(batch, "transcript_ids")),
        }
        return {name: make[name]() for name in names}

    def _given(self, features: Float[Array, "..."] | None) -> Float[Array, "..."] | None:
        """Returns an encoder's outputs that a batch brings, in the compute dtype."""
        return None if features is None else features.astype(self.dtype)


def _required(batch: Batch, field: str) -> Array:
    """Returns an input of an encoder.

    Raises:
        ValueError: the batch lacks it.
    """
    value = getattr(batch, field)
    if value is None:
        raise ValueError(f"the batch has no {field}, which this model reads: see save_jax/batch.py")
    return value


def merge(structure: Structure, params: Mapping[str, Array | jax.ShapeDtypeStruct]) -> SAVE:
    """Puts the model together from its structure and parameters (`parameters.merge`)."""
    model = parameters.merge(structure, params)
    assert isinstance(model, SAVE)
    return model


def copy_clip_into_fusion(model: SAVE) -> None:
    """Starts the new parts from CLIP's text tower, in place (spec section 7, initialisation).

    Its first blocks give `attn`, `ln_1`, `mlp` and `ln_2` of the resampler and of both fusion
    stacks; its positions become the frame positions. Call it once CLIP's weights are loaded.

    Raises:
        ValueError: the text tower's width is not the shared width, or it has too few blocks.
    """
    text, depth, width = model.clip.text, model.config.fusion_layers, model.config.clip.embed_dim
    if model.config.clip.text_width != width or text.blocks.depth < depth:
        raise ValueError(
            f"the fusion ({depth} blocks, width {width}) starts from CLIP's text tower, which has "
            f"{text.blocks.depth} blocks of width {model.config.clip.text_width}: make the widths "
            "equal and the tower at least as deep"
        )
    if model.config.frame_positions:
        # Copies, because two parameters that share a buffer cannot both be donated.
        model.frame_positions[...] = jnp.copy(text.positional_embedding[...])
    stacks = [
        getattr(model, name).blocks.layer for name in STACKS_FROM_TEXT if hasattr(model, name)
    ]
    for layer in stacks:
        for part in FROM_TEXT_BLOCKS:
            source = nnx.state(getattr(text.blocks.layer, part), nnx.Param)
            nnx.update(getattr(layer, part), jax.tree.map(lambda a: jnp.copy(a[:depth]), source))


def create(config: SAVEConfig, seed: int | Array) -> SAVE:
    """Makes a model with random encoders and the new parts copied from CLIP's text tower.

    Args:
        config: sizes and branches.
        seed: of the random values, or the key that `jax.random.key` makes of it.
    """
    model = SAVE(config, nnx.Rngs(params=seed))
    copy_clip_into_fusion(model)
    return model
