"""Writes the outputs of frozen encoders for a data set, so that training can read them.

python -m save_jax.cache --config=configs/msrvtt.py --init_from=PATH --out=DIR [--parts=...]
    [--config.KEY=VALUE ...]

Then train with the same config and weights, and --config.cache.dir=DIR.
"""

import sys

from absl import flags, logging

from save_jax import cli, distributed, files
from save_jax.cache.build import SHOWN_PARTS, run
from save_jax.errors import UserError, exit_codes


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "out",
        None,
        "Directory of the cache, or a bucket; one that is incomplete is resumed.",
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


@exit_codes
def command(argv: list[str]) -> int:
    """Parses the command line and writes; returns the exit code, as that of `save_jax.main`."""
    logging.set_verbosity(logging.ERROR)
    line = cli.parse(argv, __doc__, _define)
    config, given = line.config, line.flags
    if not given.out:
        raise UserError("--out=DIR is required: where the cache goes")
    if given.init_from is not None:
        config["init_from"] = given.init_from
    out = files.path(given.out)
    cli.join_processes(given)
    with distributed.exit_alone(), distributed.hold(out):
        run(
            config,
            str(out),
            parts=given.parts,
            splits=given.splits,
            dtype=given.dtype,
            trust_archive=given.trust_archive,
        )
    return 0


if __name__ == "__main__":
    sys.exit(command(sys.argv))
