"""The exceptions whose messages say all that a user needs, and their exit codes."""

import difflib
import errno
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import ParamSpec

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

# What the system says of a path rather than of itself. Permission is among it: one file that this
# account may not read, among ten thousand, is like one that is damaged.
_OF_THE_PATH = frozenset(
    {
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.EILSEQ,
        errno.EINVAL,
        errno.EEXIST,
        errno.ENOTEMPTY,
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
    }
)
ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
# Whose exceptions say that a store or the network fails, whatever they derive from.
_NETWORK = (
    "adlfs.",
    "aiohttp.",
    "azure.",
    "botocore.",
    "fsspec.",
    "gcsfs.",
    "google.api_core.",
    "google.auth.",
    "google.cloud.",
    "http.",
    "requests.",
    "s3fs.",
    "ssl.",
    "urllib.",
    "urllib3.",
)

Arguments = ParamSpec("Arguments")

EXIT_CODES = (
    "exit codes: 0 done; 2 a mistake in what you gave; 75 interrupted, or a machine's outage: run "
    "the same command again; 1 a fault of the program, or training that broke down"
)


class UserError(Exception):
    """A mistake in what the user gave us: a path, a config value, a file's contents.

    The message names what was expected, what was found, where, and what to do. Entry points print
    it on stderr without a traceback and exit with code 2.
    """


class OutageError(Exception):
    """The machine, its network or a store failed, and no data is at fault: the run can be resumed.

    The message names what failed, what the system said, and what to do. Entry points print it on
    stderr without a traceback and exit with code 75: the same command resumes.
    """


class NonFiniteLossError(Exception):
    """Training broke down: a loss or a gradient is not finite. Entry points exit with code 1."""


def is_outage(error: BaseException) -> bool:
    """Whether an exception is the fault of the machine, its network or a store, not of a file."""
    if isinstance(error, OutageError | MemoryError):
        return True
    if isinstance(error, ABSENT):
        return False
    if f"{type(error).__module__}.".startswith(_NETWORK):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in _OF_THE_PATH
    return isinstance(error, TimeoutError | ConnectionError)


def closest(word: str, known: Iterable[str]) -> str:
    """Returns the known word that a mistyped one most likely means, in any case; "" for none."""
    lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), lower, 1)
    return lower[found[0]] if found else ""


def exit_codes(command: Callable[Arguments, int]) -> Callable[Arguments, int]:
    """Decorates an entry point: what it raises becomes one message on stderr and an exit code.

    2: a mistake of the user's. 1: training broke down. 75: interrupted, by a person or an outage,
    and resumable. Any other exception is ours, and passes with its traceback.
    """

    @functools.wraps(command)
    def run(*arguments: Arguments.args, **options: Arguments.kwargs) -> int:
        if signal.getsignal(signal.SIGINT) is _end_at_start:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return command(*arguments, **options)
        except UserError as error:
            return _end("error", error, 2)
        except NonFiniteLossError as error:
            return _end("error", error, 1)
        except OutageError as error:
            return _end("interrupted", error, os.EX_TEMPFAIL)
        except KeyboardInterrupt:
            message = "what was done is kept, and the same command resumes"
            return _end("interrupted", message, os.EX_TEMPFAIL)

    return run


def interruptible_start() -> None:
    """Makes Ctrl-C end this process with one message and code 75 until its command begins.

    For the seconds in which a command imports its packages: a KeyboardInterrupt there would print a
    traceback, and an import in native code may even swallow it. `exit_codes` takes over afterwards.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, _end_at_start)


def _end_at_start(number: int, frame: FrameType | None) -> None:
    message = "nothing was begun; run the same command again"
    os._exit(_end("interrupted", message, os.EX_TEMPFAIL))


def _end(kind: str, message: object, code: int) -> int:
    print(f"{kind}: {message}", file=sys.stderr, flush=True)
    return code
