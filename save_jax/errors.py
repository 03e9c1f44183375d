"""The exceptions whose messages say all that a user needs, and their exit codes."""

import contextlib
import errno
import functools
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from types import FrameType
from typing import ParamSpec, TypeGuard

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
# What the system says of a path that this account may not use so, or that is no directory.
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR})
# What the system says of a program that misuses it: a fault of ours, whose traceback is wanted.
_OF_THE_PROGRAM = frozenset({errno.EBADF, errno.EFAULT, errno.ECHILD, errno.ESRCH, errno.ENOTTY})
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

_HEEDED_WITHIN = 5.0  # seconds in which a signal raises KeyboardInterrupt, or ends the process
_interrupted: list[int] = []  # the exit code of a command that was
_heeded: list[int] = []  # signals that have; no Event, which a handler could find locked

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
    """Says whether an exception is the fault of the machine, network or store, not of a file."""
    if isinstance(error, OutageError | MemoryError):
        return True
    if isinstance(error, ABSENT):
        return False
    if f"{type(error).__module__}.".startswith(_NETWORK):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in _OF_THE_PATH
    return isinstance(error, TimeoutError | ConnectionError)


def exit_codes(command: Callable[Arguments, int]) -> Callable[Arguments, int]:
    """Decorates an entry point: what it raises becomes one message on stderr and an exit code.

    2: a mistake of the user's, or a full disk. 1: training broke down. 75: interrupted, by Ctrl-C,
    SIGTERM or an outage, and resumable. 141, without a message: nobody reads the output any more,
    as in `| head`; it is what a shell reports of other programs then (128 + SIGPIPE). Any other
    exception is ours, and passes with its traceback.
    """

    @functools.wraps(command)
    def run(*arguments: Arguments.args, **options: Arguments.kwargs) -> int:
        try:
            with _interruptible():
                code = command(*arguments, **options)
                if sys.stdout is not None:
                    sys.stdout.flush()  # at the exit, it would be too late to handle what it raises
                return code
        except (Exception, KeyboardInterrupt) as error:
            code = report(error)
            if code is None:
                raise
            if isinstance(error, KeyboardInterrupt):
                _interrupted.append(code)
            return code
        finally:
            _silence_unread()

    return run


def leave_if_interrupted() -> None:
    """Ends a program that was interrupted at once, as the last thing that is done at its exit.

    Else a thread that still compiles in native code would be waited for, for minutes, or end the
    program with SIGSEGV while Python takes itself down.
    """
    if _interrupted:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, or not read
                stream.flush()
        os._exit(_interrupted[0])


def report(error: BaseException) -> int | None:
    """Prints what an exception that ends a command means, and returns the exit code.

    Returns:
        The code, see `exit_codes`; None, and nothing is printed, for a fault of ours, whose
        traceback is wanted.
    """
    if isinstance(error, UserError):
        return _end("error", error, 2)
    if isinstance(error, NonFiniteLossError):
        return _end("error", error, 1)
    if isinstance(error, OutageError):
        return _end("interrupted", error, os.EX_TEMPFAIL)
    if isinstance(error, KeyboardInterrupt):
        message = "what was done is kept, and the same command resumes"
        return _end("interrupted", message, os.EX_TEMPFAIL)
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE if _silence_unread() else None
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        message = f"{error}. Make room there, and run the same command again to resume."
        return _end("error", message, 2)
    if _is_refused(error):
        message = (
            f"{error.filename}: {error.strerror}. Choose another path, or let this account use it."
        )
        return _end("error", message, 2)
    ours = isinstance(error, OSError) and error.errno in _OF_THE_PROGRAM
    if ours or not is_outage(error) or isinstance(error, MemoryError):
        return None
    message = (
        f"{error}. That is the fault of this machine, its network or a store: when it works "
        "again, run the same command again to resume."
    )
    return _end("interrupted", message, os.EX_TEMPFAIL)


def _is_refused(error: BaseException) -> TypeGuard[OSError]:
    """Says whether a path that the user gave cannot be used so, and no fault of ours is behind."""
    if not isinstance(error, OSError) or not error.filename:
        return False
    # Where a directory is to be made, a file lies; else it is our own mistake.
    file = error.errno == errno.EEXIST and os.path.isfile(error.filename)
    return file or error.errno in _REFUSED


@contextlib.contextmanager
def _interruptible() -> Generator[None, None, None]:
    """Makes Ctrl-C and SIGTERM raise KeyboardInterrupt, unless the caller has handlers for them."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.getsignal(number) for number in usual}
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        before = {}
    ours = [n for n, handler in before.items() if handler in (_end_at_start, usual[n])]
    for number in ours:
        signal.signal(number, _interrupt)
    try:
        with _watched() if ours else contextlib.nullcontext():
            yield
    finally:
        for number in ours:
            signal.signal(number, usual[number])


@contextlib.contextmanager
def _watched() -> Generator[None, None, None]:
    """Ends the process with code 75 where a signal comes while its main thread cannot heed it.

    Python's handlers run in the main thread, between its instructions: not while that joins other
    processes, compiles, or reads a checkpoint, for minutes, in native code. A scheduler would kill
    the process before.
    """

    def watch() -> None:
        while number := os.read(reader, 1)[0]:
            until = time.monotonic() + _HEEDED_WITHIN
            while not _heeded and time.monotonic() < until:
                time.sleep(0.05)
            if not _heeded and signal.getsignal(number) is _interrupt:
                message = "what was done is kept, and the same command resumes"
                os._exit(_end("interrupted", message, os.EX_TEMPFAIL))

    _heeded.clear()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, name="signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        _heeded.append(0)  # what has come too late
        os.write(writer, b"\0")  # children that were forked may have the pipe, too: it has no end
        watcher.join()
        os.close(reader)
        os.close(writer)


def _forget_watcher() -> None:
    with contextlib.suppress(ValueError):  # it is not in the main thread
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_watcher)  # a child's signals are not its parent's


def _interrupt(number: int, frame: FrameType | None) -> None:
    if frame is not None and frame.f_code.co_name == "_xla_gc_callback":  # where JAX loses it
        threading.Timer(0.1, signal.raise_signal, [number]).start()
        return
    _heeded.append(number)
    raise KeyboardInterrupt


def _silence_unread() -> bool:
    """Says whether stdout or stderr is a pipe that nobody reads, and lets it lead nowhere."""
    silenced = False
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # it is no file, or closed
            poll, number = select.poll(), stream.fileno()
            poll.register(number, 0)
            if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)  # or Python would report what is left to write
                os.close(nowhere)
                silenced = True
    return silenced


def interruptible_start() -> None:
    """Makes Ctrl-C and SIGTERM end this process with code 75 until its command begins.

    For the seconds in which a command imports its packages: a KeyboardInterrupt there would print a
    traceback, and an import in native code may even swallow it. `exit_codes` takes over afterwards.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, _end_at_start)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _end_at_start)


def _end_at_start(number: int, frame: FrameType | None) -> None:
    message = "nothing was begun; run the same command again"
    os._exit(_end("interrupted", message, os.EX_TEMPFAIL))


def _end(kind: str, message: object, code: int) -> int:
    with contextlib.suppress(BrokenPipeError):  # the code says as much to whoever reads only that
        print(f"{kind}: {message}", file=sys.stderr, flush=True)
    return code
