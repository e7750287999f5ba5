"""Which GPU holds which experts in inference: busy experts are held more than once, to even out the GPUs [3.4].

The contract is that of the load balancer published by DeepSeek, https://github.com/deepseek-ai/EPLB. All of it runs on
the host, in NumPy, each time that a new estimate of the load is at hand.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int


class Placement(NamedTuple):
    """The replicas of every expert and where they lie, layer by layer.

    Replicas (physical experts) are numbered along the GPUs: with `n` replicas a GPU, GPU `g` holds those from `g * n`
    to `(g + 1) * n - 1`. GPUs are numbered along the nodes in the same way.

    Attributes:
      physical_to_logical: the expert that each replica is a copy of, int32.
      logical_to_physical: the replicas of each expert in rising order, int32, padded with -1 to as many as the most
        copied expert of all layers has.
      replica_counts_LE: replicas of each expert, at least one, int32.
    """

    physical_to_logical: Int[np.ndarray, 'L replicas']
    logical_to_physical: Int[np.ndarray, 'L E copies']
    replica_counts_LE: Int[np.ndarray, 'L E']


def rebalance_experts(
    load_LE: npt.ArrayLike, *, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> Placement:
    """A placement of `num_replicas` expert replicas that evens out the load of the GPUs, each layer on its own.

    When the nodes divide the router's groups, the policy is hierarchical: groups are packed onto nodes, so that a token
    limited to few groups goes to few nodes; each node makes replicas of its own experts, and packs them onto its GPUs.
    Otherwise the policy is global: the same with one group and one node.

    Every GPU gets equally many replicas. Both steps are greedy: the next replica goes to the expert with the largest
    load per replica, and the heaviest item left goes to the lightest GPU or node with room. Ties go to the lowest index.

    Args:
      load_LE: estimated load of each expert, finite and not negative, rank 2. Any unit, such as tokens a second.
      num_replicas: replicas a layer, over all GPUs.
      num_groups: groups of experts that the router chooses from; 1 if it knows none.
      num_nodes: nodes that the GPUs are spread over.
      num_gpus: GPUs over all nodes.

    Raises:
      ValueError: for such a load, for a number below one, for fewer replicas than experts, or where `num_groups` does
        not divide the experts, `num_nodes` the GPUs, or `num_gpus` the replicas.
    """
    load_LE = _checked_load(load_LE)
    num_experts = load_LE.shape[1]
    sizes = {
        'num_experts': num_experts,
        'num_replicas': num_replicas,
        'num_groups': num_groups,
        'num_nodes': num_nodes,
        'num_gpus': num_gpus,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f'{name}={size} must be positive')
    for name, divisor in (('num_experts', 'num_groups'), ('num_gpus', 'num_nodes'), ('num_replicas', 'num_gpus')):
        if sizes[name] % sizes[divisor]:
            raise ValueError(f'{name}={sizes[name]} must be a multiple of {divisor}={sizes[divisor]}')
    if num_replicas < num_experts:
        raise ValueError(f'{num_replicas=} must be at least {num_experts=}')
    if num_groups % num_nodes:
        num_groups = num_nodes = 1

    physical_to_logical = np.empty((len(load_LE), num_replicas), np.int32)
    for layer, load_E in enumerate(load_LE):
        physical_to_logical[layer] = _place_layer(load_E, num_replicas, num_groups, num_nodes, num_gpus)
    counts_LE = (physical_to_logical[:, None, :] == np.arange(num_experts)[:, None]).sum(axis=-1, dtype=np.int32)
    logical_to_physical = np.full((*counts_LE.shape, counts_LE.max(initial=1)), -1, np.int32)
    for layer, expert in np.ndindex(counts_LE.shape):
        replicas = np.flatnonzero(physical_to_logical[layer] == expert)
        logical_to_physical[layer, expert, : len(replicas)] = replicas
    return Placement(physical_to_logical, logical_to_physical, counts_LE)


def gpu_loads(load_LE: npt.ArrayLike, placement: Placement, num_gpus: int) -> Float[np.ndarray, 'L gpus']:
    """The load of each GPU, float64, in the unit of `load_LE`: an expert's replicas carry equal shares of its load.

    `load_LE` may be another than the placement was made for, such as what was measured later. Raises `ValueError` if it
    is negative, not finite or not of the placement's shape, or if `num_gpus` does not divide the replicas.
    """
    load_LE = _checked_load(load_LE)
    if load_LE.shape != placement.replica_counts_LE.shape:
        raise ValueError(f'{load_LE.shape=} must be that of the placement, {placement.replica_counts_LE.shape}')
    num_layers, num_replicas = placement.physical_to_logical.shape
    if num_gpus < 1 or num_replicas % num_gpus:
        raise ValueError(f'{num_gpus=} must be positive and divide {num_replicas=}')
    share_LE = load_LE / placement.replica_counts_LE
    replica_load = np.take_along_axis(share_LE, placement.physical_to_logical, axis=1)
    return replica_load.reshape(num_layers, num_gpus, num_replicas // num_gpus).sum(axis=-1)


def _checked_load(load_LE: npt.ArrayLike) -> Float[np.ndarray, 'L E']:
    load_LE = np.asarray(load_LE, np.float64)
    if load_LE.ndim != 2:
        raise ValueError(f'{load_LE.shape=} must be [layers, experts]')
    wrong = ~np.isfinite(load_LE) | (load_LE < 0)
    if wrong.any():
        layer, expert = np.argwhere(wrong)[0].tolist()
        raise ValueError(f'load {load_LE[layer, expert]} of {layer=}, {expert=} must be finite and not negative')
    return load_LE


def _place_layer(
    load_E: Float[np.ndarray, ' E'], num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> Int[np.ndarray, ' replicas']:
    """The expert of each replica, by the hierarchical policy."""
    load_Ge = load_E.reshape(num_groups, -1)
    experts_Ge = np.arange(load_E.size).reshape(load_Ge.shape)
    placed = []
    for groups in _pack(load_Ge.sum(axis=-1), num_nodes):
        experts_e, load_e = experts_Ge[groups].reshape(-1), load_Ge[groups].reshape(-1)
        copied, counts_e = _replicate(load_e, num_replicas // num_nodes)
        packed = _pack((load_e / counts_e)[copied], num_gpus // num_nodes)
        placed.append(experts_e[copied[packed]].reshape(-1))
    return np.concatenate(placed)


def _replicate(
    load_e: Float[np.ndarray, ' e'], num_replicas: int
) -> tuple[Int[np.ndarray, ' replicas'], Int[np.ndarray, ' e']]:
    """The expert of each replica, and the replicas of each expert: one each, then more where the load is largest."""
    counts_e = np.ones(load_e.size, np.int64)
    copied = list(range(load_e.size))
    while len(copied) < num_replicas:
        busiest = int(np.argmax(load_e / counts_e))
        counts_e[busiest] += 1
        copied.append(busiest)
    return np.array(copied), counts_e


def _pack(weight: Float[np.ndarray, ' items'], num_packs: int) -> Int[np.ndarray, 'packs size']:
    """The items of each pack, equally many in all: heaviest first, into the lightest pack that has room."""
    size = weight.size // num_packs
    if size == 1:  # No order is better than another, and in this one no expert moves without need.
        return np.arange(num_packs)[:, None]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    total = [0.0] * num_packs
    for item in np.argsort(-weight, stable=True).tolist():
        lightest = min((pack for pack in range(num_packs) if len(packs[pack]) < size), key=total.__getitem__)
        packs[lightest].append(item)
        total[lightest] += float(weight[item])
    return np.array(packs)
