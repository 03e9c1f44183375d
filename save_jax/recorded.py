"""The config that a run was started with, and how it differs from another."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any

from configs import base
from save_jax import files
from save_jax.config import SIZED, sizes_of
from save_jax.errors import UserError

CONTENTS = "data.json"  # digests of the splits that a run reads, in its workdir
RECORDED = "config.json"  # within a workdir
EXIT_FILE = "exit.json"  # {"code": exit code of save_jax.main}, written there by a run's launcher
EXECUTION = ("remat", "attention")  # of model: how it is computed, which does not touch the result
INPUTS = ("max_words", "max_frames", "tokenizer")  # of data: how the model reads texts and videos
# What results depend on, and an evaluation chooses for itself.
EVALUATIONS_OWN = ("dtype", "data.dataset", "data.variant", "data.eval_split")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turns {"optimizer": {"new": 1}} into {"optimizer.new": 1}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def read(path: files.Path) -> dict[str, Any]:
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


def write(
    config: Mapping[str, Any], workdir: files.Path, contents: Mapping[str, str] | None = None
) -> None:
    """Records the config that a run starts with, and its data; not again, where the run has them.

    How an earlier start of the run has ended is true no longer, and removed.

    Args:
        config: the run's config.
        workdir: the run's directory.
        contents: a digest of each split that it reads (`data.Splits.contents`).
    """
    if not files.is_remote(workdir):  # a launcher writes it to a disk
        (workdir / EXIT_FILE).unlink(missing_ok=True)
    for name, value in ((RECORDED, config), (CONTENTS, contents)):
        if value is not None and not (workdir / name).exists():
            files.write(workdir / name, json.dumps(value, indent=2) + "\n")


def deciding(recorded: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """Returns the sections of a recorded config that, with the weights, decide a model's results.

    Args:
        recorded: all of a run's config, or these sections of it. A key that it lacks is newer
            than the run, and has its default, which is how the run was trained.
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
            sizes_of(f"model.{part}", found["model"][part], *kinds)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    return found


def as_trained(
    config: Mapping[str, Any],
    recorded: Mapping[str, Any],
    where: str,
    explicit: Collection[str] = (),
) -> tuple[dict[str, Any], list[str]]:
    """Returns a config to evaluate a run with: what decides its scores is the run's own.

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
    """Returns the keys in which two configs' `deciding` sections differ: key -> both values.

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
            sizes = sizes_of(f"model.{key}", model[key], *SIZED[key])
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
    """Returns what results depend on, besides weights and split: for metrics.json."""
    return {
        "model": dict(config["model"]),
        "loss": {"local_weight": config["loss"]["local_weight"]},
        "data": {key: config["data"][key] for key in ("dataset", "variant", *INPUTS)},
        "dtype": config["dtype"],
    }


def subset(config: Mapping[str, Any], workdir: files.Path) -> str:
    """Names what a config evaluates, where that differs from the workdir's own run.

    Returns:
        "" for the run's own evaluation split, or in a workdir without a run; else the split's name,
        after those of the data set and variant where these differ too.

    Raises:
        UserError: the run's config.json cannot be read.
    """
    path = workdir / RECORDED
    if not path.exists():
        return ""
    own, data = read(path).get("data", {}), config["data"]
    same = {key: own.get(key) == data[key] for key in ("dataset", "variant", "eval_split")}
    if all(same.values()):
        return ""
    names = [data["eval_split"]]
    if not (same["dataset"] and same["variant"]):
        names = [data["dataset"], data["variant"], *names]
    return "-".join(filter(None, names))
