"""Flags that commands share, and how a config is read from a command line.

Flags live in an object of their own, made when a command runs: importing a module defines none, so
that `save_jax.main.run` can be called from a notebook or another launcher.
"""

import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags

import configs
from save_jax import config_files, distributed, files
from save_jax.errors import EXIT_CODES, UserError

DEMO = str(pathlib.Path(configs.__file__).parent / "demo.py")


class CommandLine(NamedTuple):
    """What a command line says.

    Attributes:
        config: all of the config's values.
        explicit: the config's keys that the command line sets itself.
        flags: the other flags, as attributes.
    """

    config: dict[str, Any]
    explicit: tuple[str, ...]
    flags: flags.FlagValues


def parse(
    argv: Sequence[str],
    description: str,
    define: Callable[[flags.FlagValues], None] = lambda values: None,
) -> CommandLine:
    """Reads a command line with --config, its overrides, and the flags of several processes.

    Args:
        argv: the program's name and its arguments.
        description: what --help shows above the flags.
        define: defines a command's own flags.

    Raises:
        UserError: whatever is wrong with it.
        SystemExit: --help was asked for, and is printed.
    """
    # config_flags wants --config before what it overrides. The default cannot be the flag's own:
    # it would be read, overrides and all, before a mistake in them can be reported.
    chosen = [arg for arg in argv[1:] if arg.startswith(("--config=", "-config="))]
    rest = [arg for arg in argv[1:] if arg not in chosen]
    if not chosen and "--config" not in rest and "-config" not in rest:
        chosen = [f"--config={DEMO}"]
    ordered = [argv[0], *chosen, *rest]
    values = flags.FlagValues()
    config_files.define_flag(values, ordered)
    define(values)
    _define_processes(values)
    if any(arg.lstrip("-") in ("help", "h", "helpfull", "helpshort") for arg in rest):
        print(f"{description.strip()}\n\n{values.get_help()}\n\n{EXIT_CODES}")
        sys.exit(0)
    stray = config_files.parse_flags(values, ordered)
    if stray:
        raise UserError(f"unexpected arguments: {' '.join(stray)}")
    explicit = tuple(config_flags.get_override_values(values["config"]))
    return CommandLine(values.config.to_dict(), explicit, values)


def define_run(values: flags.FlagValues) -> None:
    """Defines the flags of `save_jax.main` alone."""
    flags.DEFINE_string(
        "workdir", None, "Where checkpoints, metrics and tables go.", flag_values=values
    )
    define_trust_archive(values)


def workdir(values: flags.FlagValues) -> files.Path:
    """Returns the directory that --workdir names.

    Raises:
        UserError: it names none, or one that cannot be reached.
    """
    if not values.workdir:
        raise UserError("--workdir=DIR is required: where checkpoints, metrics and tables go")
    return files.path(values.workdir)


def define_trust_archive(values: flags.FlagValues) -> None:
    """Defines the flag of commands that read weights."""
    flags.DEFINE_bool(
        "trust_archive",
        False,
        "Read a TorchScript archive whose SHA-256 is not one of OpenAI's.",
        flag_values=values,
    )


def _define_processes(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of process 0 of several, where no cluster manager sets it.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "num_processes", None, "How many processes, with --coordinator.", flag_values=values
    )
    flags.DEFINE_integer(
        "process_id", None, "Which process this is, from 0, with --coordinator.", flag_values=values
    )
    flags.DEFINE_bool(
        "distributed",
        False,
        "Join other processes even where no cluster manager is recognised.",
        flag_values=values,
    )


def join_processes(values: flags.FlagValues) -> None:
    """Joins the other processes of this run that the flags or the environment tell of.

    Raises:
        UserError: see `distributed.join`.
    """
    distributed.join(
        values.coordinator, values.num_processes, values.process_id, values.distributed
    )
