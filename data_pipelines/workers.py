"""Work on many clips at a time, in processes, with the results in order."""

import collections
import concurrent.futures
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Items given out ahead of the one whose turn it is, per worker: a long clip must not leave the
# other workers idle, nor may finished clips pile up in memory behind it.
_AHEAD = 4


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    crashed: Callable[[Item], Result],
) -> Iterator[Result]:
    """Yields the result of each item, in the order of `items`.

    Args:
        work: what to do with an item; it and its results can be pickled.
        items: the items; they are taken as they are needed.
        workers: processes to do it in; 1 = this one.
        crashed: the result of an item that crashes its process (FFmpeg is C code, and files are
            odd); that item alone is lost.
    """
    if workers == 1:
        yield from map(work, items)
        return
    waiting = iter(items)
    under_way: collections.deque[tuple[Item, concurrent.futures.Future[Any]]]
    under_way = collections.deque()
    pool = _pool(workers)
    try:
        while True:
            for item in itertools.islice(waiting, _AHEAD * workers - len(under_way)):
                under_way.append((item, pool.submit(work, item)))
            if not under_way:
                return
            item, future = under_way.popleft()
            try:
                result = future.result()
            except BrokenProcessPool:
                # One of the items under way did it. The one whose turn it is gets a process of its
                # own, which tells; the others start again.
                result = _alone(work, item, crashed)
                pool.shutdown()
                pool = _pool(workers)
                under_way = collections.deque(
                    (item, pool.submit(work, item)) for item, _ in under_way
                )
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def _alone(work: Callable[[Item], Result], item: Item, crashed: Callable[[Item], Result]) -> Result:
    try:
        with _pool(1) as pool:
            return pool.submit(work, item).result()
    except BrokenProcessPool:
        return crashed(item)


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

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
