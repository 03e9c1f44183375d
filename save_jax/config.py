"""Reads config files, and turns their values into the typed configs of the parts.

The only reader of config files, and the only place that sets how exactly matrices are multiplied.
"""

import dataclasses
import math
import pathlib
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from save_jax import files
from save_jax.errors import UserError
from save_jax.messages import closest
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
    "log_every": (1, "steps between progress lines"),
}
# What absl's parsers of flags say of a value, and what it means.
NOT_PARSED = {
    "invalid literal for int()": "expected a whole number",
    "could not convert string to float": "expected a number",
    "('Non-boolean argument to boolean flag": "expected true or false",
}
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
    parse_flags(values, argv)
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


def parse_flags(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Parses a command line whose --config is defined by `define_flag`; returns what is no flag.

    Raises:
        UserError: the config file cannot be used, or a flag, a key or a value is wrong.
    """
    file = _config_argument(argv).partition(":")[0]
    if not pathlib.Path(file).is_file():
        raise UserError(
            f"--config={file}: expected a config file, found no such file in "
            f"{pathlib.Path.cwd()}. Give its path, such as configs/msrvtt.py or, with a variant, "
            "configs/msrvtt.py:7k"
        )
    # config_flags loads each file as one module of this name: what an earlier file of this process
    # defined would still be there, its get_config for one.
    sys.modules.pop("config_config", None)
    try:
        rest = values(argv)[1:]
        found = values.config
        getattr(found, "to_dict", None)  # raises what config_flags has put off, if anything
    except Exception as error:  # a config file is a program, and can raise anything
        raise UserError(_explain(error, argv)) from error
    if not isinstance(found, ConfigDict):
        raise UserError(
            f"{file}: expected get_config() to return an ml_collections.ConfigDict, found "
            f"{type(found).__name__}"
        )
    return rest


def _config_argument(argv: Sequence[str]) -> str:
    """Returns the value of a command line's --config: a file, and perhaps a variant."""
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = arg.partition("=")
        if name in ("--config", "-config"):
            return value if equals else following
    return ""


def _explain(error: Exception, argv: Sequence[str]) -> str:
    """Says what went wrong first: config_flags wraps it, traceback and all."""
    file, chain = _config_argument(argv).partition(":")[0], [error]
    while isinstance(cause := chain[-1].__cause__ or chain[-1].__context__, Exception):
        chain.append(cause)
    first = chain[-1]
    found = f"{type(first).__name__}: {first}"
    if isinstance(first, UserError):
        return str(first)
    if isinstance(first, SyntaxError):
        return f"{first.filename}, line {first.lineno}: expected Python, found {found}"
    for raised in reversed(chain):
        frames = traceback.extract_tb(raised.__traceback__)
        if lines := [frame.lineno for frame in frames if frame.filename == file]:
            return (
                f"{file}, line {lines[-1]}: {type(raised).__name__}: {raised}. Correct the file: "
                "expected a get_config() that returns an ml_collections.ConfigDict "
                "(configs/README.md)"
            )
    if isinstance(first, AttributeError) and "get_config" in found:
        return (
            f"{file}: expected a function get_config() that returns an ml_collections.ConfigDict, "
            "found none; configs/README.md shows one"
        )
    if isinstance(first, TypeError) and "get_config" in found:
        return f"{file}: its get_config takes other arguments than the variant given: {first}"
    for part, (variants, _) in SIZED.items():
        key = f"config.model.{part}"
        names = [arg.lstrip("-").partition("=")[0] for arg in argv]
        choices = (
            f"Choose a variant ({', '.join(variants)}) in a config that names one, or set sizes in "
            "a config file of your own, as configs/demo.py does"
        )
        inner = next((name for name in names if name.startswith(f"{key}.")), "")
        if inner and "string indices" in found:
            return f"--{inner}: {key} is a named variant here, which fixes all sizes. {choices}"
        if key in names and "as a ConfigDict" in str(error):
            return (
                f"--{key}: expected a dictionary of sizes, because this config has one. {choices}"
            )
    if isinstance(first, KeyError) and (unknown := _unknown_key(argv)):
        return unknown
    for said, meant in NOT_PARSED.items():
        if said in str(error):
            return str(error).partition(said)[0] + meant
    return found if isinstance(first, AttributeError) else str(error)


def _unknown_key(argv: Sequence[str]) -> str:
    """Says which key of a command line its config lacks, and which may be meant; "" for none."""
    leaves = jax.tree_util.tree_leaves_with_path(read(_config_argument(argv)))
    known = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    flags_of_keys = (re.match(r"--?(?:no)?config\.([^=]+)", arg) for arg in argv)
    lacking = (
        found[1]
        for found in flags_of_keys
        if found and not any(f"{name}.".startswith(f"{found[1]}.") for name in known)
    )
    key = next(lacking, "")
    if not key:
        return ""
    near = closest(key, known)
    return (
        f"unknown config key {key!r}{f': did you mean {near!r}?' if near else '.'} The keys are in "
        "configs/base.py and in the config file"
    )


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
    """Raises UserError for a mode that does not exist, a count out of its range, a remote cache."""
    if config["mode"] not in ("train", "evaluate"):
        raise UserError(f"config.mode = {config['mode']!r}: expected 'train' or 'evaluate'")
    for key, (least, meaning) in COUNTS.items():
        if config[key] < least:
            raise UserError(f"config.{key} = {config[key]}: expected at least {least} ({meaning})")
    if files.is_remote(config["cache"]["dir"]):
        raise UserError(
            f"config.cache.dir = {config['cache']['dir']!r}: expected a directory on a disk, "
            "because a cache is mapped into memory; copy it to one that all processes see"
        )
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
    return _build("optimizer", OptimizerConfig, {**values, "total_steps": total_steps})


def expected_recipe(model: SAVEConfig, max_frames: int) -> dict[str, int | str]:
    """Returns the recipe's fields that data must have been prepared with for this model."""
    recipe: dict[str, int | str] = {"image_size": model.clip.image_size, "max_frames": max_frames}
    if model.sound_weight:
        recipe |= {"fbank_frames": model.ast.fbank_frames, "mel_bins": model.ast.mel_bins}
    return recipe
