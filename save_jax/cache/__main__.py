"""Writes what frozen encoders make of a data set, so that training need not make it again.

python -m save_jax.cache --config=configs/msrvtt.py --init_from=PATH --out=DIR [--parts=...]
    [--config.KEY=VALUE ...]

Then train with the same config and weights, and --config.cache.dir=DIR.
"""

import contextlib
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags, logging
from etils import epath

from save_jax import cache, cli, distributed, files, optimizer, resume, sharding, train
from save_jax import config as configuration
from save_jax.cache import writing
from save_jax.data import Splits, prepare_demo
from save_jax.errors import UserError, exit_codes
from save_jax.progress import say

SHOWN_PARTS = ", ".join(cache.PARTS)


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "out", None, "Where the cache goes; it may be there in part.", flag_values=values
    )
    flags.DEFINE_string(
        "init_from",
        None,
        "The weights: a run, or PyTorch's; as config.init_from, which it replaces.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "parts",
        None,
        f"Of {SHOWN_PARTS}; by default all that the config's rates leave frozen.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "splits", None, "By default the config's train_split and eval_split.", flag_values=values
    )
    flags.DEFINE_enum(
        "dtype",
        "float16",
        ["float16", "bfloat16", "float32"],
        "How AST's states, nearly all of a cache, are stored; the rest is stored as computed.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "trust_archive",
        False,
        "Read a TorchScript archive whose SHA-256 is not one of OpenAI's.",
        flag_values=values,
    )


def run(
    config: dict[str, Any],
    out: str,
    *,
    parts: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    dtype: str = "float16",
    trust_archive: bool = False,
) -> None:
    """Writes a cache, or what is missing of it.

    Args:
        config: a training run's.
        out: the cache's directory.
        parts, splits, dtype, trust_archive: as the flags.

    Raises:
        UserError: what is asked for is not frozen, does not fit, or `out` is of something else.
    """
    configuration.check(config)
    configuration.set_matmul_precision(config)
    model = configuration.model_config(config)
    rates = configuration.optimizer_config(config, total_steps=1)
    mesh = sharding.make_mesh(config["mesh"])
    sharding.check_batch_size("eval_batch_size", config["eval_batch_size"], mesh)
    if config["data"]["dataset"] == "demo":
        prepare_demo(config)
    data = Splits(config)
    structure, abstract = train.abstract_state(model, optimizer.ALL_FROZEN, mesh)
    parts = _chosen(parts, cache.frozen_parts(model, rates, abstract.frozen))
    names = splits or [config["data"]["train_split"], config["data"]["eval_split"]]
    opened = {name: data.to_cache(name, parts) for name in dict.fromkeys(names)}

    _, state = train.create_state(model, optimizer.ALL_FROZEN, config["seed"], mesh)
    if config["init_from"]:
        params = resume.load_weights(config, model, state.frozen, trust_archive=trust_archive)
    else:
        params = state.frozen
        say(resume.RANDOM.format(seed=config["seed"]))
    for name, (split, batches) in opened.items():
        trains = name == config["data"]["train_split"]
        writing.write(
            out,
            split,
            batches,
            model=model,
            structure=structure,
            params=params,
            parts=[part for part in parts if trains or part not in cache.ONLY_TRAINING],
            dtype=dtype,
            mesh=mesh,
            batch_size=config["eval_batch_size"],
        )
    say(f"train from it with --config.cache.dir={out}")


def _chosen(parts: Sequence[str] | None, frozen: Sequence[str]) -> Sequence[str]:
    unknown = sorted(set(parts or ()) - set(cache.PARTS))
    if unknown:
        raise UserError(f"--parts={','.join(parts)}: expected some of {SHOWN_PARTS}")
    moving = [part for part in parts or () if part not in frozen]
    if moving:
        raise UserError(
            f"--parts={','.join(parts)}: {', '.join(moving)} would change while this config "
            "trains, or its model has no such branch. Frozen are "
            f"{', '.join(frozen)}; config.optimizer.clip=0 and config.optimizer.ast=0 freeze CLIP "
            "and AST."
        )
    if all(part == "teacher" for part in parts or frozen):
        raise UserError(
            "no encoder is frozen that a cache could stand for: config.optimizer.clip=0 (and "
            ".clip_stem=0) freeze CLIP, config.optimizer.ast=0 freezes AST"
        )
    return parts or frozen


def _alone(out: str) -> contextlib.AbstractContextManager:
    """Keeps other commands from writing the same cache meanwhile."""
    if jax.process_index():
        return contextlib.nullcontext()
    from data_pipelines.storage import lock

    return lock.hold(epath.Path(out), wait=False)


@exit_codes
def command(argv: list[str]) -> int:
    """Parses the command line and writes; returns the exit code, as that of `save_jax.main`."""
    logging.set_verbosity(logging.ERROR)
    line = cli.parse(argv, __doc__, _define)
    config, given = line.config, line.flags
    if not given.out:
        raise UserError("--out=DIR is required: where the cache goes")
    if files.is_remote(given.out):
        raise UserError(
            f"--out={given.out}: expected a directory on a disk, because a cache is mapped "
            "into memory; choose one that all processes see"
        )
    if given.init_from is not None:
        config["init_from"] = given.init_from
    cli.join_processes(given)
    out = str(pathlib.Path(given.out).absolute())
    with distributed.lost_peers_end_this_one(), _alone(out):
        run(
            config,
            out,
            parts=given.parts,
            splits=given.splits,
            dtype=given.dtype,
            trust_archive=given.trust_archive,
        )
    return 0


if __name__ == "__main__":
    sys.exit(command(sys.argv))
