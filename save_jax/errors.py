"""The one exception that means: the user can mend this, and the message says how."""


class UserError(Exception):
    """A mistake in what the user gave us: a path, a config value, a file's contents.

    The message names what was expected, what was found, where, and what to do. Entry points print
    it on stderr without a traceback and exit with code 2 (design.md, command-line contract).
    """


class NonFiniteLossError(Exception):
    """Training broke down: a loss or a gradient is not finite. Entry points exit with code 1."""
