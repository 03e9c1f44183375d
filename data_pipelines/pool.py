"""Processes many clips at a time, in worker processes, with the results in order."""

import collections
import concurrent.futures
import functools
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from data_pipelines import outages
from save_jax.errors import OutageError

Item = TypeVar("Item")
Result = TypeVar("Result")

# Items submitted ahead of the next result, per worker: a long clip must not leave the other workers
# idle, nor may finished clips pile up in memory behind it.
_AHEAD = 4
# Seconds before an item is retried after an outage: many outages are brief.
_PAUSES = (0.5, 1.5)
# The signals that end a process when C code is at fault. Others come from outside.
_CRASHES = frozenset(
    (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV, signal.SIGSYS)
)


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    crashed: Callable[[Item], Result],
    name: Callable[[Item], str],
) -> Generator[Result]:
    """Yields the result of each item, in the order of `items`.

    An item that fails through an outage is retried twice within two seconds.

    Args:
        work: the function to apply to each item; it and its results can be pickled.
        items: the items, consumed as they are needed.
        workers: number of processes; 1 = this one.
        crashed: returns the result of an item that crashes its process (FFmpeg is C code, and files
            are odd); only that item is lost.
        name: returns the name of an item for a message.

    Raises:
        OutageError: `work` raised it, or an item's process was killed, as happens when memory is
            short.
    """
    work = functools.partial(_patiently, work)
    if workers == 1:
        yield from map(work, items)
        return
    waiting = iter(items)
    under_way: collections.deque[tuple[Item, concurrent.futures.Future[Any]]]
    under_way = collections.deque()
    pool = _pool(workers)

    def submit(item: Item) -> concurrent.futures.Future[Any]:
        try:
            return pool.submit(work, item)
        except BrokenProcessPool as error:  # it broke while earlier results were consumed
            future: concurrent.futures.Future[Any] = concurrent.futures.Future()
            future.set_exception(error)
            return future

    try:
        while True:
            for item in itertools.islice(waiting, _AHEAD * workers - len(under_way)):
                under_way.append((item, submit(item)))
            if not under_way:
                return
            item, future = under_way.popleft()
            try:
                result = future.result()
            except BrokenProcessPool:
                # One of the submitted items crashed it. The next one runs in a separate process, to
                # see whether it was that one; the others are submitted again.
                result = _alone(work, item, crashed, name)
                pool.shutdown()
                pool = _pool(workers)
                under_way = collections.deque((item, submit(item)) for item, _ in under_way)
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def _alone(
    work: Callable[[Item], Result],
    item: Item,
    crashed: Callable[[Item], Result],
    name: Callable[[Item], str],
) -> Result:
    """Runs one item in a separate process; returns its result, or that of a crash."""
    process = None
    with _pool(1) as pool:
        try:
            number = pool.submit(os.getpid).result()
            children = {child.pid: child for child in multiprocessing.active_children()}
            process = children.get(number)
            return pool.submit(work, item).result()
        except BrokenProcessPool:
            pass
    exit_code = None if process is None else process.exitcode
    # Python itself exits with 1 when something outside the work fails, such as an import.
    if exit_code is None or exit_code == 1:
        raise outages.in_words(name(item), "no process could be started to read it")
    if exit_code < 0 and -exit_code not in _CRASHES:
        raise outages.in_words(
            name(item),
            "the process that read it was killed from outside, as happens when memory is short "
            f"({signal.strsignal(-exit_code)})",
        )
    return crashed(item)


def _patiently(work: Callable[[Item], Result], item: Item) -> Result:
    """Applies `work` to an item, and again after each pause while there is an outage."""
    for pause in _PAUSES:
        try:
            return work(item)
        except OutageError:
            time.sleep(pause)
    return work(item)


def _pool(workers: int) -> concurrent.futures.ProcessPoolExecutor:
    """Starts a pool of processes that ignore Ctrl-C and end with this one."""
    # Spawned, not forked: the parent may have threads (JAX's), which do not survive a fork.
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent
    )
    # A terminal sends Ctrl-C to all processes, but only the parent is to react. Processes inherit
    # the blocked signals when they start, which is when work is submitted. (SIGTERM is not blocked:
    # the pool itself ends its processes with it when one of them has crashed.)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        for _ in range(workers):
            pool.submit(os.getpid)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return pool


def _end_with_parent() -> None:
    """Ends this process when its parent has ended in any way; otherwise it would wait forever."""

    parent = multiprocessing.parent_process()
    assert parent is not None  # only processes of the pool call this

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
