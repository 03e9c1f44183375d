"""Reading in a thread, ahead of who uses what is read."""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any

_LEAVING = 5.0  # seconds to wait for a thread that may hang in a read; it ends with the process


class ReadAhead:
    """Iterates over what another iterator yields, in its order, which a thread draws in advance.

    The thread begins with the first request. It ends with the items, with their exception, which is
    raised here in its turn, with `close`, or when nothing refers to this object any more.
    """

    def __init__(self, items: Iterator[Any], most: int):
        """Prepares the thread.

        Args:
            items: drawn, and closed if they are a generator, by the thread alone.
            most: items that are drawn, or being drawn, and not asked for yet.
        """
        self._state = _State(items, most)
        self._thread = threading.Thread(
            target=_draw, args=(self._state,), name="cache-read-ahead", daemon=True
        )
        self._ended = False

    def __iter__(self) -> "ReadAhead":
        return self

    def __next__(self) -> Any:
        if self._ended:
            raise StopIteration
        if self._thread.ident is None:
            self._thread.start()
        item, error = self._state.drawn.get()
        self._state.places.release()
        if error is not None:
            self.close()
            raise error
        return item

    def close(self) -> None:
        """Ends the thread, and waits until it has ended."""
        self._ended = True
        self._state.stop()
        if self._thread.ident is not None:
            self._thread.join(_LEAVING)

    def __del__(self) -> None:
        self._state.stop()


class _State:
    """What the thread shares with its user; it does not refer to the user, who may be forgotten."""

    def __init__(self, items: Iterator[Any], most: int):
        self.items = items
        self.places = threading.Semaphore(most)
        self.drawn: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self.stopped = False

    def stop(self) -> None:
        """Asks the thread to end."""
        self.stopped = True
        self.places.release()  # it may wait for one


def _draw(state: _State) -> None:
    try:
        while True:
            state.places.acquire()
            if state.stopped:
                return
            state.drawn.put((next(state.items), None))
    except BaseException as error:  # StopIteration among them
        state.drawn.put((None, error))
    finally:
        if isinstance(state.items, Generator):
            state.items.close()
