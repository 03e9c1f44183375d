"""Writes what frozen encoders make of a data set, so that training need not make it again.

python -m save_jax.cache --config=configs/msrvtt.py --init_from=PATH --out=DIR [--parts=...]
    [--config.KEY=VALUE ...]

Then train with the same config and weights, and --config.cache.dir=DIR.
"""

import contextlib
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags, logging
from etils import epath

from save_jax import cache, distributed, files, main, optimizer, sharding, train
from save_jax import config as configuration
from save_jax.cache import writing
from save_jax.errors import OutageError, UserError
from save_jax.progress import say

OUT = flags.DEFINE_string("out", None, "Where the cache goes; it may be there in part.")
INIT_FROM = flags.DEFINE_string(
    "init_from", None, "The weights: a run, or PyTorch's; as config.init_from, which it replaces."
)
SHOWN_PARTS = ", ".join(cache.PARTS)
PARTS = flags.DEFINE_list(
    "parts", None, f"Of {SHOWN_PARTS}; by default all that the config's rates leave frozen."
)
SPLITS = flags.DEFINE_list("splits", None, "By default the config's train_split and eval_split.")
DTYPE = flags.DEFINE_enum(
    "dtype",
    "float16",
    ["float16", "bfloat16", "float32"],
    "How AST's states, nearly all of a cache, are stored; the rest is stored as it is computed.",
)


def run(
    config: dict[str, Any],
    out: str,
    *,
    parts: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    dtype: str = "float16",
) -> None:
    """Writes a cache, or what is missing of it.

    Args:
        config: a training run's.
        out: the cache's directory.
        parts, splits, dtype: as the flags.

    Raises:
        UserError: what is asked for is not frozen, does not fit, or `out` is of something else.
    """
    configuration.check_run(config)
    if config["dtype"] == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    model = configuration.model_config(config)
    rates = configuration.optimizer_config(config, total_steps=1)
    mesh = sharding.make_mesh(config["mesh"])
    sharding.check_batch_size("eval_batch_size", config["eval_batch_size"], mesh)
    if config["data"]["dataset"] == "demo":
        main.prepare_demo(config)
    data = main.Data(config)
    graphdef, abstract = train.abstract_state(model, optimizer.ALL_FROZEN, mesh)
    parts = _chosen(parts, cache.frozen_parts(model, rates, abstract.frozen))
    names = splits or [config["data"]["train_split"], config["data"]["eval_split"]]
    opened = {name: data.to_cache(name, parts) for name in dict.fromkeys(names)}

    _, state = train.create_state(model, optimizer.ALL_FROZEN, config["seed"], mesh)
    if config["init_from"]:
        params = main.load_weights(config, model, state)
    else:
        params = state.frozen
        say(main.RANDOM.format(seed=config["seed"]))
    for name, (split, batches) in opened.items():
        trains = name == config["data"]["train_split"]
        writing.write(
            out,
            split,
            batches,
            model=model,
            graphdef=graphdef,
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


def command(argv: list[str]) -> int:
    """Parses the command line and writes; returns the exit code, as that of `save_jax.main`."""
    logging.set_verbosity(logging.ERROR)
    try:
        config = main.parse_config(argv)
        if not OUT.value:
            raise UserError("--out=DIR is required: where the cache goes")
        if files.is_remote(OUT.value):
            raise UserError(
                f"--out={OUT.value}: expected a directory on a disk, because a cache is mapped "
                "into memory; choose one that all processes see"
            )
        if INIT_FROM.value is not None:
            config["init_from"] = INIT_FROM.value
        distributed.join(
            main.COORDINATOR.value,
            main.NUM_PROCESSES.value,
            main.PROCESS_ID.value,
            main.DISTRIBUTED.value,
        )
        out = str(pathlib.Path(OUT.value).absolute())
        with distributed.lost_peers_end_this_one(), _alone(out):
            run(config, out, parts=PARTS.value, splits=SPLITS.value, dtype=DTYPE.value)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OutageError as error:
        print(f"interrupted: {error}", file=sys.stderr)
        return os.EX_TEMPFAIL
    except KeyboardInterrupt:
        print("stopped: the same command goes on from there", file=sys.stderr)
        return os.EX_TEMPFAIL
    return 0


if __name__ == "__main__":
    sys.exit(command(sys.argv))
