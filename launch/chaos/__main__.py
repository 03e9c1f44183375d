r"""Kills, stops and interrupts a run's processes at random moments; checks that nothing is lost.

python -m launch.chaos --data=PREPARED --workdir=DIR [--faults=N] [--least=N] [--seed=N] \
    [--config.KEY=VALUE ...]

Trains the demo's models on CPU devices, as jobs of one to four processes. SIGKILL or SIGTERM hits
one process of a job, or all of them, in its start-up, in a step, in the write of a checkpoint or in
an evaluation; the job is started anew until the run is complete. Its last checkpoint is then
compared with that of runs that nothing happened to:

same     each start has the same processes and devices: every array is bit-equal.
other    each start has other ones, 10 steps: parameters are equal to 1e-5.
long     likewise, 40 steps: as near to an undisturbed run as two of these are to each other.
stopped  the process stands still (SIGSTOP) until another has taken its lock, and then goes on
         (SIGCONT): it ends with exit code 1, and the other's run is bit-equal.

Faults count if they hit a live process. Cases follow from --seed; one that passed is a line of
DIR/chaos.jsonl and is not run again, so that an interrupted command goes on where it was.
"""

import argparse
import sys

from launch.chaos.campaign import Campaign
from launch.chaos.verdicts import Failure
from save_jax.arguments import ArgumentParser
from save_jax.errors import EXIT_CODES, exit_codes


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = ArgumentParser(
        prog="python -m launch.chaos",
        description=__doc__,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="the prepared demo")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="for all runs")
    parser.add_argument(
        "--models",
        default="clip4clip,clip4clip,save",
        metavar="NAME,…",
        help="variants of configs/demo.py, of which each case takes one (default: %(default)s)",
    )
    for flag, default, meaning in (
        ("--faults", 200, "faults in all (default: %(default)s)"),
        ("--least", 30, "the fewest faults in each stage (default: %(default)s)"),
        ("--seed", 0, "chooses cases and moments (default: %(default)s)"),
    ):
        parser.add_argument(flag, type=int, default=default, metavar="N", help=meaning)
    options, options.overrides = parser.parse_known_args(argv)
    for override in options.overrides:
        if not override.startswith("--config."):
            parser.error(f"unrecognized argument: {override}")
    campaign = Campaign(options)
    try:
        campaign.run()
    except Failure as failure:
        print(f"failed: {failure}", file=sys.stderr)
        return 1
    print(f"{campaign.hit.total()} faults, nothing lost: {campaign.counts()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
