"""Shows all runs below a directory in one table, and in a plot.

python -m launch.report DIR [--metric=SumR] [--csv=FILE] [--plot=FILE [--x=KEY]]

Each row is a run: its name, the config keys in which the runs differ, its step, the text→video
metrics of its last evaluation, and its state. The best run by --metric is first. Add a direction or
a query group to the metric's name to order by another one: v2t/SumR, speech/R1.

States: "complete"; "running"; "stopped" (the same command resumes it); "failed"; "waiting" (a point
of a sweep that was not started yet). Where a run's process cannot be checked, because it is on
another machine or the run is in a bucket, a note on stderr says what is assumed and why.
"""

import argparse
import collections
import csv
import math
import pathlib
import sys
from typing import Any

from launch.report import runs
from save_jax import files
from save_jax.arguments import ArgumentParser
from save_jax.errors import EXIT_CODES, UserError, exit_codes
from save_jax.messages import closest
from save_jax.recorded import flatten

METRICS = ("SumR", "R1", "R5", "R10", "MdR", "MnR")
RANKS = ("MdR", "MnR")  # for these, lower is better
# Keys that say where or how a run works, not what it computes.
PLACES = ("data.dir", "cache.dir", "mode", "log_every", "checkpoint_every")
PLACES += ("eval_caption_batch_size", "eval_matrix_entries")
ABSENT = "-"


def metric(run: runs.Run, name: str) -> float | None:
    """Returns a metric of a run's last evaluation, such as SumR, v2t/SumR or GROUP/R1, or None."""
    if run.evaluation is None:
        return None
    *where, key = name.split("/")
    if not where or where == ["t2v"]:
        values = run.evaluation["t2v"]
    elif where == ["v2t"]:
        values = run.evaluation.get("v2t", {})
    else:
        values = run.evaluation.get("groups", {}).get("/".join(where), {}).get("t2v", {})
    value = values.get(key)
    return float(value) if isinstance(value, (int, float)) else None


def differing(found: list[runs.Run]) -> list[str]:
    """Returns the config keys in which the runs differ, in the configs' order."""
    flat = [flatten(run.config) for run in found if run.config]
    keys = dict.fromkeys(key for config in flat for key in config)
    return [
        key
        for key in keys
        if key not in PLACES and len({repr(config.get(key)) for config in flat}) > 1
    ]


def ordered(found: list[runs.Run], name: str) -> list[runs.Run]:
    """Sorts runs by a metric, the best first; runs without it come last.

    Raises:
        UserError: some runs are evaluated, but none has such a metric.
    """
    values = [metric(run, name) for run in found]
    if all(value is None for value in values) and any(run.evaluation for run in found):
        groups = dict.fromkeys(
            group for run in found if run.evaluation for group in run.evaluation.get("groups", {})
        )
        of = ("", "v2t/", *(f"{group}/" for group in groups))
        near = closest(name, [f"{where}{key}" for where in of for key in METRICS])
        raise UserError(
            f"--metric={name}: no run has it{f'; did you mean {near}?' if near else '.'} "
            f"Expected one of {', '.join(METRICS)}, alone or with a direction or query group: "
            f"{', '.join(f'{of}/R1' for of in ('v2t', *groups))}"
        )
    sign = 1 if name.split("/")[-1] in RANKS else -1

    def key(item: tuple[runs.Run, float | None]) -> tuple[bool, float]:
        value = item[1]
        missing = value is None or math.isnan(value)
        return missing, 0.0 if missing else sign * value

    return [run for run, _ in sorted(zip(found, values, strict=True), key=key)]


def table(found: list[runs.Run], directory: files.Path, name: str) -> list[dict[str, Any]]:
    """Returns one dictionary per run, all with the same columns; None where there is no value."""
    keys = differing(found)
    names = METRICS if name in METRICS else (name, *METRICS)
    rows = []
    for run in found:
        config = flatten(run.config)
        rows.append(
            {
                "run": run_name(run, directory),
                **{key: config.get(key) for key in keys},
                "step": run.step,
                **{column: metric(run, column) for column in names},
                "state": run.state,
            }
        )
    return rows


def run_name(run: runs.Run, directory: files.Path) -> str:
    """Returns a run's path below the directory that is reported."""
    below = str(run.workdir).removeprefix(str(directory)).lstrip("/")
    return below or run.workdir.name


def as_text(rows: list[dict[str, Any]]) -> str:
    """Formats the table for a terminal, with numbers aligned to the right."""
    columns = list(rows[0])
    cells = [[_cell(row[column], column) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    left = [
        all(isinstance(row[column], str) or row[column] is None for row in rows)
        for column in columns
    ]
    return "\n".join(
        "  ".join(
            text.ljust(width) if to_left else text.rjust(width)
            for text, width, to_left in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in [columns, *cells]
    )


def write_csv(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Writes the same table as CSV, with all digits."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def plot(found: list[runs.Run], name: str, key: str, path: pathlib.Path) -> None:
    """Draws a metric against a config key: one dot per run, a line through the means of the seeds.

    Runs that also differ in keys other than `key` and `seed` are drawn as separate lines.

    Args:
        found: the runs; those without the metric are left out.
        name: the metric.
        key: the swept key; "" for the only key in which the runs differ.
        path: the file to write; its suffix gives the format.

    Raises:
        UserError: matplotlib is not installed, or there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "--plot needs matplotlib. In a clone of the repository: pip install -e '.[plot]'"
        ) from error
    keys = differing(found)
    if not key:
        swept = [k for k in keys if k != "seed"]
        if len(swept) != 1:
            raise UserError(
                f"--plot needs --x=KEY, a config key, because the runs differ in "
                f"{', '.join(swept) or 'none'}"
            )
        key = swept[0]
    others = [k for k in keys if k not in (key, "seed")]
    lines: dict[str, dict[Any, list[float]]] = {}
    for run in found:
        config, value = flatten(run.config), metric(run, name)
        if value is None or math.isnan(value) or key not in config:
            continue
        label = ", ".join(f"{k} = {_cell(config.get(k), k)}" for k in others)
        lines.setdefault(label, collections.defaultdict(list))[config[key]].append(value)
    if not lines:
        raise UserError(f"nothing to plot: no run has both {name} and config.{key}")

    at = {x for line in lines.values() for x in line}
    numeric = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in at)
    # Values that are not numbers are placed side by side, in the order of their names.
    position = {
        x: x if numeric else i for i, x in enumerate(sorted(at, key=None if numeric else str))
    }
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for label, line in sorted(lines.items()):
        xs = sorted(line, key=lambda x: position[x])
        (drawn,) = axes.plot(
            [position[x] for x in xs], [sum(line[x]) / len(line[x]) for x in xs], label=label
        )
        axes.plot(
            [position[x] for x in xs for _ in line[x]],
            [value for x in xs for value in line[x]],
            "o",
            color=drawn.get_color(),
        )
    if numeric:
        if is_logarithmic(at):
            axes.set_xscale("log")
        if len(at) <= 12:
            axes.set_xticks(sorted(at), [f"{x:g}" for x in sorted(at)])
            axes.set_xticks([], minor=True)
    else:
        axes.set_xticks(list(position.values()), [str(x) for x in position])
    axes.tick_params(axis="x", labelrotation=30 if len(at) > 6 else 0)
    axes.set_xlabel(key)
    axes.set_ylabel(name)
    axes.grid(alpha=0.3)
    if others:
        axes.legend(fontsize="small")
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:  # a suffix that names no format
        raise UserError(f"--plot={path}: {error}") from error


def is_logarithmic(values: set[float]) -> bool:
    """Returns whether values span a decade or more, too much for a linear axis."""
    return min(values) > 0 and max(values) >= 10 * min(values)


def _check_key(found: list[runs.Run], key: str) -> None:
    """Raises UserError for a --x that is in no run's config."""
    keys = dict.fromkeys(name for run in found for name in flatten(run.config))
    if key and key not in keys:
        near = closest(key, keys)
        raise UserError(
            f"--x={key}: the runs' config has no key {key!r}"
            + (f": did you mean {near!r}?" if near else "; configs/base.py has the keys")
        )


def _cell(value: Any, column: str) -> str:
    if value is None:
        return ABSENT
    if column.split("/")[-1] in METRICS:
        return f"{value:.1f}"
    return f"{value:g}" if isinstance(value, float) else str(value)


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = ArgumentParser(
        prog="python -m launch.report",
        description=__doc__,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="DIR", help="a run, a sweep, or a directory of them")
    parser.add_argument(
        "--metric",
        default="SumR",
        help=f"{', '.join(METRICS)}, v2t/METRIC or GROUP/METRIC (default: %(default)s)",
    )
    parser.add_argument(
        "--csv", type=pathlib.Path, metavar="FILE", help="also write the table here"
    )
    parser.add_argument(
        "--plot", type=pathlib.Path, metavar="FILE", help="plot --metric against --x: x.png, x.svg"
    )
    parser.add_argument(
        "--x",
        default="",
        metavar="KEY",
        help="a config key, such as optimizer.new (default: the only key in which the runs differ)",
    )
    options = parser.parse_args(argv)
    try:
        directory = files.path(options.directory)
        found = ordered(runs.find(directory), options.metric)
        _check_key(found, options.x)
        rows = table(found, directory, options.metric)
        print(as_text(rows))
        for run in found:
            if run.assumed:
                said = f"{run_name(run, directory)} is assumed to be {run.state}: {run.assumed}"
                print(f"note: {said}", file=sys.stderr)
        evaluations = {run_name(run, directory): run.evaluation for run in found}
        problems = [problem for run in found for problem in run.problems]
        for problem in problems + runs.incomparable(evaluations):
            print(f"warning: {problem}", file=sys.stderr)
        if options.csv:
            write_csv(rows, options.csv)
        if options.plot:
            plot(found, options.metric, options.x, options.plot)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"{error.filename or ''}: {error.strerror}") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
