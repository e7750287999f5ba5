"""One training step and one evaluation step as pure functions."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

import deepseek_jax as ds
from deepseek_jax import router
from train.loss import Losses, ObjectiveConfig, objective
from train.optimizer import OptimizerConfig, make_optimizer


class State(NamedTuple):
    """What a step changes: parameters (float32 masters, routers' biases included) and the optimizer's moments."""

    params: Any
    optimizer: Any


class Hyperparameters(NamedTuple):
    """Values of this step, taken from the schedules on the host."""

    learning_rate: float
    mtp_weight: float
    bias_rate: float


class StepMetrics(NamedTuple):
    """What a step measured; the losses are those before the update."""

    losses: Losses
    grad_norm: Array


def init_state(key: Array, model: ds.ModelConfig, optimizer: OptimizerConfig) -> State:
    """Random parameters and zero moments."""
    params = ds.init(key, model)
    return State(params, jax.jit(make_optimizer(optimizer).init)(params))


@functools.partial(jax.jit, static_argnames=('model', 'optimizer', 'config'), donate_argnums=0)
def train_step(
    state: State,
    batch: Mapping[str, Array],
    values: Hyperparameters,
    *,
    model: ds.ModelConfig,
    optimizer: OptimizerConfig,
    config: ObjectiveConfig,
) -> tuple[State, StepMetrics]:
    """Gradient, clip and Adam, weight decay, then the routers' biases from the load of the whole batch [2.1.2]."""

    def loss(params: Any) -> tuple[Array, Losses]:
        return objective(params, batch, model, config, values.mtp_weight)

    gradients, losses = jax.grad(loss, has_aux=True)(state.params)
    directions, optimizer_state = make_optimizer(optimizer).update(gradients, state.optimizer, state.params)
    params = jax.tree.map(lambda leaf, step: leaf - values.learning_rate * step, state.params, directions)
    params = update_router_biases(params, losses.load_LE, values.bias_rate, model)
    return State(params, optimizer_state), StepMetrics(losses, optax.tree.norm(gradients))


@functools.partial(jax.jit, static_argnames=('model', 'config'))
def eval_step(params: Any, batch: Mapping[str, Array], *, model: ds.ModelConfig, config: ObjectiveConfig) -> Losses:
    """The losses of a batch, without an update."""
    return objective(params, batch, model, config, 0.0)[1]


def update_router_biases(params: Any, load_LE: Array, rate: Array | float, model: ds.ModelConfig) -> Any:
    """Parameters with every router's bias moved by the load of its layer."""
    params = jax.tree.map(lambda leaf: leaf, params)
    layers = model.num_moe_layers
    for scope, load in (('moe_layers', load_LE[:layers]), ('mtp', load_LE[layers:])):
        if scope in params and load.shape[0]:
            block = params[scope]['block'] if scope == 'mtp' else params[scope]
            leaf = block['moe']['router']
            leaf['router_bias_E'] = router.update_bias(leaf['router_bias_E'], load, rate)
    return params


def as_batch(rows: Mapping[str, Any]) -> dict[str, jax.Array]:
    """A batch of numpy rows on the device."""
    return {name: jnp.asarray(values) for name, values in rows.items()}
