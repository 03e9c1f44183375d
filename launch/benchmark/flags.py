"""What the benchmarks of a training step share: their flags, and the config that these choose."""

import argparse
from collections.abc import Sequence
from typing import Any

from launch.sweep import points
from save_jax.errors import UserError


def add_step_flags(parser: argparse.ArgumentParser, steps: int) -> None:
    """Adds the flags of every benchmark of a step.

    Args:
        parser: of the command.
        steps: the default of --steps.
    """
    parser.add_argument(
        "--config",
        default="configs/msrvtt.py",
        metavar="FILE",
        help="a config file (default: %(default)s)",
    )
    for flag, default, meaning in (
        ("--batch", 0, "clips per step (default: batch_size of the config)"),
        ("--steps", steps, "steps per turn (default: %(default)s)"),
        ("--turns", 3, "turns of each way (default: %(default)s)"),
    ):
        parser.add_argument(flag, type=int, default=default, metavar="N", help=meaning)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a config key; may be repeated",
    )


def config_of(options: argparse.Namespace, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the config that the flags choose.

    Args:
        options: the flags of `add_step_flags`.
        overrides: flags of the config that the benchmark needs, after those of --set.

    Raises:
        UserError: a flag or the config is wrong.
    """
    if options.steps < 1 or options.turns < 1 or options.batch < 0:
        raise UserError(
            f"--steps={options.steps} --turns={options.turns} --batch={options.batch}: expected "
            "--steps and --turns of at least 1, and --batch of at least 0"
        )
    batch = [f"--config.batch_size={options.batch}"] if options.batch else []
    chosen = [f"--config.{setting}" for setting in options.set]
    return points.resolve(options.config, [*chosen, *overrides, *batch])
