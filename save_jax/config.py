"""From a config file's values to the typed configs of the parts, with errors a user can act on."""

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import flags

from configs import base
from save_jax import files
from save_jax.errors import UserError
from save_jax.models import ast, clip, layers
from save_jax.models.save import SAVEConfig
from save_jax.objectives import LossConfig
from save_jax.optimizer import OptimizerConfig

DTYPES = ("float32", "bfloat16")
AMPERE = (8, 0)  # NVIDIA's compute capability that brought bfloat16, and cuDNN's fused attention
SIZED = {"clip": (clip.VARIANTS, clip.CLIPConfig), "ast": (ast.VARIANTS, ast.ASTConfig)}
RECORDED = "config.json"  # within a workdir: the config that its run was started with
EXECUTION = ("remat", "attention")  # of model: how it is computed, which does not touch the result
INPUTS = ("max_words", "max_frames", "tokenizer")  # of data: how the model reads texts and videos
# What results depend on, and an evaluation chooses for itself.
EVALUATIONS_OWN = ("dtype", "data.dataset", "data.variant", "data.eval_split")


@contextlib.contextmanager
def mistakes_named() -> Iterator[None]:
    """Within it, a config file and its overrides are read; what is wrong becomes a UserError."""
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


def _sizes(key: str, value: str | Mapping[str, int], variants: Mapping[str, Any], cls: type) -> Any:
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
        values[part] = _sizes(f"model.{part}", values[part], *kinds)
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


#### What a run was trained as: its recorded config.


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optimizer": {"new": 1}} as {"optimizer.new": 1}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def read_recorded(path: files.Path) -> dict[str, Any]:
    """Reads a run's config.json.

    Raises:
        UserError: it cannot be read, or is damaged.
    """
    try:
        recorded = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}): restore it, or use another run's directory"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(recorded, dict):
        raise UserError(f"{path}: expected the config of a run, found {recorded!r:.80}: restore it")
    return recorded


def deciding(recorded: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """The sections of a recorded config that, beside the weights, decide what a model answers.

    Args:
        recorded: all of a run's config, or these sections of it. A key that it lacks is younger
            than the run, and has the default, with which the run was trained without knowing it.
        where: names it in messages.

    Returns:
        "model" without EXECUTION, "loss", and "data" with INPUTS alone.

    Raises:
        UserError: it is no run's, or a newer version's.
    """
    defaults, found = base.get_config().to_dict(), {}
    for section in ("model", "loss", "data"):
        values = recorded.get(section)
        if not isinstance(values, Mapping):
            raise UserError(f"{where}: expected the config of a run, found no {section!r} in it")
        if section != "data" and (unknown := sorted(set(values) - set(defaults[section]))):
            raise UserError(
                f"{where} has {section}.{f', {section}.'.join(unknown)}, which this version does "
                "not know: use the version that trained the run"
            )
        keys = INPUTS if section == "data" else [k for k in defaults[section] if k not in EXECUTION]
        found[section] = {key: values.get(key, defaults[section][key]) for key in keys}
    for part, kinds in SIZED.items():
        try:
            _sizes(f"model.{part}", found["model"][part], *kinds)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    return found


def as_trained(
    config: Mapping[str, Any],
    recorded: Mapping[str, Any],
    where: str,
    explicit: Collection[str] = (),
) -> tuple[dict[str, Any], list[str]]:
    """A config to evaluate a run with: what decides its scores is the run's own.

    Args:
        config: what the user asks for.
        recorded: the run's config; see `deciding`.
        where: names the latter in messages.
        explicit: keys that the command line sets itself, "model.sound_weight" or "model.clip".

    Returns:
        The config, and a line for each key in which the user's and the run's differ.

    Raises:
        UserError: an explicit key contradicts the run, or `recorded` is not of a run.
    """
    found = deciding(recorded, where)
    absent = {f"{k}.{key}" for k, values in found.items() for key in values.keys() - recorded[k]}
    differing = differences(config, found)
    contradicting = [
        f"  --config.{key}={here}, but {there} in {where}"
        + (" (by default: it is older than this key)" if key in absent else "")
        for key, (here, there) in differing.items()
        if any(f"{key}.".startswith(f"{flag}.") for flag in explicit)
    ]
    if contradicting:
        raise UserError(
            "the command line asks for another model than the one that was trained:\n"
            + "\n".join(contradicting)
            + "\nLeave these flags out: a run is evaluated as it was trained. To have its weights "
            "in another model on purpose, take them out of the run: python -m save_jax.weights "
            "import RUN --out=DIR, then --config.init_from=DIR"
        )
    own, its = flatten(config), flatten(recorded)
    lines = [
        f"{key}: {here!r} in the config, {there!r} in {where}: the run's is used"
        for key, (here, there) in differing.items()
        if key not in absent
    ]
    lines += [
        f"{key}: not in {where}, which is older than this key: its default is used, {value!r}"
        for key, value in flatten(found).items()
        if key in absent
    ]
    lines += [
        f"{key}: {own[key]!r} in the config, {its[key]!r} in {where}: the config's is used"
        for key in EVALUATIONS_OWN
        if key in its and its[key] != own[key]
    ]
    return {**config, **{k: {**config[k], **values} for k, values in found.items()}}, lines


def differences(
    config: Mapping[str, Any], other: Mapping[str, Any], part: str = ""
) -> dict[str, tuple[Any, Any]]:
    """The keys in which two configs' `deciding` sections differ: key -> the value in each.

    Args:
        config: all of a config.
        other: sections as `deciding` gives them.
        part: "clip" or "ast" for the sizes of that encoder alone.
    """
    names = {key for key in SIZED if all(isinstance(c["model"][key], str) for c in (config, other))}
    flat = []
    for values in (config, other):
        model = {k: v for k, v in values["model"].items() if k not in EXECUTION}
        for key in SIZED.keys() - names:  # names of variants are compared as such, sizes one by one
            sizes = _sizes(f"model.{key}", model[key], *SIZED[key])
            model[key] = dataclasses.asdict(sizes)
        data = {key: values["data"][key] for key in INPUTS}
        flat.append(flatten({"model": model, "loss": values["loss"], "data": data}))
    here, there = flat
    return {
        key: (here.get(key), there[key])
        for key in there
        if here.get(key) != there[key] and f"{key}.".startswith(f"model.{part}." if part else "")
    }


def protocol(config: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluation's results depend on, beside weights and split: for its metrics.json."""
    return {
        "model": dict(config["model"]),
        "loss": {"local_weight": config["loss"]["local_weight"]},
        "data": {key: config["data"][key] for key in ("dataset", "variant", *INPUTS)},
        "dtype": config["dtype"],
    }
