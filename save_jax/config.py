"""Turns a config's values into the typed configs of the parts.

The only place that sets how exactly matrices are multiplied. `save_jax.config_files` reads files.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax

from save_jax import profiling
from save_jax.errors import UserError
from save_jax.models import ast, clip, layers
from save_jax.models.save import SAVEConfig
from save_jax.objectives import LossConfig
from save_jax.optimizer import OptimizerConfig

Built = TypeVar(
    "Built",
    bound=clip.CLIPConfig | ast.ASTConfig | SAVEConfig | LossConfig | OptimizerConfig,
)

DTYPES = ("float32", "bfloat16")
AMPERE = (8, 0)  # NVIDIA's compute capability that brought bfloat16, and cuDNN's fused attention
# The least value of each count of a config, and what it means.
COUNTS = {
    "batch_size": (1, "clips of a training batch, over all devices"),
    "eval_batch_size": (1, "clips of an evaluation batch, over all devices"),
    "eval_caption_batch_size": (1, "captions of an evaluation batch, over all devices"),
    "eval_matrix_entries": (0, "captions × videos up to which similarity.npy is written"),
    "micro_batch": (0, "clips encoded at a time; 0 encodes the whole batch at once"),
    "epochs": (1, "passes over the training split"),
    "steps": (0, "training steps; 0 takes config.epochs"),
    "eval_every": (1, "epochs between evaluations"),
    "checkpoint_every": (0, "steps between checkpoints; 0 saves with evaluations only"),
    "follow_keep": (2, "checkpoints kept for a follower to evaluate"),
    "log_every": (1, "steps between progress lines"),
}
SIZED = {"clip": (clip.VARIANTS, clip.CLIPConfig), "ast": (ast.VARIANTS, ast.ASTConfig)}


def sizes_of(
    key: str, value: str | Mapping[str, int], variants: Mapping[str, Built], cls: type[Built]
) -> Built:
    """Returns a named variant, or one of given sizes; sizes left out are the default variant's.

    Raises:
        UserError: an unknown name or size.
    """
    if isinstance(value, str):
        if value not in variants:
            raise UserError(
                f"config.{key} = {value!r}: expected one of {', '.join(variants)}, or "
                "a dictionary of sizes"
            )
        return variants[value]
    return _build(key, cls, value)


def _build(key: str, cls: type[Built], values: Mapping[str, Any]) -> Built:
    """Makes a dataclass from a mapping; raises UserError that names unknown fields."""
    fields = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise UserError(
            f"config.{key} has no field {', '.join(unknown)}; it has {', '.join(fields)}"
        )
    return cls(**values)


def model_config(
    config: Mapping[str, Any], devices: Sequence[jax.Device] | None = None
) -> SAVEConfig:
    """Returns sizes and branches of the model that a config describes.

    Args:
        config: all of a config's values.
        devices: what it is to run on, which decides what attention "auto" means; None = all devices
            of all processes; none at all where it is only checked, to run elsewhere.

    Raises:
        UserError: a name is unknown, sizes contradict each other, or the devices cannot compute it.
    """
    if config["dtype"] not in DTYPES:
        raise UserError(f"config.dtype = {config['dtype']!r}: expected one of {', '.join(DTYPES)}")
    values = dict(config["model"])
    for part, kinds in SIZED.items():
        values[part] = sizes_of(f"model.{part}", values[part], *kinds)
    if values["remat"] not in layers.REMAT_POLICIES:
        raise UserError(
            f"config.model.remat = {values['remat']!r}: expected one of "
            f"{', '.join(layers.REMAT_POLICIES)}"
        )
    if values["attention"] not in ("auto", *layers.ATTENTION_KERNELS):
        raise UserError(
            f"config.model.attention = {values['attention']!r}: expected one of auto, "
            f"{', '.join(layers.ATTENTION_KERNELS)}"
        )
    model = _build("model", SAVEConfig, {**values, "dtype": config["dtype"]})
    data = config["data"]
    longest = model.clip.context_length
    for key in ("max_words", "max_frames"):
        if not 0 < data[key] <= longest:
            raise UserError(
                f"config.data.{key} = {data[key]}: expected 1 to {longest}, the length "
                "of CLIP's table of text positions, which frames use too"
            )
    for name, side, width, heads in (
        ("clip.vision", model.clip.image_size, model.clip.vision_width, model.clip.vision_heads),
        ("clip.text", None, model.clip.text_width, model.clip.text_heads),
        ("ast", None, model.ast.width, model.ast.heads),
    ):
        if width % heads:
            raise UserError(
                f"config.model.{name}: width {width} is not a multiple of {heads} heads"
            )
        if side and side % model.clip.patch_size:
            raise UserError(
                f"config.model.clip: image_size {side} is not a multiple of patch_size "
                f"{model.clip.patch_size}"
            )
    devices = jax.devices() if devices is None else devices
    if model.dtype == "bfloat16":
        _check_bfloat16(devices)
    return dataclasses.replace(model, attention=_attention(model, devices))


def _capability(device: jax.Device) -> tuple[int, ...] | None:
    """Returns an NVIDIA GPU's compute capability, say (8, 6); None for any other device."""
    # AMD's GPUs are "gpu" to JAX too, and name their architecture here: gfx942.
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return tuple(map(int, found.groups())) if found else None


def _check_bfloat16(devices: Sequence[jax.Device]) -> None:
    """Raises UserError for NVIDIA GPUs that cannot multiply in bfloat16."""
    for device in devices:
        capability = _capability(device)
        if capability and capability < AMPERE:
            # Not only cuDNN's kernel: XLA refuses JAX's own, "Unsupported algorithm …".
            raise UserError(
                f"config.dtype = 'bfloat16': {device.device_kind} has no bfloat16, expected an "
                "NVIDIA GPU of compute capability 8.0 (Ampere) or later, found "
                f"{'.'.join(map(str, capability))}; set config.dtype = 'float32'"
            )


def _attention(model: SAVEConfig, devices: Sequence[jax.Device]) -> str:
    """Returns the attention kernel that a config's value means on these devices.

    Raises:
        UserError: cuDNN's is asked for, and cannot be had.
    """
    kernel, obstacle = model.attention, ""
    sizes = {
        "clip.vision": model.clip.vision_width // model.clip.vision_heads,
        "clip.text": model.clip.text_width // model.clip.text_heads,
        "clip.embed_dim": model.clip.embed_dim // model.fusion_heads,
    }
    if model.sound_weight:
        sizes["ast"] = model.ast.width // model.ast.heads
    unfit = [f"{name} {size}" for name, size in sizes.items() if size % 8 or size > 128]
    if model.dtype != "bfloat16" or not all(map(_capability, devices)):
        obstacle = "an NVIDIA GPU and config.dtype = 'bfloat16'"
    elif unfit:
        obstacle = "attention heads of 8, 16, … 128 channels; here they have: " + ", ".join(unfit)
    if kernel == "auto":
        return "xla" if obstacle else "cudnn"
    if kernel == "cudnn" and obstacle:
        raise UserError(
            f"config.model.attention = 'cudnn' needs {obstacle}; 'auto' chooses what fits"
        )
    return kernel


def check(config: Mapping[str, Any], devices: Sequence[jax.Device] | None = None) -> None:
    """Raises UserError for whatever is wrong with a config that shows without data.

    Args:
        config: all of a config's values.
        devices: as in `model_config`.
    """
    check_run(config)
    model_config(config, devices)
    loss_config(config)
    optimizer_config(config, total_steps=1)


def matmul_precision(dtype: str) -> str | None:
    """Returns JAX's precision of matrix products for a compute dtype; None = its default."""
    # Otherwise a GPU multiplies float32 in TF32, and a TPU in bfloat16.
    return "highest" if dtype == "float32" else None


def set_matmul_precision(config: Mapping[str, Any]) -> None:
    """Makes JAX multiply matrices as exactly as a config's dtype promises, from now on."""
    jax.config.update("jax_default_matmul_precision", matmul_precision(config["dtype"]))


def check_run(config: Mapping[str, Any]) -> None:
    """Raises UserError for a mode, split, count, or steps to trace that cannot be."""
    if config["mode"] not in ("train", "evaluate", "follow"):
        raise UserError(
            f"config.mode = {config['mode']!r}: expected 'train', 'evaluate' or 'follow'"
        )
    test = config["data"]["test_split"]
    if config["mode"] != "evaluate" and test and test == config["data"]["eval_split"]:
        raise UserError(
            f"config.data.test_split = {test!r}: expected another split than "
            "config.data.eval_split, which chooses the checkpoint that it reports; leave it empty "
            "to have one split do both"
        )
    for key, (least, meaning) in COUNTS.items():
        if config[key] < least:
            raise UserError(f"config.{key} = {config[key]}: expected at least {least} ({meaning})")
    profiling.steps_of(config["profile"])
    micro, batch = config["micro_batch"], config["batch_size"]
    if micro and batch % micro:
        raise UserError(
            f"config.micro_batch = {micro}: expected a divisor of config.batch_size = {batch}, or "
            "0 for the whole batch"
        )


def loss_config(config: Mapping[str, Any]) -> LossConfig:
    """Returns the constants of the objective.

    Raises:
        UserError: soft-ALBEF is asked for without the sound branch that it aligns.
    """
    loss = _build("loss", LossConfig, config["loss"])
    if loss.soft_albef_weight and not config["model"]["sound_weight"]:
        raise UserError(
            "config.loss.soft_albef_weight > 0 needs sound, and config.model.sound_weight is 0: "
            "set the former to 0, or the latter above 0"
        )
    return loss


def optimizer_config(config: Mapping[str, Any], total_steps: int) -> OptimizerConfig:
    """Returns rates and decay of the groups over a run of `total_steps`."""
    values = dict(config["optimizer"])
    for key, value in values.items():
        if not math.isfinite(value) or value < 0:
            raise UserError(f"config.optimizer.{key} = {value}: expected a number of at least 0")
    if not 0 <= config["ema"] < 1:
        raise UserError(
            f"config.ema = {config['ema']}: expected a decay of at least 0 and below 1, say 0.999; "
            "0 keeps no average"
        )
    values |= {"total_steps": total_steps, "ema": config["ema"]}
    return _build("optimizer", OptimizerConfig, values)


def expected_recipe(model: SAVEConfig, max_frames: int) -> dict[str, int | str]:
    """Returns the recipe's fields that data must have been prepared with for this model."""
    recipe: dict[str, int | str] = {"image_size": model.clip.image_size, "max_frames": max_frames}
    if model.sound_weight:
        recipe |= {"fbank_frames": model.ast.fbank_frames, "mel_bins": model.ast.mel_bins}
    return recipe
