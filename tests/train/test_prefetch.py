import contextlib
import itertools
import threading
import time

import pytest

from train.prefetch import prefetch


def wait_for(condition) -> bool:
    """Whether the condition comes true within seconds."""
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


class Counting:
    """0, 1, 2, ..., and how many of them were taken."""

    def __init__(self):
        self.taken = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.taken += 1
        return self.taken - 1


def test_items_come_in_order_to_the_last():
    assert [item for item, _ in prefetch(iter(range(100)), 3)] == list(range(100))
    assert list(prefetch(iter([]))) == []


def test_items_are_made_ahead_and_no_further():
    items = Counting()
    with contextlib.closing(prefetch(items, 2)) as ahead:
        for used in range(1, 6):
            assert next(ahead)[0] == used - 1
            assert wait_for(lambda used=used: items.taken == used + 2)
        time.sleep(0.05)
        assert items.taken == 5 + 2


def test_items_are_made_in_another_thread_that_ends_with_the_user():
    threads = set()

    def items():
        for number in itertools.count():
            threads.add(threading.current_thread())
            yield number

    with contextlib.closing(prefetch(items())) as ahead:
        assert next(ahead)[0] == 0
        assert next(ahead)[0] == 1
    (thread,) = threads
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


def test_error_comes_after_the_items_before_it():
    class Gone(BaseException):
        pass

    def items():
        yield from range(4)
        raise Gone

    ahead = prefetch(items())
    assert [next(ahead)[0] for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(Gone):
        next(ahead)


def test_time_waited_is_the_user_s():
    def slow():
        for number in range(6):
            time.sleep(0.1)
            yield number

    waits = []
    for number, waited in prefetch(slow()):
        waits.append(waited)
        if number == 2:
            time.sleep(0.5)  # two more are ready after this
    assert all(0.05 < waits[number] < 0.5 for number in (0, 1, 2)), waits
    assert all(waits[number] < 0.05 for number in (3, 4)), waits
