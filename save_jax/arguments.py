"""Command lines that argparse reads, whose mistakes are told like all others."""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from save_jax.errors import UserError
from save_jax.messages import did_you_mean


class ArgumentParser(argparse.ArgumentParser):
    """Raises UserError, in one line, where argparse prints its usage and exits.

    The line names the flag or the choice that is nearest to one that does not exist.
    """

    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses as argparse does, and keeps what was given for `error`."""
        self._given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises UserError with argparse's message, what may have been meant, and where to look."""
        flags, said = self._flags(), f"{message.rstrip('.')}."
        # A misspelt flag may only show as one that is required and absent. What has a dot is a key
        # of the config, which others read.
        names = [given.partition("=")[0] for given in self._given if given.startswith("--")]
        for name in dict.fromkeys(names):
            known = any(flag.startswith(name) for flag in flags)
            if not known and "." not in name and (hint := did_you_mean(name, flags)):
                said += hint if name in message else f" {name} is unknown.{hint}"
        wrong = re.search(r"invalid choice: '(.*?)' \((.*)\)$", message)
        if wrong:
            said += did_you_mean(wrong[1], re.findall(r"[\w.-]+", wrong[2]))
        raise UserError(f"{said} --help shows all flags")

    def _flags(self) -> list[str]:
        """Returns all flags, those of its commands included."""
        flags = list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    flags += command._flags()
        return flags
