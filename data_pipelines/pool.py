"""Work on many clips at a time, in processes, with the results in order."""

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

# Items given out ahead of the one whose turn it is, per worker: a long clip must not leave the
# other workers idle, nor may finished clips pile up in memory behind it.
_AHEAD = 4
# Seconds before an item that met with an outage is tried again: many pass in a moment.
_PAUSES = (0.5, 1.5)
# How a process ends when C code is at fault. Whatever else ends one comes from outside.
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

    An item that meets with an outage is tried again twice within two seconds.

    Args:
        work: what to do with an item; it and its results can be pickled.
        items: the items; they are taken as they are needed.
        workers: processes to do it in; 1 = this one.
        crashed: the result of an item that crashes its process (FFmpeg is C code, and files are
            odd); that item alone is lost.
        name: what an item is called in a message.

    Raises:
        OutageError: `work` raised it; or an item's process was killed, as it is when memory is
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
        except BrokenProcessPool as error:  # known already, while results of before are used
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
                # One of the items under way did it. The one whose turn it is gets a process of its
                # own, which tells; the others start again.
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
    # 1 is Python's own, for what goes wrong outside the work: a module that cannot be read.
    if exit_code is None or exit_code == 1:
        raise outages.in_words(name(item), "a process to read it in cannot be had")
    if exit_code < 0 and -exit_code not in _CRASHES:
        raise outages.in_words(
            name(item),
            "the process that read it was ended from outside, as happens when memory is short "
            f"({signal.strsignal(-exit_code)})",
        )
    return crashed(item)


def _patiently(work: Callable[[Item], Result], item: Item) -> Result:
    for pause in _PAUSES:
        try:
            return work(item)
        except OutageError:
            time.sleep(pause)
    return work(item)


def _pool(workers: int) -> concurrent.futures.ProcessPoolExecutor:
    # Spawned, not forked: the parent may have threads (JAX's), which do not survive a fork.
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent
    )
    # A terminal sends Ctrl-C to all processes: what is to be done about it is for the parent alone
    # to say. Processes inherit which signals are blocked when they start, which is when work is
    # given out. (SIGTERM is what the pool itself ends them with, when one of them has crashed.)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        for _ in range(workers):
            pool.submit(os.getpid)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return pool


def _end_with_parent() -> None:
    """Ends this process when its parent has ended, however it did; else it would wait for ever."""

    parent = multiprocessing.parent_process()
    assert parent is not None  # only processes of the pool call this

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
