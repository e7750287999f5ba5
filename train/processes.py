"""Processes that train together under `jax.distributed`: how they start, what one of them does for all, and how they end.

All run the same program on their own devices, and everything that they exchange within a step is in it. Beside it they agree on
what starts (`check_same`), on who is first (`main_first`), and add up what each counted (`Sums`). The first process is the
main one: it alone writes lines and files, but for checkpoints, which all write.

What only one process finds wrong, the others would wait for: such a process ends at once (`ending_alone`), and JAX ends the
others when its heartbeats stay away.
"""

import contextlib
import hashlib
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from train.errors import TrainingError

HEARTBEAT_SECONDS = 10
"""After so long without a sign, a process counts as lost and the others end."""

START_SECONDS = 300
LAST_WORDS_SECONDS = 3
"""So long the main process outlives what ends it: JAX ends the others, whatever they are about to say, when it is gone."""

LOST = 75
"""The exit code of a process that ends because another one did: what was saved is whole, and the same command goes on from it."""

_SIGNS_OF_LOSS = re.compile('gloo|nccl|connection|unavailable|heartbeat|barrier|coordination', re.IGNORECASE)
"""What JAX's errors say where another process does not answer; their type is that of all errors."""

FAILED = 70
"""The exit code of one of several processes that ends because of something unforeseen, with a traceback."""


def start(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins the other processes, if there are any: those of the arguments, or of a step of SLURM with more than one task.

    To be called before JAX is used. A process alone is left as it is.

    Args:
      coordinator: address and port of process 0.
      processes: how many there are.
      process: the number of this one.

    Raises:
      ValueError: only some of the arguments are there, or they do not fit together.
    """
    given = (coordinator, processes, process)
    if given == (None, None, None):
        # Tasks of `srun`, not those that an interactive shell of an allocation could start.
        tasks = int(os.environ.get('SLURM_STEP_NUM_TASKS', '1'))
        if tasks > 1:
            _initialize(cluster_detection_method='slurm', local_device_ids=_gpus_of_task(tasks, os.environ))
        return
    if coordinator is None or processes is None or process is None:
        raise ValueError('--coordinator HOST:PORT, --processes N and --process I belong together')
    if not 0 <= process < processes:
        raise ValueError(f'--process {process} must lie in 0..{processes - 1}, --processes {processes} says')
    host, colon, port = coordinator.rpartition(':')
    if not (host and colon and port.isdecimal()):
        raise ValueError(f'--coordinator {coordinator!r} must be HOST:PORT')
    if processes > 1:
        _initialize(coordinator_address=coordinator, num_processes=processes, process_id=process)


def _gpus_of_task(tasks: int, environment: Mapping[str, str]) -> list[int] | None:
    """The numbers of a task's share of its node's GPUs; None if SLURM gave none."""
    gpus = int(environment.get('SLURM_GPUS_ON_NODE', '0'))
    if not gpus:
        return None
    each, rest = divmod(gpus * int(environment['SLURM_STEP_NUM_NODES']), tasks)
    if rest or not each or gpus % each:
        raise ValueError(f'{tasks} tasks cannot share {gpus} GPUs of each node evenly')
    first = int(environment['SLURM_LOCALID']) * each
    return list(range(first, first + each))


def _initialize(**options: Any) -> None:
    # SIGTERM is answered by `train.stop`, in all processes at the same step.
    jax.config.update('jax_enable_preemption_service', False)
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    options.setdefault('cluster_detection_method', 'deactivate')
    jax.distributed.initialize(
        initialization_timeout=START_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, **options
    )


def several() -> bool:
    """Whether there are others."""
    return jax.process_count() > 1


def is_main() -> bool:
    """Whether this is the one process that writes lines and files."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line on standard error, once for all processes."""
    if is_main():
        print(text, file=sys.stderr, flush=True)


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if several():
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def main_first(name: str) -> Iterator[None]:
    """The main process goes through the body first, and the others find what it left there, or fail as it did."""
    if not is_main():
        barrier(name)
    try:
        yield
    finally:
        if is_main():
            barrier(name)


def check_same(values: Mapping[str, Any], rule: str = 'have the same configuration') -> None:
    """Raises `ValueError`, in all processes, unless all give the same values, by their `repr`: they must do what the rule says."""
    if not several():
        return
    text = '\n'.join(f'{name}={value!r}' for name, value in values.items()).encode()
    digest = np.frombuffer(hashlib.sha256(text).digest(), np.uint32)
    digests = np.asarray(multihost_utils.process_allgather(digest))
    if (digests == digests[0]).all():
        return
    longest = int(np.max(multihost_utils.process_allgather(np.array(len(text)))))
    texts = np.asarray(multihost_utils.process_allgather(np.frombuffer(text.ljust(longest), np.uint8)))
    first, *others = (bytes(row).decode().rstrip().split('\n') for row in texts)
    process, other = next((index, lines) for index, lines in enumerate(others, 1) if lines != first)
    here, there = (next(iter(set(one) - set(two)), 'nothing') for one, two in ((first, other), (other, first)))
    raise ValueError(f'processes must {rule}: process 0 has {here}, process {process} has {there}')


class Sums:
    """Whole numbers that processes have counted, added up while the devices are at work."""

    def __init__(self) -> None:
        devices = jax.devices()
        mesh = jax.make_mesh((len(devices),), ('all',), axis_types=(AxisType.Auto,), devices=devices)
        self._places = NamedSharding(mesh, PartitionSpec('all'))
        self._add = jax.jit(lambda x: x.sum(axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def begin(self, counts: Sequence[int]) -> 'Sum':
        """Begins to add up the counts of all processes, each below 2**46; all must call this, in the same order."""
        if not several():
            return Sum(np.array([[0, count] for count in counts]))
        halves = np.zeros((jax.local_device_count(), len(counts), 2), np.int32)
        halves[0] = [divmod(count, 1 << _LOW_BITS) for count in counts]
        return Sum(self._add(jax.make_array_from_process_local_data(self._places, halves)))


_LOW_BITS = 16


class Sum:
    """A sum that may still be in the making."""

    def __init__(self, halves: Any) -> None:
        self._halves = halves

    def value(self) -> list[int]:
        """Waits for it."""
        return [(int(high) << _LOW_BITS) + int(low) for high, low in np.asarray(self._halves)]


@contextlib.contextmanager
def ending_alone(saved_step: Callable[[], int | None]) -> Iterator[None]:
    """Within, what goes wrong in one of several processes ends it at once: the others wait for it, and it for nobody.

    A `TrainingError` comes to all at the same step and passes, as everything does where there is one process.

    Args:
      saved_step: gives the step of the newest checkpoint, or None.
    """
    try:
        yield
    except TrainingError:
        raise
    except BaseException as error:
        if not several():
            raise
        if isinstance(error, jax.errors.JaxRuntimeError) and _SIGNS_OF_LOSS.search(str(error)):
            step, why = saved_step(), str(error).partition('\n')[0][:200]
            on = 'nothing is saved yet' if step is None else f'the same command goes on from step {step}'
            print(f'error: another process was lost ({why}): {on}', file=sys.stderr)
            _end(LOST)
        traceback.print_exc()
        _end(FAILED)


def ended(code: int) -> int:
    """The exit code of a process that is alone. One of several ends here: its exit would wait for the others."""
    if several():
        _end(code)
    return code


def _end(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main():
        time.sleep(LAST_WORDS_SECONDS)
    os._exit(code)
