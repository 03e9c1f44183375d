"""Reads config files, and turns their values into the typed configs of the parts.

The only reader of config files, and the only place that sets how exactly matrices are multiplied.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from save_jax import files
from save_jax.errors import UserError
from save_jax.models import ast, clip, layers
from save_jax.models.save import SAVEConfig
from save_jax.objectives import LossConfig
from save_jax.optimizer import OptimizerConfig

DTYPES = ("float32", "bfloat16")
AMPERE = (8, 0)  # NVIDIA's compute capability that brought bfloat16, and cuDNN's fused attention
SIZED = {"clip": (clip.VARIANTS, clip.CLIPConfig), "ast": (ast.VARIANTS, ast.ASTConfig)}


def read(path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reads a config file.

    Args:
        path: FILE.py, or FILE.py:VARIANT.
        overrides: as on a command line, "--config.KEY=VALUE".

    Raises:
        UserError: the file, a key or a value is wrong.
    """
    values, argv = flags.FlagValues(), ["", f"--config={path}", *overrides]
    define_flag(values, argv)
    with user_errors():
        values(argv)
        return values.config.to_dict()


def define_flag(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Defines --config, a config file, and --config.KEY for the keys that `argv` overrides."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Experiment, with an optional variant after a colon: configs/msrvtt.py:7k; without it, the "
        "demo. --config.KEY=VALUE sets a key; configs/base.py has them all.",
        flag_values=values,
        sys_argv=list(argv),
    )


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Converts errors from reading a config file and its overrides into UserError."""
    try:
        yield
    except (
        flags.Error,
        AttributeError,
        KeyError,
        SyntaxError,
        TypeError,
        ValueError,
        OSError,
        UserError,
    ) as error:
        raise UserError(_first_cause(error)) from error


def _first_cause(error: BaseException) -> str:
    """What went wrong first, in a line: config_flags wraps it, traceback and all."""
    if "Traceback" not in str(error) and not isinstance(error, (AttributeError, KeyError)):
        return str(error)
    # ConfigDict says of its own keys that they are no attributes; other KeyErrors are the file's.
    of_config = False
    while error.__cause__ or error.__context__:
        of_config |= isinstance(error, AttributeError)
        error = error.__cause__ or error.__context__
    if isinstance(error, KeyError) and of_config:
        return f"unknown config key {error}; the keys are in configs/base.py and in the config file"
    return f"{type(error).__name__}: {error}" if not isinstance(error, UserError) else str(error)


def sizes_of(
    key: str, value: str | Mapping[str, int], variants: Mapping[str, Any], cls: type
) -> Any:
    """A named variant, or a mapping of sizes; sizes left out are those of the default variant."""
    if isinstance(value, str):
        if value not in variants:
            raise UserError(
                f"config.{key} = {value!r}: expected one of {', '.join(variants)}, or "
                "a dictionary of sizes"
            )
        return variants[value]
    return _build(key, cls, value)


def _build(key: str, cls: type, values: Mapping[str, Any]) -> Any:
    """A dataclass from a mapping; unknown fields are named."""
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
    """Sizes and branches of the model a config describes.

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
    """An NVIDIA GPU's compute capability, say (8, 6); None for any other device."""
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
    """The attention kernel that a config's value means on these devices.

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
        obstacle = "heads of 8, 16, … 128 channels, and those here have: " + ", ".join(unfit)
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
    """Raises UserError for a mode that does not exist, a count out of its range, a remote cache."""
    if config["mode"] not in ("train", "evaluate"):
        raise UserError(f"config.mode = {config['mode']!r}: expected 'train' or 'evaluate'")
    least = {"epochs": 1, "steps": 0, "eval_every": 1, "checkpoint_every": 0, "log_every": 1}
    for key, minimum in least.items():
        if config[key] < minimum:
            raise UserError(f"config.{key} = {config[key]}: expected at least {minimum}")
    if files.is_remote(config["cache"]["dir"]):
        raise UserError(
            f"config.cache.dir = {config['cache']['dir']!r}: expected a directory on a disk, "
            "because a cache is mapped into memory; copy it to one that all processes see"
        )
    micro, batch = config["micro_batch"], config["batch_size"]
    if micro and (micro < 0 or batch % micro):
        raise UserError(
            f"config.micro_batch = {micro}: expected a divisor of config.batch_size = {batch}, or 0"
        )


def loss_config(config: Mapping[str, Any]) -> LossConfig:
    """Constants of the objective.

    Raises:
        UserError: soft-ALBEF is asked for without the sound branch that it aligns.
    """
    loss = _build("loss", LossConfig, config["loss"])
    if loss.soft_albef_weight and not config["model"]["sound_weight"]:
        raise UserError(
            "config.loss.soft_albef_weight > 0 needs sound: set it to 0, or "
            "config.model.sound_weight above 0"
        )
    return loss


def optimizer_config(config: Mapping[str, Any], total_steps: int) -> OptimizerConfig:
    """Rates and decay of the groups over a run of `total_steps`."""
    values = dict(config["optimizer"])
    for key, value in values.items():
        if not math.isfinite(value) or value < 0:
            raise UserError(f"config.optimizer.{key} = {value}: expected a number of at least 0")
    return _build("optimizer", OptimizerConfig, {**values, "total_steps": total_steps})


def expected_recipe(model: SAVEConfig, max_frames: int) -> dict[str, int]:
    """What a prepared directory must have been made with, for this model to read it."""
    recipe = {"image_size": model.clip.image_size, "max_frames": max_frames}
    if model.sound_weight:
        recipe |= {"fbank_frames": model.ast.fbank_frames, "mel_bins": model.ast.mel_bins}
    return recipe
