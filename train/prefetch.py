"""Items made ahead of their use, in a thread."""

import collections
import concurrent.futures
import time
from collections.abc import Generator, Iterator

DEPTH = 2
"""Batches ready or in the making while the device is at work: one covers a slow batch, a second a slow moment."""

_END = object()


def prefetch[Item](items: Iterator[Item], depth: int = DEPTH) -> Generator[tuple[Item, float]]:
    """The items in order, each with the seconds that its user waited for it.

    One thread takes them from `items`, up to `depth` ahead, so what an item holds is counted in the item itself: the
    iterator is always further. What `items` raises is raised here, after the items before it. Closing ends the thread.
    """
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='prefetch') as thread:
        ready = collections.deque(thread.submit(next, items, _END) for _ in range(depth))
        try:
            while True:
                began = time.monotonic()
                item = ready.popleft().result()
                if item is _END:
                    return
                ready.append(thread.submit(next, items, _END))
                yield item, time.monotonic() - began  # pyright: ignore[reportReturnType]
        finally:
            for future in ready:
                future.cancel()
