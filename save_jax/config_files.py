"""Reads config files, and says what is wrong with them; the only reader of them."""

import pathlib
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from save_jax.config import SIZED
from save_jax.errors import UserError
from save_jax.messages import closest

# What absl's parsers of flags say of a value, and what it means.
NOT_PARSED = {
    "invalid literal for int()": "expected a whole number",
    "could not convert string to float": "expected a number",
    "('Non-boolean argument to boolean flag": "expected true or false",
}


def read(path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reads a config file.

    Args:
        path: FILE.py, or FILE.py:VARIANT.
        overrides: as on a command line, "--config.KEY=VALUE".

    Raises:
        UserError: the file, a key or a value is wrong.
    """
    values, argv = flags.FlagValues(), ["", f"--config={path}", *overrides]
    define_flag(values, argv)
    parse_flags(values, argv)
    return values.config.to_dict()


def define_flag(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Defines --config, a config file, and --config.KEY for the keys that `argv` overrides."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Experiment, with an optional variant after a colon: configs/msrvtt.py:7k; without it, the "
        "demo. --config.KEY=VALUE sets a key; configs/base.py has them all.",
        flag_values=values,
        sys_argv=list(argv),
    )


def parse_flags(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Parses a command line whose --config is defined by `define_flag`; returns what is no flag.

    Raises:
        UserError: the config file cannot be used, or a flag, a key or a value is wrong.
    """
    file = _config_argument(argv).partition(":")[0]
    if not pathlib.Path(file).is_file():
        raise UserError(
            f"--config={file}: expected a config file, found no such file in "
            f"{pathlib.Path.cwd()}. Give its path, such as configs/msrvtt.py or, with a variant, "
            "configs/msrvtt.py:7k"
        )
    # config_flags loads each file as one module of this name: what an earlier file of this process
    # defined would still be there, its get_config for one.
    sys.modules.pop("config_config", None)
    try:
        rest = values(argv)[1:]
        found = values.config
        getattr(found, "to_dict", None)  # raises what config_flags has put off, if anything
    except Exception as error:  # a config file is a program, and can raise anything
        raise UserError(_explain(error, argv)) from error
    if not isinstance(found, ConfigDict):
        raise UserError(
            f"{file}: expected get_config() to return an ml_collections.ConfigDict, found "
            f"{type(found).__name__}"
        )
    return rest


def _config_argument(argv: Sequence[str]) -> str:
    """Returns the value of a command line's --config: a file, and perhaps a variant."""
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = arg.partition("=")
        if name in ("--config", "-config"):
            return value if equals else following
    return ""


def _explain(error: Exception, argv: Sequence[str]) -> str:
    """Says what went wrong first: config_flags wraps it, traceback and all."""
    file, chain = _config_argument(argv).partition(":")[0], [error]
    while isinstance(cause := chain[-1].__cause__ or chain[-1].__context__, Exception):
        chain.append(cause)
    first = chain[-1]
    found = f"{type(first).__name__}: {first}"
    if isinstance(first, UserError):
        return str(first)
    if isinstance(first, SyntaxError):
        return f"{first.filename}, line {first.lineno}: expected Python, found {found}"
    for raised in reversed(chain):
        frames = traceback.extract_tb(raised.__traceback__)
        if lines := [frame.lineno for frame in frames if frame.filename == file]:
            return (
                f"{file}, line {lines[-1]}: {type(raised).__name__}: {raised}. Correct the file: "
                "expected a get_config() that returns an ml_collections.ConfigDict "
                "(configs/README.md)"
            )
    if isinstance(first, AttributeError) and "get_config" in found:
        return (
            f"{file}: expected a function get_config() that returns an ml_collections.ConfigDict, "
            "found none; configs/README.md shows one"
        )
    if isinstance(first, TypeError) and "get_config" in found:
        return f"{file}: its get_config takes other arguments than the variant given: {first}"
    for part, (variants, _) in SIZED.items():
        key = f"config.model.{part}"
        names = [arg.lstrip("-").partition("=")[0] for arg in argv]
        choices = (
            f"Choose a variant ({', '.join(variants)}) in a config that names one, or set sizes in "
            "a config file of your own, as configs/demo.py does"
        )
        inner = next((name for name in names if name.startswith(f"{key}.")), "")
        if inner and "string indices" in found:
            return f"--{inner}: {key} is a named variant here, which fixes all sizes. {choices}"
        if key in names and "as a ConfigDict" in str(error):
            return (
                f"--{key}: expected a dictionary of sizes, because this config has one. {choices}"
            )
    if isinstance(first, KeyError) and (unknown := _unknown_key(argv)):
        return unknown
    for said, meant in NOT_PARSED.items():
        if said in str(error):
            return str(error).partition(said)[0] + meant
    return found if isinstance(first, AttributeError) else str(error)


def _unknown_key(argv: Sequence[str]) -> str:
    """Says which key of a command line its config lacks, and which may be meant; "" for none."""
    leaves = jax.tree_util.tree_leaves_with_path(read(_config_argument(argv)))
    known = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    flags_of_keys = (re.match(r"--?(?:no)?config\.([^=]+)", arg) for arg in argv)
    lacking = (
        found[1]
        for found in flags_of_keys
        if found and not any(f"{name}.".startswith(f"{found[1]}.") for name in known)
    )
    key = next(lacking, "")
    if not key:
        return ""
    near = closest(key, known)
    return (
        f"unknown config key {key!r}{f': did you mean {near!r}?' if near else '.'} The keys are in "
        "configs/base.py and in the config file"
    )
