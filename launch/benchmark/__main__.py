"""Measures parts of this project against another way to do the same, in one run.

python -m launch.benchmark input [--clips=N] [--seconds=N] [...]
python -m launch.benchmark train [--config=FILE] [--batch=N] [...]
python -m launch.benchmark evaluate [--captions=N] [--videos=N] [...]
python -m launch.benchmark cache --data=DIR [--config=FILE] [--batch=N] [...]
python -m launch.benchmark storage [--rows=N] [--out=DIR] [...]

Each command prints a table and then one line of JSON with the same numbers.
"""

import argparse
import sys

from launch.benchmark import cache, evaluate, storage, train
from launch.benchmark import input as benchmark_input
from save_jax.arguments import ArgumentParser
from save_jax.errors import EXIT_CODES, exit_codes


@exit_codes
def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = ArgumentParser(
        prog="python -m launch.benchmark",
        description=__doc__,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add(commands, "input", benchmark_input)
    _add(commands, "train", train)
    _add(commands, "evaluate", evaluate)
    _add(commands, "cache", cache)
    _add(commands, "storage", storage)
    options = parser.parse_args(arguments)
    options.run(options)
    return 0


def _add(commands: argparse._SubParsersAction, name: str, module) -> None:
    """Adds a module as a command: its docstring is the help, `add_flags` and `run` the rest."""
    summary = module.__doc__.splitlines()[0]
    parser = commands.add_parser(
        name,
        help=summary,
        description=module.__doc__,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_flags(parser)
    parser.set_defaults(run=module.run)


if __name__ == "__main__":
    sys.exit(main())
