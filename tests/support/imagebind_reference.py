"""ImageBind's two towers in plain PyTorch, straight from the specification (section 8).

Modules carry the names of the published checkpoint (spec section 12), so that a `state_dict` here
is laid out like `imagebind_huge.pth`. Nothing of `save_jax` is imported.
"""

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

# PyTorch's threads wait by spinning: beside JAX's, on few cores, small models run 50 times slower.
torch.set_num_threads(1)

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The published sizes; tests make them smaller."""

    embed_dim: int = 1024
    image_size: int = 224
    patch_size: int = 14
    vision_width: int = 1280
    vision_layers: int = 32
    vision_heads: int = 16
    fbank_frames: int = 204
    mel_bins: int = 128
    audio_patch: int = 16
    audio_stride: int = 10
    audio_width: int = 768
    audio_layers: int = 12
    audio_heads: int = 12


class Block(nn.Module):
    def __init__(self, width: int, heads: int, bias_kv: bool):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, add_bias_kv=bias_kv, batch_first=True)
        self.norm_1 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )
        self.norm_2 = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp["fc2"](functional.gelu(self.mlp["fc1"](self.norm_2(x))))


class Preprocessor(nn.Module):
    """Class token and positions around a stem, which a subclass adds."""

    def __init__(self, width: int, tokens: int):
        super().__init__()
        self.cls_token = nn.Parameter(0.1 * torch.randn(1, 1, width))
        self.pos_embedding_helper = nn.Module()
        positions = nn.Parameter(0.1 * torch.randn(1, tokens, width))
        self.pos_embedding_helper.register_parameter("pos_embed", positions)
        self.rgbt_stem = nn.Module()

    def assemble(self, patches: Tensor) -> Tensor:
        token = self.cls_token.expand(len(patches), -1, -1)
        return torch.cat([token, patches], dim=1) + self.pos_embedding_helper.pos_embed


class VisionPreprocessor(Preprocessor):
    def __init__(self, sizes: Sizes):
        side = sizes.image_size // sizes.patch_size
        super().__init__(sizes.vision_width, side * side + 1)
        kernel = (2, sizes.patch_size, sizes.patch_size)
        convolution = nn.Conv3d(3, sizes.vision_width, kernel, stride=kernel, bias=False)
        self.rgbt_stem.proj = nn.Sequential(nn.Identity(), convolution)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [n, height, width, 3]."""
        x = (images.to(self.cls_token.dtype) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        x = x.to(self.cls_token.dtype).permute(0, 3, 1, 2)
        twice = torch.stack([x, x], dim=2)  # [n, 3, 2, height, width]
        return self.assemble(self.rgbt_stem.proj(twice).flatten(2).transpose(1, 2))


class AudioPreprocessor(Preprocessor):
    def __init__(self, sizes: Sizes):
        patch, stride, width = sizes.audio_patch, sizes.audio_stride, sizes.audio_width
        rows, columns = ((n - patch) // stride + 1 for n in (sizes.mel_bins, sizes.fbank_frames))
        super().__init__(width, rows * columns + 1)
        self.rgbt_stem.proj = nn.Conv2d(1, width, patch, stride=stride, bias=False)
        self.rgbt_stem.norm_layer = nn.LayerNorm(width, eps=1e-5)

    def forward(self, mel: Tensor) -> Tensor:
        """[n, 1, mel, time]."""
        patches = self.rgbt_stem.proj(mel).flatten(2).transpose(1, 2)
        return self.assemble(self.rgbt_stem.norm_layer(patches))


class Trunk(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, norm_first: bool, bias_kv: bool):
        super().__init__()
        first = nn.LayerNorm(width, eps=1e-6) if norm_first else nn.Identity()
        self.pre_transformer_layer = nn.Sequential(first)
        self.blocks = nn.Sequential(*(Block(width, heads, bias_kv) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.pre_transformer_layer(x))


class FirstToken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


class Unit(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(x, dim=-1)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("log_logit_scale", torch.tensor(math.log(20.0)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.clip(self.log_logit_scale.exp(), max=100) * x


def head(width: int, embed_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width, eps=1e-6), FirstToken(), nn.Linear(width, embed_dim, bias=False)
    )


class ImageBind(nn.Module):
    """Vision and audio towers with random weights, all of them away from their usual constants."""

    def __init__(self, sizes: Sizes, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        vision, audio = sizes.vision_width, sizes.audio_width
        self.modality_preprocessors = nn.ModuleDict(
            {"vision": VisionPreprocessor(sizes), "audio": AudioPreprocessor(sizes)}
        )
        self.modality_trunks = nn.ModuleDict(
            {
                "vision": Trunk(vision, sizes.vision_layers, sizes.vision_heads, True, False),
                "audio": Trunk(audio, sizes.audio_layers, sizes.audio_heads, False, True),
            }
        )
        self.modality_heads = nn.ModuleDict(
            {"vision": head(vision, sizes.embed_dim), "audio": head(audio, sizes.embed_dim)}
        )
        self.modality_postprocessors = nn.ModuleDict(
            {"vision": Unit(), "audio": nn.Sequential(Unit(), Scale())}
        )
        with torch.no_grad():
            for value in self.parameters():
                if value.ndim == 1:
                    value += 0.1 * torch.randn_like(value)

    def forward(self, kind: str, inputs: Tensor) -> Tensor:
        """[clips, several, …] -> [clips, embed_dim], the mean of the several."""
        clips, several = inputs.shape[:2]
        x = self.modality_preprocessors[kind](inputs.flatten(0, 1))
        x = self.modality_heads[kind](self.modality_trunks[kind](x))
        return self.modality_postprocessors[kind](x).reshape(clips, several, -1).mean(dim=1)
