"""The exponential moving average of the parameters, kept in host memory [3.2.3].

It shows early how the model would do once the learning rate has decayed, and costs the device neither time nor, but for
a moment, memory:

  device   step n | copy | step n + 1 | ...           the copy survives the step that takes the parameters for itself
  transfer                ~~~~~~~~~~>
  thread                             average += rate * (copy - average)
"""

import concurrent.futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Average(NamedTuple):
    """An average of parameters.

    Attributes:
      params: a tree like the parameters', of float32 numpy arrays; zeros before the first update. Where an array is not
        whole on the devices of this process, its place has the parts that are (`host_parts`).
      updates: how many states of the parameters are in it.
    """

    params: Any
    updates: int


def no_average(params: Any) -> Average:
    """The average of no parameters yet, for a tree of arrays or shapes."""
    return Average(jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), host_parts(params)), 0)


def host_parts(params: Any) -> Any:
    """The tree with every array that several processes have replaced by the parts that this one has, by their place."""

    def parts(leaf: Any) -> Any:
        if is_whole(leaf):
            return leaf
        return {str(shard.index): shard.data for shard in leaf.addressable_shards}

    return jax.tree.map(parts, params)


def on_devices(parts: Any, params: Any) -> Any:
    """The arrays of which `parts` are this process's, each where that of `params` lies."""

    def place(leaf: jax.Array, part: Any) -> jax.Array:
        if is_whole(leaf):
            return jax.device_put(part, leaf.sharding)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: part[str(index)])

    return jax.tree.map(place, params, parts)


def is_whole(leaf: Any) -> bool:
    """Whether an array is whole on the devices of this process; so are shapes, and what is on the host."""
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable


def updated(average: Average, leaves: list[Any], decay: float) -> Average:
    """The average with one more state of the parameters in it, given as the tree's leaves.

    The weights `decay**age` are divided by their sum, so that the initial zeros count for nothing. `leaves` is emptied
    on the way, for each array to be freed as soon as it is on the host; the arrays of `average` stay as they are.
    """
    updates = average.updates + 1
    rate = np.float32((1 - decay) / (1 - decay**updates))
    old, tree = jax.tree.flatten(average.params)
    new = [leaf + rate * (np.asarray(leaves.pop(0)) - leaf) for leaf in old]
    return Average(jax.tree.unflatten(tree, new), updates)


class MovingAverage:
    """Averages the parameters of a run while the device goes on."""

    def __init__(self, average: Average, decay: float, every: int) -> None:
        """`decay` is that of one step; the parameters of every `every`-th step are averaged."""
        self._average, self._decay, self._every = average, decay**every, every
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='ema')
        self._update: concurrent.futures.Future[Average] | None = None

    def step(self, params: Any, step: int) -> None:
        """Begins to average the parameters after `step`; they may be donated as soon as this returns.

        Waits for the update before, so that never more than one copy of the parameters is on the device.
        """
        if step % self._every:
            return
        average = self.value()
        leaves = jax.tree.leaves(host_parts(_copy(params)))
        for leaf in leaves:
            leaf.copy_to_host_async()
        self._update = self._thread.submit(updated, average, leaves, self._decay)

    def value(self) -> Average:
        """The average of all steps so far; waits until it is there."""
        if self._update is not None:
            self._average, self._update = self._update.result(), None
        return self._average

    def close(self) -> None:
        self._thread.shutdown()


@jax.jit
def _copy(params: Any) -> Any:
    return jax.tree.map(jnp.copy, params)
