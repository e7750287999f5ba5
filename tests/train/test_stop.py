import os
import signal
import time

import pytest

from train.stop import StopSignals


class EndedError(Exception):
    """What the test's own handler does with a signal."""


@pytest.fixture
def handler():
    """Puts a handler in the place of the default one for SIGTERM."""

    def end(number, frame):
        raise EndedError

    before = signal.signal(signal.SIGTERM, end)
    yield end
    signal.signal(signal.SIGTERM, before)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


def test_first_signal_is_remembered_and_the_second_acts(handler, capsys):
    stop = StopSignals()
    with stop.listening():
        assert stop.received is None
        send(signal.SIGTERM)
        assert stop.received is signal.SIGTERM
        assert 'SIGTERM: saving after this step' in capsys.readouterr().err
        with pytest.raises(EndedError):
            send(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is handler


def test_handlers_are_put_back_without_a_signal(handler):
    with StopSignals().listening():
        assert signal.getsignal(signal.SIGTERM) is not handler
    assert signal.getsignal(signal.SIGTERM) is handler
    with pytest.raises(EndedError):
        send(signal.SIGTERM)
