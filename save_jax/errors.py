"""The exceptions whose messages say all that a user needs, and their exit codes."""


class UserError(Exception):
    """A mistake in what the user gave us: a path, a config value, a file's contents.

    The message names what was expected, what was found, where, and what to do. Entry points print
    it on stderr without a traceback and exit with code 2 (design.md, command-line contract).
    """


class OutageError(Exception):
    """The machine, its network or a store failed, and no data is at fault: the run can be resumed.

    The message names what failed, what the system said, and what to do. Entry points print it on
    stderr without a traceback and exit with code 75: the same command goes on from there.
    """


class NonFiniteLossError(Exception):
    """Training broke down: a loss or a gradient is not finite. Entry points exit with code 1."""
