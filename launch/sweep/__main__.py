"""Runs every point of a sweep that is not complete yet.

python -m launch.sweep --config=configs/NAME.py --workdir=DIR --backend=local|slurm|gke|xpk
    [--dry_run] [--config.KEY=VALUE ...] [flags of the backend: --help]

The config file defines `sweep()`, which yields one dictionary of overrides per point, such as
{"optimizer.new": 3e-4, "seed": 1}. Each point trains in DIR/NAME; NAME is made from its overrides.
Run the same command again after an interruption: it runs the points that are not complete, and
points with a checkpoint resume from it.
"""

import argparse
import re
import sys

from launch.sweep import gke, local, points, slurm
from save_jax.arguments import ArgumentParser
from save_jax.errors import exit_codes

BACKENDS = {"local": local.run, "slurm": slurm.run, "gke": gke.run, "xpk": gke.run_xpk}


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code, which --help explains."""
    parser = ArgumentParser(
        prog="python -m launch.sweep",
        description=__doc__,
        epilog="exit codes: 0 every point is complete, or was handed to the cluster; 2 a mistake "
        "in what you gave;\n75 interrupted before the end: run the same command again; 1 a point "
        "failed or was not\naccepted, or a fault of the program",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="a config file that defines sweep()"
    )
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="each point trains in DIR/NAME"
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="local",
        help="where the points run: this machine, SLURM, Kubernetes, or Kubernetes through xpk "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print what would run, and start nothing"
    )
    for backend in (local, slurm, gke):
        backend.add_flags(parser)
    options, base = parser.parse_known_args(argv)
    for argument in base:
        if not re.fullmatch(r"--config\.[^=]+=.*", argument, re.DOTALL):
            parser.error(f"unexpected argument {argument}: expected --config.KEY=VALUE or a flag")
    sweep = points.load(options.config, options.workdir, base)
    return BACKENDS[options.backend](sweep, options)


if __name__ == "__main__":
    sys.exit(main())
