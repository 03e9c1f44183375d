"""Miniatures of the files that people have, in the very form of the real ones."""

import collections
import dataclasses
import io
import pathlib
import pickle
import sys
import types
import zipfile

import numpy as np
import torch
import transformers

from save_jax.weights.export import reference_dtype
from tests.support import reference, small

SOUNDLESS = {"sound_weight": 0.0, "speech_weight": 0.0, "frame_positions": False}


def mixed(state: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """A state with the published mix of float16 and float32."""
    return {
        name: value.half() if reference_dtype(prefix + name) == "float16" else value.clone()
        for name, value in state.items()
    }


def save_state(seed: int = 0, **changes) -> dict[str, torch.Tensor]:
    """SAVE's state dictionary, or with changed sizes AVIGATE's or CLIP4Clip's."""
    state = mixed(reference.SAVE(dataclasses.replace(small.SIZES, **changes), seed).state_dict())
    if changes == small.AVIGATE:
        return {
            name.replace("Audio_Resampler.", "transformer_Fusion."): value
            for name, value in state.items()
        }
    return state


def spare() -> dict[str, torch.Tensor]:
    """Tensors that published checkpoints have besides, and that mean nothing to us."""
    return {
        "asr_query_tokens": torch.randn(128, 5),
        "clip.audio.v.head.weight": torch.randn(7, 48),
        "clip.audio.v.head_dist.bias": torch.randn(7),
        "clip.audio.mlp_head.0.weight": torch.randn(48),
        "clip.input_resolution": torch.tensor(32),
    }


class _Archived(reference.CLIP):
    """OpenAI's archives keep sizes as tensors beside the parameters."""

    def __init__(self, sizes: reference.Sizes):
        super().__init__(sizes)
        self.register_buffer("input_resolution", torch.tensor(sizes.image_size))
        self.register_buffer("context_length", torch.tensor(sizes.context_length))
        self.register_buffer("vocab_size", torch.tensor(sizes.vocab_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.logit_scale


def openai_archive(path: pathlib.Path) -> dict[str, torch.Tensor]:
    """Writes CLIP as a TorchScript archive in float16; returns its state."""
    torch.manual_seed(1)
    model = _Archived(dataclasses.replace(small.SIZES, **SOUNDLESS))
    for name, value in model.named_parameters():
        if reference_dtype(f"clip.{name}") == "float16":
            value.data = value.data.half()
    torch.jit.trace(model, torch.zeros(2)).save(path)
    return dict(model.named_parameters())


class _Storage:
    """Stands for the archive's only storage while a description is written."""


class _Strided:
    """A tensor as an archive describes it, right or wrong."""

    def __init__(self, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]):
        self.description = offset, shape, strides

    def __reduce__(self):
        offset, shape, strides = self.description
        rebuild = torch._utils._rebuild_tensor_v2
        return rebuild, (_Storage(), offset, shape, strides, False, collections.OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, thing):
        return ("storage", torch.FloatStorage, "0", "cpu", 0) if type(thing) is _Storage else None


def crafted_archive(
    path: pathlib.Path,
    state: dict[str, torch.Tensor],
    crafted: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]],
    monkeypatch,
) -> None:
    """Writes a TorchScript archive of a state, some of its tensors with offset, shape and strides
    that PyTorch would not write."""
    module = types.ModuleType("__torch__")
    module.Model = type("Model", (), {"__module__": "__torch__", "__qualname__": "Model"})
    monkeypatch.setitem(sys.modules, "__torch__", module)
    root, floats = module.Model(), []
    for name, value in state.items():
        array = value.detach().float().contiguous()
        setattr(root, name, _Strided(sum(map(len, floats)), tuple(array.shape), array.stride()))
        floats.append(array.numpy().ravel())
    for name, description in crafted.items():
        setattr(root, name, _Strided(*description))
    text = io.BytesIO()
    _Pickler(text, protocol=2).dump(root)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", text.getvalue())
        archive.writestr("model/constants.pkl", b"")
        archive.writestr("model/code/__torch__.py", b"")
        archive.writestr("model/version", b"3")
        archive.writestr("model/data/0", np.concatenate([*floats, np.zeros(0, "f4")]).tobytes())


def ast_state() -> dict[str, torch.Tensor]:
    """AST's original: wrapped for several devices, with the classifier of 527 sounds."""
    torch.manual_seed(2)
    state = {f"module.v.{k}": v for k, v in reference.ASTTrunk(small.SIZES).state_dict().items()}
    return state | {
        "module.v.head.weight": torch.randn(1000, 48),
        "module.v.head_dist.weight": torch.randn(1000, 48),
        "module.mlp_head.0.weight": torch.randn(48),
        "module.mlp_head.1.weight": torch.randn(527, 48),
        "module.mlp_head.1.bias": torch.randn(527),
    }


def _shake(model: torch.nn.Module) -> None:
    """Biases, tokens and LayerNorms start as constants; they too must matter."""
    with torch.no_grad():
        for value in model.parameters():
            value += 0.1 * torch.randn_like(value)


def hugging_face_clip(seed: int = 3) -> transformers.CLIPModel:
    """`transformers`' CLIP at the small sizes."""
    torch.manual_seed(seed)
    sizes = small.SIZES
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={
                "hidden_size": sizes.text_width,
                "intermediate_size": 4 * sizes.text_width,
                "num_hidden_layers": sizes.text_layers,
                "num_attention_heads": sizes.text_heads,
                "vocab_size": sizes.vocab_size,
                "max_position_embeddings": sizes.context_length,
                "bos_token_id": sizes.vocab_size - 2,
                "eos_token_id": sizes.vocab_size - 1,
            },
            vision_config={
                "hidden_size": sizes.vision_width,
                "intermediate_size": 4 * sizes.vision_width,
                "num_hidden_layers": sizes.vision_layers,
                "num_attention_heads": sizes.vision_heads,
                "image_size": sizes.image_size,
                "patch_size": sizes.patch_size,
            },
            projection_dim=sizes.embed_dim,
        )
    )
    _shake(model)
    return model


def hugging_face_ast(cls: type = transformers.ASTForAudioClassification) -> torch.nn.Module:
    """`transformers`' AST at the small sizes."""
    torch.manual_seed(4)
    sizes = small.SIZES
    model = cls(
        transformers.ASTConfig(
            hidden_size=sizes.audio_width,
            intermediate_size=4 * sizes.audio_width,
            num_hidden_layers=sizes.audio_layers,
            num_attention_heads=sizes.audio_heads,
            patch_size=sizes.audio_patch,
            frequency_stride=sizes.audio_stride,
            time_stride=sizes.audio_stride,
            max_length=sizes.fbank_frames,
            num_mel_bins=sizes.mel_bins,
        )
    )
    _shake(model)
    return model


def numpy_state(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().float().numpy() for name, value in state.items()}
