"""How long the device takes for a call, the same way for our operations and for their peers.

Both sides run over the same number of distinct input sets in turn, more than twice the L2 cache in all, so that a call
finds nothing of its own inputs in the cache. Rounds of one and of the other alternate, so that both see the same clocks
and temperature; the median of the rounds counts. Two ways of reading a round:

  kernels   CUPTI, which times each kernel from its start on the device to its end: the sum over the kernels of a call.
            Gaps between kernels and whatever the host does are outside, on both sides. Memory copies and fills that are
            not kernels are not seen. The default, since launching from Python takes longer than a small kernel.
  span      From the first kernel to the last of many passes that are queued without waiting; the passes of half as many
            are subtracted, which takes out what a round costs once. jax queues a program of one call for each input
            set; torch replays a CUDA graph of the same calls, which leaves shorter gaps: the side of the peer. It is
            how whole training steps of a layer are timed, and everything where CUPTI is missing. A call much shorter
            than 20 us measures the host on the jax side.
"""

import importlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import jax

ROTATION_BYTES = 110_000_000  # the L2 cache of an H100 or H200 has 50 MiB
MAX_SETS = 32
ROUNDS = 3
# A GPU at its power limit takes tenths of a second to find the clock of a load: a span must outlast the load before it.
ROUND_SECONDS = {'kernels': 0.02, 'span': 0.3}
MAX_PASSES = {'kernels': 200, 'span': 2000}

Method = Literal['kernels', 'span']
METHODS: tuple[Method, ...] = ('kernels', 'span')


def number_of_sets(input_bytes: int) -> int:
    """How many distinct input sets exceed twice the L2 cache."""
    return min(MAX_SETS, -(-ROTATION_BYTES // input_bytes))


class LostKernelsError(RuntimeError):
    """CUPTI did not see the same kernels in every pass."""


@runtime_checkable
class Work(Protocol):
    """Calls on the device, one for each input set."""

    calls: int

    def enqueue(self) -> Any:
        """Queues every call once, without waiting, and returns the list of their results."""

    def wait(self) -> None:
        """Waits for what was queued."""

    def span(self, passes: int) -> float:
        """Seconds for that many passes over the input sets."""
        ...


class JaxWork:
    """A function over input sets, as one program of one call after the other, which is compiled here."""

    def __init__(self, fn: Callable, sets: Sequence[tuple]):
        call = jax.jit(fn)  # traced and lowered once for all sets
        self._sets = list(sets)
        program = jax.jit(lambda sets: [call(*inputs) for inputs in sets]).lower(self._sets)
        # In a command buffer, which XLA makes of five calls or more, those that are independent may run together.
        self._program = program.compile({'xla_gpu_enable_command_buffer': ''})
        self._results: Any = None
        self.calls = len(self._sets)

    def enqueue(self) -> Any:
        self._results = self._program(self._sets)
        return self._results

    def wait(self) -> None:
        jax.block_until_ready(self._results)
        self._results = None

    def run_once(self) -> Any:
        """The results of every call, of which nothing is kept here."""
        results = self.enqueue()
        self.wait()
        return results

    def compiled_text(self) -> str:
        """The program as XLA compiled it: HLO, in the order in which it runs."""
        text = self._program.as_text()
        assert text is not None
        return text

    def span(self, passes: int) -> float:
        start = time.perf_counter()
        for _ in range(passes):
            self.enqueue()
        self.wait()
        return time.perf_counter() - start


class TorchWork:
    """Calls of torch on tensors that are bound already."""

    def __init__(self, torch: Any, calls: Sequence[Callable[[], Any]]):
        self._torch = torch
        self._calls = list(calls)
        self._graph: Any = None
        self.calls = len(self._calls)

    def enqueue(self) -> Any:
        return [call() for call in self._calls]

    def wait(self) -> None:
        self._torch.cuda.synchronize()

    def span(self, passes: int) -> float:
        cuda = self._torch.cuda
        if self._graph is None:
            self._graph = cuda.CUDAGraph()
            with cuda.graph(self._graph):
                self._outputs = [call() for call in self._calls]
            self._graph.replay()
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        start.record()
        for _ in range(passes):
            self._graph.replay()
        end.record()
        cuda.synchronize()
        return 1e-3 * start.elapsed_time(end)


class Clock:
    """Takes times with one method; `detect` finds out which one this machine allows."""

    def __init__(self, method: Method, cupti: Any = None):
        self.method: Method = method
        self._cupti = cupti

    @classmethod
    def detect(cls, method: Method | None = None) -> 'Clock':
        """A clock of that method; None takes kernels if CUPTI delivers, else spans.

        Raises:
          RuntimeError: kernels were asked for and CUPTI does not deliver.
        """
        if method == 'span':
            return cls('span')
        try:
            clock = cls('kernels', importlib.import_module('jax._src.lib.mosaic_gpu')._mosaic_gpu_ext)
            work = JaxWork(lambda x: x * 2, [(jax.numpy.arange(1024.0),)])
            work.enqueue()
            work.wait()
            clock._kernel_seconds(work, passes=10)
        except Exception as error:  # a missing library, permission or another subscriber, each with its own error
            if method == 'kernels':
                raise RuntimeError(f'CUPTI does not serve: {error}') from error
            reason = str(error).partition('\n')[0]
            print(f'CUPTI does not serve ({reason}): times are spans', file=sys.stderr, flush=True)
            return cls('span')
        return clock

    def microseconds(self, works: Sequence[Work], method: Method | None = None) -> tuple[list[float], Method]:
        """Median time of one call of each work, over rounds that alternate between them, and how it was taken.

        `method` is the clock's if None. Kernels that CUPTI lost make it the span, for all of the works.
        """
        method = method or self.method
        passes = []
        for work in works:
            for _ in range(2):  # what is done for a first call, then a warm one
                work.enqueue()
                work.wait()
            wanted = round(ROUND_SECONDS[method] / (work.span(3) / 3))
            passes.append(min(MAX_PASSES[method], max(10, wanted)))
        rounds: list[list[float]] = [[] for _ in works]
        for _ in range(ROUNDS):
            for work, count, seconds in zip(works, passes, rounds, strict=True):
                try:
                    one_pass = self._kernel_seconds(work, count) if method == 'kernels' else _span_seconds(work, count)
                except LostKernelsError:
                    return self.microseconds(works, 'span')
                seconds.append(one_pass / work.calls)
        return [1e6 * statistics.median(seconds) for seconds in rounds], method

    def kernels(self, work: Work, passes: int) -> list[tuple[str, float]]:
        """Name and seconds of every kernel of that many passes, in the order of their launch; for a clock of kernels."""
        self._cupti._cupti_init()
        try:
            for _ in range(passes):
                work.enqueue()
            work.wait()
        finally:
            timings = self._cupti._cupti_get_timings(True)
        return [(name, 1e-3 * milliseconds) for name, milliseconds in timings]

    def _kernel_seconds(self, work: Work, passes: int) -> float:
        return seconds_of_a_pass([seconds for _, seconds in self.kernels(work, passes)], passes)


def seconds_of_a_pass(kernel_seconds: Sequence[float], passes: int) -> float:
    """Median over the passes of the sum of their kernels.

    Raises:
      LostKernelsError: there are no kernels, or not the same number in every pass.
    """
    number = len(kernel_seconds)
    if number == 0 or number % passes:
        raise LostKernelsError(f'CUPTI saw {number} kernels in {passes} passes')
    size = number // passes
    return statistics.median(sum(kernel_seconds[i : i + size]) for i in range(0, number, size))


def _span_seconds(work: Work, passes: int) -> float:
    short = work.span(passes)  # first, and so the warm-up of the other
    return (work.span(2 * passes) - short) / passes
