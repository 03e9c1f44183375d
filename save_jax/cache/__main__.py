"""Writes the outputs of frozen encoders for a data set, so that training can read them.

python -m save_jax.cache --config=configs/msrvtt.py --init_from=PATH --out=DIR [--parts=...]
    [--config.KEY=VALUE ...]

Then train with the same config and weights, and --config.cache.dir=DIR.
"""

import contextlib
import pathlib
import sys

import jax
from absl import flags, logging

from save_jax import cli, distributed, files, locks
from save_jax.cache.build import SHOWN_PARTS, run
from save_jax.errors import UserError, exit_codes


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "out",
        None,
        "Directory of the cache; one that is incomplete is resumed.",
        flag_values=values,
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
    cli.define_trust_archive(values)


def _alone(out: str) -> contextlib.AbstractContextManager:
    """Keeps other commands from writing the same cache meanwhile."""
    if jax.process_index():
        return contextlib.nullcontext()
    return locks.hold(pathlib.Path(out))


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
    with distributed.exit_alone(), _alone(out):
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
