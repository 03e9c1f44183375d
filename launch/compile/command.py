"""Compiles a config's programs for devices that are not there, and prints their requirements.

python -m launch.compile --config=configs/NAME.py --topology=v5e:2x4 [--batch=N] [--json]
    [--config.KEY=VALUE ...]

The training step and both halves of evaluation are compiled for the target as in a run; nothing is
computed, and no accelerator is needed. The table shows, per chip, their memory, floating-point
operations, HBM traffic and collectives, and the least time that these take.

A topology is a TPU slice (v4:2x2x2, v5e:2x4, v5p:2x2x2, v6e:2x4 and other shapes), cpu:N, gpu:N or
"here", the devices of this machine. Several, separated by commas, are printed as one line each.
"""

import argparse
import sys
from typing import Any

import jax

from launch.compile import program, table
from launch.compile.roofline import GIB
from launch.sweep import points
from save_jax.arguments import ArgumentParser
from save_jax.errors import exit_codes

REMEDIES = (
    "a larger topology, a smaller --batch, --config.micro_batch=N (clips encoded at once), "
    "--config.model.remat=products or blocks, --config.mesh.fsdp=N (shards the parameters)"
)


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = ArgumentParser(
        prog="python -m launch.compile",
        description=__doc__,
        epilog="exit codes: 0 it fits; 2 a mistake in what you gave; 75 interrupted: run the same "
        "command again;\n1 it does not fit, as stderr then says, or a fault of the program",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="a config file, as for save_jax.main"
    )
    parser.add_argument(
        "--topology", required=True, metavar="NAME", help="the devices to compile for, see above"
    )
    parser.add_argument(
        "--batch", type=int, metavar="N", help="clips per step (default: batch_size of the config)"
    )
    parser.add_argument("--training_only", action="store_true", help="do not compile evaluation")
    parser.add_argument(
        "--json", action="store_true", help="also print one line of JSON per topology"
    )
    options, overrides = parser.parse_known_args(argv)
    for argument in overrides:
        if argument.startswith("--") and "config." not in argument:  # nor the value of a key
            parser.error(f"unexpected argument {argument}: expected --config.KEY=VALUE or a flag")
    names = options.topology.split(",")
    if "here" not in names and not any(name.startswith("gpu") for name in names):
        jax.config.update("jax_platforms", "cpu")  # do not look for a TPU that is not there
    targets = [program.find_target(name) for name in names]
    if options.batch is not None:
        overrides.append(f"--config.batch_size={options.batch}")
    config = points.resolve(options.config, overrides)
    return _run(config, targets, options)


def _run(config: dict[str, Any], targets: list[program.Target], options: argparse.Namespace) -> int:
    unfit = []
    if len(targets) > 1:
        print("| " + " | ".join(table.HEAD) + " |\n|" + " --- |" * len(table.HEAD))
    for target in targets:
        measured = program.report(config, target, training_only=options.training_only)
        if len(targets) > 1:
            cells = table.summary(config, target, measured["training step"])
            print("| " + " | ".join(cells) + " |")
        else:
            print(table.table(config, target, measured))
        if options.json:
            print(table.as_json(config, target, measured))
        sys.stdout.flush()
        unfit += [
            f"the {name} needs {table.number(m.needed / GIB)} GiB"
            + (f" of a {target.name} chip's {target.chip.memory / GIB:g}" if target.chip else "")
            for name, m in measured.items()
            if not m.fits
        ]
    if unfit:
        print(f"does not fit: {'; '.join(unfit)}. Try {REMEDIES}", file=sys.stderr)
        return 1
    return 0
