"""Compares evaluated runs in one table.

python -m launch.compare WORKDIR [WORKDIR ...]

Each row is a run, in the order given. The columns are text→video SumR, then R@1 over all queries
and over each query group, from the run's last evaluation.
"""

import argparse
import sys

from launch.report.runs import incomparable, last_evaluation
from save_jax import files
from save_jax.arguments import ArgumentParser
from save_jax.errors import EXIT_CODES, exit_codes


def table(results: dict[str, dict]) -> str:
    """Formats one row per run and one column per metric; a group that a run lacks is left blank."""
    groups = list(dict.fromkeys(name for r in results.values() for name in r["groups"]))
    first = next(iter(results.values()))
    columns = ["SumR", "R@1", *groups]
    width = max(map(len, results)) + 2
    sizes = [
        "",
        f"({first['protocol']['captions']})",
        *(f"({first['groups'].get(name, {}).get('queries', '')})" for name in groups),
    ]
    lines = [
        " " * width + "".join(f"{c:>14}" for c in columns),
        " " * width + "".join(f"{c:>14}" for c in sizes),
    ]
    for name, result in results.items():
        values = [
            result["t2v"]["SumR"],
            result["t2v"]["R1"],
            *(result["groups"].get(g, {}).get("t2v", {}).get("R1") for g in groups),
        ]
        lines.append(
            f"{name:<{width}}"
            + "".join(f"{'' if v is None else format(v, '.1f'):>14}" for v in values)
        )
    return "\n".join(lines)


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = ArgumentParser(
        prog="python -m launch.compare",
        description=__doc__,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "workdir", nargs="+", metavar="WORKDIR", help="an evaluated run's --workdir"
    )
    given = parser.parse_args(argv).workdir
    workdirs = [files.path(workdir) for workdir in given]
    names = [workdir.name for workdir in workdirs]
    if len(set(names)) < len(names):
        names = given
    results = {
        name: last_evaluation(workdir) for name, workdir in zip(names, workdirs, strict=True)
    }
    print("Text→video: SumR, then R@1 (%) over all queries and each group (number of queries).")
    print(table(results))
    for problem in incomparable(results):
        print(f"warning: {problem}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
