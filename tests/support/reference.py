"""SAVE in plain PyTorch, straight from the specification: what the JAX code is compared with.

Modules carry the names of PyTorch's checkpoints (spec section 12), so that a `state_dict` here is
laid out like a published checkpoint. Nothing of `save_jax` is imported.
"""

import dataclasses
import math
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

# PyTorch's threads wait by spinning: beside JAX's, on few cores, small models run 50 times slower.
torch.set_num_threads(1)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The published sizes; tests make them smaller."""

    embed_dim: int = 512
    image_size: int = 224
    patch_size: int = 32
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    vocab_size: int = 49408
    context_length: int = 77
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    fbank_frames: int = 1024
    mel_bins: int = 128
    audio_width: int = 768
    audio_layers: int = 12
    audio_heads: int = 12
    audio_patch: int = 16
    audio_stride: int = 10
    fusion_layers: int = 4
    fusion_heads: int = 8
    queries: int = 12
    vision_weight: float = 1.0
    sound_weight: float = 0.5
    speech_weight: float = 0.5
    frame_positions: bool = True


# ------------------------------------------------------------------------------ CLIP (section 2)


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            c_fc=nn.Linear(width, 4 * width),
            gelu=QuickGELU(),
            c_proj=nn.Linear(4 * width, width),
        )
    )


class CLIPBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = mlp(width)
        self.ln_2 = nn.LayerNorm(width, eps=1e-5)

    def forward(self, x: Tensor, forbidden: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=forbidden, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class CLIPTransformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.resblocks = nn.ModuleList(CLIPBlock(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, forbidden: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, forbidden)
        return x


class VisionTower(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        width, patch = sizes.vision_width, sizes.patch_size
        tokens = (sizes.image_size // patch) ** 2 + 1
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(0.05 * torch.randn(width))
        self.positional_embedding = nn.Parameter(0.05 * torch.randn(tokens, width))
        self.ln_pre = nn.LayerNorm(width, eps=1e-5)
        self.transformer = CLIPTransformer(width, sizes.vision_layers, sizes.vision_heads)
        self.ln_post = nn.LayerNorm(width, eps=1e-5)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, sizes.embed_dim))

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, D]."""
        x = self.conv1(images).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = self.transformer(self.ln_pre(x + self.positional_embedding))
        return self.ln_post(x[:, 0]) @ self.proj


# ------------------------------------------------------------------------------- AST (section 2)


class ASTAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / math.sqrt(width // self.heads)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class ASTBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = ASTAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(width, 4 * width),
                act=nn.GELU(),
                fc2=nn.Linear(4 * width, width),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ASTTrunk(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        width, patch, stride = sizes.audio_width, sizes.audio_patch, sizes.audio_stride
        rows = (sizes.mel_bins - patch) // stride + 1
        columns = (sizes.fbank_frames - patch) // stride + 1
        self.cls_token = nn.Parameter(0.05 * torch.randn(1, 1, width))
        self.dist_token = nn.Parameter(0.05 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.05 * torch.randn(1, rows * columns + 2, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(1, width, patch, stride=stride)})
        self.blocks = nn.ModuleList(
            ASTBlock(width, sizes.audio_heads) for _ in range(sizes.audio_layers)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, fbank: Tensor) -> Tensor:
        """[B, time, mel] -> [B, 1 + patches, width]."""
        image = fbank.mT[:, None]  # one channel of frequency × time
        x = self.patch_embed["proj"](image).flatten(2).mT
        first = torch.cat([self.cls_token, self.dist_token], dim=1).expand(len(x), -1, -1)
        x = torch.cat([first, x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        pooled = (x[:, 0] + x[:, 1]) / 2
        return self.norm(torch.cat([pooled[:, None], x[:, 2:]], dim=1))


class CLIP(nn.Module):
    """Both towers, and AST, which the reference keeps inside CLIP."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        width = sizes.text_width
        self.visual = VisionTower(sizes)
        self.transformer = CLIPTransformer(width, sizes.text_layers, sizes.text_heads)
        self.token_embedding = nn.Embedding(sizes.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.05 * torch.randn(sizes.context_length, width))
        self.ln_final = nn.LayerNorm(width, eps=1e-5)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, sizes.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if sizes.sound_weight:
            self.audio = nn.ModuleDict({"v": ASTTrunk(sizes)})
            self.audio_projection = nn.Parameter(
                sizes.audio_width**-0.5 * torch.randn(sizes.audio_width, sizes.embed_dim)
            )

    def text_tokens(self, ids: Tensor) -> Tensor:
        """[B, L] -> [B, L, D], the projected states of all tokens."""
        length = ids.shape[1]
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        x = self.token_embedding(ids) + self.positional_embedding[:length]
        return self.ln_final(self.transformer(x, future)) @ self.text_projection

    def text(self, ids: Tensor) -> Tensor:
        """[B, L] -> [B, D], the state at the end token."""
        return self.text_tokens(ids)[torch.arange(len(ids)), ids.argmax(dim=1)]


# ---------------------------------------------------------- resampler and fusion (sections 3, 4)


class ResamplerBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width, eps=1e-12)
        self.ln_2 = nn.LayerNorm(width, eps=1e-12)
        self.ln_3 = nn.LayerNorm(width, eps=1e-12)
        self.mlp = mlp(width)

    def forward(self, q: Tensor, a: Tensor) -> Tensor:
        y = self.ln_1(q)
        q = q + self.attn(y, y, y, need_weights=False)[0]
        keys = self.ln_3(a)
        q = q + self.cross_attn(self.ln_3(q), keys, keys, need_weights=False)[0]
        return q + self.mlp(self.ln_2(q))


class GatedBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()

        def two_layers(first: str, second: str, n_in: int, hidden: int, n_out: int):
            return nn.Sequential(
                OrderedDict(
                    [
                        (first, nn.Linear(n_in, hidden, bias=False)),
                        ("gelu", QuickGELU()),
                        (second, nn.Linear(hidden, n_out, bias=False)),
                    ]
                )
            )

        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.cross_ff = two_layers("cross_fc", "cross_proj", width, 4 * width, width)
        self.attn_gate = two_layers("ag_fc", "ag_proj", 2 * width, width // 2, 1)
        self.ff_gate = two_layers("fg_fc", "fg_proj", 2 * width, width // 2, 1)
        for part in ("ln_1", "ln_2", "ln_3", "ln_4"):
            self.add_module(part, nn.LayerNorm(width, eps=1e-12))
        self.mlp = mlp(width)

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        means = torch.cat([x.mean(dim=1), m.mean(dim=1)], dim=1)
        g_attn = torch.tanh(self.attn_gate(means))[:, :, None]
        g_ff = torch.tanh(self.ff_gate(means))[:, :, None]
        x = x + g_attn * self.cross_attn(self.ln_3(x), m, m, need_weights=False)[0]
        x = x + g_ff * self.cross_ff(self.ln_4(x))
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Stack(nn.Module):
    """Blocks that all see the same second argument."""

    def __init__(self, block: type[nn.Module], width: int, heads: int, layers: int):
        super().__init__()
        self.resblocks = nn.ModuleList(block(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x, m)
        return x


# ------------------------------------------------------------------------------ SAVE (section 5)


class Video(NamedTuple):
    fused: Tensor  # [B, F, D]
    visual: Tensor  # [B, F, D]
    audio: Tensor | None  # [B, queries, D]


class SAVE(nn.Module):
    """The whole model. Every parameter is random, biases and LayerNorms too."""

    def __init__(self, sizes: Sizes, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        width, heads, layers = sizes.embed_dim, sizes.fusion_heads, sizes.fusion_layers
        self.sizes = sizes
        self.clip = CLIP(sizes)
        if sizes.frame_positions:
            self.frame_position_embeddings = nn.Embedding(sizes.context_length, width)
        if sizes.sound_weight:
            queries = nn.init.orthogonal_(torch.empty(width, sizes.queries))
            self.query_tokens = nn.Parameter(queries)
            self.query_position_embeddings = nn.Embedding(sizes.queries, width)
            self.Audio_Resampler = Stack(ResamplerBlock, width, heads, layers)
            self.transformerClip = Stack(GatedBlock, width, heads, layers)
        if sizes.speech_weight:
            self.transformerClip_ASR = Stack(GatedBlock, width, heads, layers)
        with torch.no_grad():
            for name, value in self.named_parameters():
                part = name.split(".")[-2] if "." in name else ""
                if part.startswith(("ln_", "norm")) or name.endswith("bias"):
                    value += 0.1 * torch.randn_like(value)
                elif part.endswith(("embedding", "embeddings")):
                    value *= 0.1

    def frames(self, frames: Tensor, mask: Tensor) -> Tensor:
        """uint8 [B, F, H, W, 3] and bool [B, F] -> [B, F, D]."""
        kind = self.clip.text_projection.dtype
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=kind)
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=kind)
        pixels = (frames.to(kind) / 255 - mean) / std
        pixels = pixels * mask[:, :, None, None, None]
        flat = pixels.flatten(0, 1).permute(0, 3, 1, 2)
        return self.clip.visual(flat).unflatten(0, mask.shape)

    def audio(self, fbank: Tensor) -> Tensor:
        """[B, time, mel] -> [B, queries, D], resampled."""
        kind = self.clip.text_projection.dtype
        a = self.clip.audio["v"](fbank.to(kind)) @ self.clip.audio_projection
        q = self.query_tokens.T + self.query_position_embeddings.weight
        return self.Audio_Resampler(q.expand(len(a), -1, -1), a)

    def video(
        self, frames: Tensor, mask: Tensor, fbank: Tensor | None, transcript: Tensor | None
    ) -> Video:
        v = self.frames(frames, mask)
        if self.sizes.frame_positions:
            v = v + self.frame_position_embeddings.weight[: v.shape[1]]
        fused, r = self.sizes.vision_weight * v, None
        if self.sizes.sound_weight:
            r = self.audio(fbank)
            fused = fused + self.sizes.sound_weight * self.transformerClip(v, r)
        if self.sizes.speech_weight:
            s = self.clip.text_tokens(transcript)
            fused = fused + self.sizes.speech_weight * self.transformerClip_ASR(v, s)
        return Video(fused, v, r)

    def copy_clip(self) -> None:
        """Section 7: the new parts start from the first blocks of CLIP's text tower."""
        stacks = [
            getattr(self, name)
            for name in ("Audio_Resampler", "transformerClip", "transformerClip_ASR")
            if hasattr(self, name)
        ]
        for stack in stacks:
            for block, source in zip(
                stack.resblocks, self.clip.transformer.resblocks, strict=False
            ):
                for part in ("attn", "ln_1", "mlp", "ln_2"):
                    getattr(block, part).load_state_dict(getattr(source, part).state_dict())
        if self.sizes.frame_positions:
            self.frame_position_embeddings.weight.data.copy_(self.clip.positional_embedding.data)


# ----------------------------------------------------------- similarity, losses (sections 5 and 6)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def mean_of_real(frames: Tensor, mask: Tensor) -> Tensor:
    """Masked mean, video by video."""
    return torch.stack([f[m].mean(dim=0) for f, m in zip(frames, mask, strict=True)])


def similarity(
    text: Tensor, frames: Tensor, mask: Tensor, scale: Tensor, local_weight: float = 0.5
) -> Tensor:
    """[T, D], [V, F, D], [V, F] -> [T, V]."""
    text, frames = unit(text), unit(frames)
    columns = []
    for video, real in zip(frames, mask, strict=True):
        local = torch.logsumexp(scale * text @ video[real].T, dim=1)
        overall = scale * text @ unit(video[real].mean(dim=0))
        columns.append(local_weight * local + (1 - local_weight) * overall)
    return torch.stack(columns, dim=1)


def margin(text: Tensor, visual: Tensor, beta: float, delta: float) -> Tensor:
    """Section 6's margin; `text` and `visual` are unit vectors."""
    result = torch.zeros(len(text), len(text), dtype=text.dtype)
    with torch.no_grad():
        for i in range(len(text)):
            for j in range(len(text)):
                if i != j:
                    alike = (text[i] @ text[j] + visual[i] @ visual[j]) / 2
                    result[i, j] = min(beta * (1 - alike), delta)
    return result


def contrastive(
    text: Tensor, video: Video, mask: Tensor, logit_scale: Tensor, beta: float, delta: float
) -> Tensor:
    scale = logit_scale.exp()
    g = unit(mean_of_real(unit(video.visual), mask))
    logits = similarity(text, video.fused, mask, scale) + scale * margin(unit(text), g, beta, delta)
    target = torch.arange(len(logits))
    return (
        functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
    ) / 2


def pearson_distance(p: Tensor, q: Tensor) -> Tensor:
    """Mean over rows of 1 − correlation."""
    p, q = p - p.mean(dim=1, keepdim=True), q - q.mean(dim=1, keepdim=True)
    return (1 - (p * q).sum(dim=1) / (p.norm(dim=1) * q.norm(dim=1))).mean()


def soft_albef(
    visual: Tensor, audio: Tensor, teacher_video: Tensor, teacher_audio: Tensor, usable: Tensor
) -> Tensor:
    """Frames [B, F, D], audio tokens [B, Q, D], teacher's vectors [B, E], and who has audio."""
    if usable.sum() < 2:
        return torch.zeros((), dtype=visual.dtype)
    g = unit(unit(visual).mean(dim=1))[usable]
    r = unit(unit(audio).mean(dim=1))[usable]
    m1 = g @ r.T
    m0 = unit(teacher_video[usable]) @ unit(teacher_audio[usable]).T
    rows = pearson_distance((5 * m1).softmax(dim=1), (5 * m0).softmax(dim=1))
    columns = pearson_distance((5 * m1.T).softmax(dim=1), (5 * m0.T).softmax(dim=1))
    return rows + columns


# ------------------------------------------------------------------------ optimiser (section 7)

PEAK_RATES = {"clip": 1e-7, "new": 1e-4, "query": 1e-2, "frozen": 0.0}
FROZEN = (
    "clip.token_embedding.weight",
    "clip.positional_embedding",
    "clip.visual.class_embedding",
    "clip.visual.positional_embedding",
    "clip.visual.conv1.weight",
    "clip.visual.ln_pre.weight",
    "clip.visual.ln_pre.bias",
)


def group_of(name: str) -> str:
    """The row of section 7's table, by PyTorch's name."""
    if name == "query_tokens":
        return "query"
    if name == "clip.audio_projection":
        return "new"
    if name.startswith("clip.audio.v."):
        return "clip" if name.startswith("clip.audio.v.norm.") else "frozen"
    if name.startswith("clip."):
        return "frozen" if name in FROZEN else "clip"
    return "new"


def learning_rate(peak: float, step: int, total: int) -> float:
    x = step / total
    return peak * x / 0.1 if x < 0.1 else peak * (1 + math.cos(math.pi * x)) / 2


class BertAdam:
    """Adam without bias correction, over tensors by name, with both clips of gradients."""

    def __init__(self, parameters: dict[str, Tensor], total: int):
        self.parameters = {k: p for k, p in parameters.items() if PEAK_RATES[group_of(k)]}
        self.total, self.taken = total, 0
        self.m = {k: torch.zeros_like(p) for k, p in self.parameters.items()}
        self.v = {k: torch.zeros_like(p) for k, p in self.parameters.items()}

    @torch.no_grad()
    def step(self) -> None:
        """Uses, and may change, the parameters' `grad`."""
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for name, p in self.parameters.items():
            nn.utils.clip_grad_norm_([p], 1.0)
            m, v, g = self.m[name], self.v[name], p.grad
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.98).add_(0.02 * g * g)
            update = m / (v.sqrt() + 1e-6)
            if "bias" not in name:
                update = update + 0.2 * p
            p -= learning_rate(PEAK_RATES[group_of(name)], self.taken, self.total) * update
        self.taken += 1
