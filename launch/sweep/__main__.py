"""Runs every point of a sweep that is not complete yet.

python -m launch.sweep --config=configs/NAME.py --workdir=DIR --backend=local|slurm|gke|xpk
    [--dry_run] [--config.KEY=VALUE ...] [flags of the backend: --help]

The config file defines `sweep()`, which yields one dictionary of overrides a point, say
{"optimizer.new": 3e-4, "seed": 1}. Each point trains in DIR/NAME, NAME made of its overrides.
Stopped and started again, it runs what is missing: half-done points go on from their checkpoint.

Exit codes: 0 complete (or handed to the cluster), 1 a point failed, 2 a mistake of the user,
75 stopped before the end.
"""

import argparse
import re
import sys

from launch.sweep import gke, local, points, slurm
from save_jax.errors import UserError, exit_codes

BACKENDS = {"local": local.run, "slurm": slurm.run, "gke": gke.run, "xpk": gke.run_xpk}


@exit_codes
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="a config file that defines sweep()")
    parser.add_argument("--workdir", required=True, help="each point trains in a directory below")
    parser.add_argument("--backend", choices=BACKENDS, default="local")
    parser.add_argument(
        "--dry_run", action="store_true", help="print exactly what would run; start nothing"
    )
    for backend in (local, slurm, gke):
        backend.add_flags(parser)
    options, base = parser.parse_known_args(argv)
    for argument in base:
        if not re.fullmatch(r"--config\.[^=]+=.*", argument, re.DOTALL):
            raise UserError(
                f"unexpected argument {argument}: expected --config.KEY=VALUE or a flag that "
                "--help shows"
            )
    sweep = points.load(options.config, options.workdir, base)
    return BACKENDS[options.backend](sweep, options)


if __name__ == "__main__":
    sys.exit(main())
