"""What a run was started with: its config, data and code, and how they differ from another's."""

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax

from configs import base
from save_jax import files, provenance
from save_jax.config import SIZED, model_config, sizes_of
from save_jax.errors import UserError

RECORDED = "config.json"  # within a workdir
# A key of config.json that is none of the config's: "data", what the run reads, "starts", what
# computed it from which step on, and "began", the first start's time in seconds since 1970.
PROVENANCE = "provenance"
CONTENTS = "data.json"  # where earlier versions kept the digests of the splits that a run reads
EXIT_FILE = "exit.json"  # {"code": exit code of save_jax.main}, written there by a run's launcher
# Keys of the config, or sections, that may change when a run is resumed, and why each cannot change
# what is trained. A key counts as one that matters until it is here.
FREE = {
    "mode": "what is done with the run",
    "init_from": "not read by a run that has a checkpoint; before that, it counts",
    "data.dir": "data are known by their digests; of a run that has recorded none, it counts",
    "eval_batch_size": "each clip and caption is embedded by itself",
    "eval_caption_batch_size": "each caption is embedded by itself",
    "eval_matrix_entries": "whether similarity.npy is written",
    "eval_every": "evaluation changes no parameter",
    "follow_keep": "as checkpoint_every: which checkpoints there are",
    "data.test_split": "as eval_every",
    "checkpoint_every": "a state is the same whether it is saved or not",
    "log_every": "lines of progress",
    "profile": "what is recorded of the steps changes none",
    "mesh": "losses and gradient are of the global batch, on whatever devices",
    "micro_batch": "losses and gradient are of the whole batch, in however many parts",
    "model.remat": "what is recomputed in the backward pass",
    "model.attention": "the kernel that computes the same function",
    "cache.dir": "a cache holds what would be computed, and is refused if it does not",
    "compilation_cache": "where compiled programs are kept",
}
# Of these, the model's: how it is computed.
EXECUTION = tuple(key.removeprefix("model.") for key in FREE if key.startswith("model."))
ABSENT = "(absent)"  # stands for the value of a key that there is not
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
    config: Mapping[str, Any],
    workdir: files.Path,
    data: Mapping[str, Any] | None = None,
    start: Mapping[str, Any] | None = None,
    began: float | None = None,
) -> float | None:
    """Records the config that a run starts with and, under PROVENANCE, its data and its starts.

    The first process does; on the others, nothing happens. The config and the data are those of
    the first start. Of later ones, that is recorded in which they differ from the one before:
    devices, versions, keys of the config that may change. How an earlier start of the run has
    ended is true no longer, and removed.

    Args:
        config: the run's config.
        workdir: the run's directory.
        data: what it reads (`data.Splits.provenance`).
        start: from which step it is computed, and how.
        began: when this start was.

    Returns:
        When the run's first start was, of those that say it; None on other processes.
    """
    if jax.process_index():
        return None
    if not files.is_remote(workdir):  # a launcher writes it to a disk
        (workdir / EXIT_FILE).unlink(missing_ok=True)
    path = workdir / RECORDED
    before = read(path) if path.exists() else {}
    found = before or dict(config)
    kept = dict(found.get(PROVENANCE, {}))
    if data is not None:
        kept.setdefault("data", data)
    if began is not None:
        kept.setdefault("began", began)
    if start is not None:
        there = {**flatten(base.get_config().to_dict()), **flatten(without_provenance(found))}
        changed = {k: v for k, v in flatten(config).items() if there.get(k, ABSENT) != v}
        kernel = model_config(config).attention
        start = {**start, "attention": kernel, **provenance.environment(), "changed": changed}
        starts = kept.get("starts", [])
        if not starts or {**starts[-1], "step": start["step"]} != start:
            kept["starts"] = [*starts, start]
    found = {**found, PROVENANCE: kept} if kept else found
    if found != before:
        files.write(path, json.dumps(found, indent=2) + "\n")
    return kept.get("began")


def without_provenance(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what config.json has of the config itself."""
    return {key: value for key, value in recorded.items() if key != PROVENANCE}


def digests(workdir: files.Path) -> dict[str, str]:
    """Returns the digest of each split that a run began with; empty if it has recorded none.

    Raises:
        UserError: they cannot be read.
    """
    path = workdir / RECORDED
    data = (read(path) if path.exists() else {}).get(PROVENANCE, {}).get("data", {})
    if not data and (workdir / CONTENTS).exists():
        return read(workdir / CONTENTS)
    return data.get("digests", {})


def plan(workdir: files.Path) -> dict[str, int]:
    """Returns what a run's last start recorded, its plan included (`meter.Plan.recorded`).

    Raises:
        UserError: an earlier version started it, which did not record that.
    """
    path = workdir / RECORDED
    start = (read(path).get(PROVENANCE, {}).get("starts") or [{}])[-1]
    if "eval_every" not in start:
        raise UserError(
            f"{path} is of an earlier version, and does not say which checkpoints are to be "
            "evaluated. Start the training again, or use config.mode = 'evaluate'"
        )
    return start


def resumable_differences(
    config: Mapping[str, Any], recorded: Mapping[str, Any], free: Collection[str]
) -> dict[str, tuple[Any, Any]]:
    """Returns the keys in which a config and a run's differ so that it cannot be resumed.

    A key that one of them lacks has its default: it is newer than the run, which was trained so.

    Args:
        config: the config now.
        recorded: the run's.
        free: keys and sections that may differ, of FREE.

    Returns:
        Key -> the run's value, and the value now.
    """
    defaults = base.get_config().to_dict()
    configs = [
        {**defaults, **values, "model": {**defaults["model"], **values.get("model", {})}}
        for values in (without_provenance(recorded), config)
    ]
    there, here = ({**flatten(defaults), **flat} for flat in _comparable(*configs))
    return {
        key: (there.get(key, ABSENT), here.get(key, ABSENT))
        for key in sorted(there.keys() | here.keys())
        if there.get(key, ABSENT) != here.get(key, ABSENT)
        and not any(f"{key}.".startswith(f"{name}.") for name in free)
    }


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
    configs = (
        {
            "model": {k: v for k, v in values["model"].items() if k not in EXECUTION},
            "loss": values["loss"],
            "data": {key: values["data"][key] for key in INPUTS},
        }
        for values in (config, other)
    )
    here, there = _comparable(*configs)
    return {
        key: (here.get(key), there[key])
        for key in there
        if here.get(key) != there[key] and f"{key}.".startswith(f"model.{part}." if part else "")
    }


def _comparable(*configs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Flattens configs; encoders are names of variants where all have names, else their sizes."""
    flat = []
    for values in configs:
        model = dict(values["model"])
        for key, kinds in SIZED.items():
            if not all(isinstance(other["model"][key], str) for other in configs):
                model[key] = dataclasses.asdict(sizes_of(f"model.{key}", model[key], *kinds))
        flat.append(flatten({**values, "model": model}))
    return flat


def differences_of_data(split: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for each way in which data differ from those that a run was trained on.

    Sizes that do not fit the model are refused before, when a split is opened.

    Args:
        split: what is evaluated.
        here: what made it, and its digest (see `data.Splits`).
        there: the same of the run; empty, or without a key, where it has recorded none.

    Raises:
        UserError: texts would get other ids than the model has learnt.
    """
    if there.get("vocabulary", here["vocabulary"]) != here["vocabulary"]:
        raise UserError(
            "config.data.tokenizer: expected the vocabulary that the run was trained with, SHA-256 "
            f"{there['vocabulary'][:12]}…, found {here['vocabulary'][:12]}…: texts would get other "
            "ids than the model has learnt. Put the tokenizer's files back that were there then"
        )
    lines = []
    made = [flatten({k: d.get(k, {}) for k in ("recipe", "transcripts")}) for d in (there, here)]
    for key in made[0].keys() & made[1].keys():
        was, now = (facts[key] for facts in made)
        if was != now:
            lines.append(
                f"these data are not made as those that the run was trained on: {key} is {now!r} "
                f"here, {was!r} there"
            )
    same = all(here[key] == there.get(key) for key in ("dataset", "variant"))
    if same and there.get("digests", {}).get(split, here["digest"]) != here["digest"]:
        lines.append(
            f"the split {split!r} is not the one that the run had: it has other clips, captions or "
            "transcripts, or was prepared in another way"
        )
    return sorted(lines)


def protocol(
    config: Mapping[str, Any], kernel: str, data: Mapping[str, Any], warnings: Sequence[str]
) -> dict[str, Any]:
    """Returns what results depend on, besides weights and split: for metrics.json.

    Args:
        config: all of the evaluation's.
        kernel: what config.model.attention means here.
        data: what made the split, and its digest (see `data.Splits`).
        warnings: what the results do not show, or in what the data differ from the run's.
    """
    return {
        "model": {**config["model"], "attention": kernel},
        "loss": {"local_weight": config["loss"]["local_weight"]},
        "data": {**{key: config["data"][key] for key in INPUTS}, **data},
        "dtype": config["dtype"],
        **provenance.environment(),
        "warnings": list(warnings),
    }
