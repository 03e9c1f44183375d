"""A thread that reads ahead: the same items in the same order, and an end in every case."""

import gc
import threading

import pytest

from save_jax.cache.read_ahead import ReadAhead

SOON = 20  # seconds that nothing here takes, even on a busy machine


def counting(upto, drawn=None, closed=None):
    """Numbers; notes each that is drawn, and the thread that closes it."""
    try:
        for number in range(upto):
            if drawn is not None:
                drawn.append(number)
            yield number
    finally:
        if closed is not None:
            closed.append(threading.current_thread())


def ended(ahead) -> bool:
    ahead._thread.join(SOON)
    return not ahead._thread.is_alive()


def test_the_order_is_that_of_the_items():
    ahead = ReadAhead(counting(500), 3)
    assert list(ahead) == list(range(500))
    assert ended(ahead) and list(ahead) == []


def test_an_item_is_there_before_it_is_asked_for():
    """While a step computes, here for ever, the next batch is read."""
    second = threading.Event()

    def items():
        yield 1
        second.set()
        yield 2

    ahead = ReadAhead(items(), 2)
    assert next(ahead) == 1
    assert second.wait(SOON)
    assert list(ahead) == [2]


def test_no_more_are_drawn_than_may_wait():
    drawn, third = [], threading.Event()

    def items():
        for number in counting(100, drawn):
            if number == 2:
                third.set()
            yield number

    ahead = ReadAhead(items(), 2)
    assert next(ahead) == 0
    assert third.wait(SOON)  # 1 and 2 wait now
    assert not threading.Event().wait(0.2) and drawn == [0, 1, 2]
    ahead.close()


def test_an_exception_comes_in_its_turn():
    def items():
        yield from counting(2)
        raise OSError("the disk")

    ahead = ReadAhead(items(), 8)
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(OSError, match="the disk"):
        next(ahead)
    assert ended(ahead) and list(ahead) == []


def test_the_thread_ends_when_it_is_closed():
    closed = []
    ahead = ReadAhead(counting(100, closed=closed), 2)
    assert next(ahead) == 0
    ahead.close()
    assert not ahead._thread.is_alive() and list(ahead) == []
    assert closed == [ahead._thread]  # a generator must not be closed by another thread
    ReadAhead(counting(1), 1).close()  # one that nobody asked for anything


def test_the_thread_ends_when_it_is_forgotten():
    closed = []
    ahead = ReadAhead(counting(100, closed=closed), 2)
    next(ahead)
    thread = ahead._thread
    del ahead
    gc.collect()
    thread.join(SOON)
    assert closed == [thread] and not thread.is_alive()
