"""Signals that ask a run to end: SIGTERM, which schedulers send before they take a machine away, and SIGINT of a terminal."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Whether a signal has asked the run to end.

    Attributes:
      received: the signal, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within, the first signal is remembered, and a second one acts as it would have without this. Main thread only."""
        before = {number: signal.getsignal(number) for number in SIGNALS}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def remember(number: int, frame: FrameType | None) -> None:
            restore()
            self.received = signal.Signals(number)
            print(f'{self.received.name}: saving after this step; once more ends at once', file=sys.stderr, flush=True)

        for number in SIGNALS:
            signal.signal(number, remember)
        try:
            yield
        finally:
            restore()
