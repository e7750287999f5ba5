"""One training step and one evaluation step as pure functions."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

import deepseek_jax as ds
from deepseek_jax import router, sharding
from deepseek_jax.precision import Float8Copies
from deepseek_jax.sharding import Parallel
from train import guard as guard_lib
from train import parallel
from train.guard import GuardConfig, GuardState, Verdict
from train.loss import Losses, ObjectiveConfig, Totals, objective, totals
from train.optimizer import OptimizerConfig, make_optimizer
from train.parallel import Layout


class State(NamedTuple):
    """What a step changes: parameters (float32 masters, routers' biases included), the optimizer's moments, and the
    history that steps are judged by."""

    params: Any
    optimizer: Any
    guard: GuardState


class Hyperparameters(NamedTuple):
    """Values of this step, taken from the schedules on the host."""

    learning_rate: float
    mtp_weight: float
    bias_rate: float


class StepMetrics(NamedTuple):
    """What a step measured, and whether it was taken; the losses are those before the update."""

    losses: Losses
    grad_norm: Array
    verdict: Verdict


def init_state(
    key: Array,
    model: ds.ModelConfig,
    optimizer: OptimizerConfig,
    guard: GuardConfig = guard_lib.DEFAULT,
    places: State | None = None,
) -> State:
    """Random parameters, zero moments, no history; with `places`, a state of shardings, each device makes its own part."""
    places = State(None, None, None) if places is None else places  # pyright: ignore[reportArgumentType]
    params = ds.init(key, model, places.params)
    moments = jax.jit(make_optimizer(optimizer).init, out_shardings=places.optimizer)(params)
    return State(params, moments, jax.device_put(guard_lib.no_history(guard), places.guard))


def state_shapes(
    model: ds.ModelConfig, optimizer: OptimizerConfig, guard: GuardConfig, layout: Layout | None, alone: Any = None
) -> State:
    """The shapes of a state, each in its place; without a layout that is a device alone (`parallel.places`)."""
    shapes = jax.eval_shape(lambda key: init_state(key, model, optimizer, guard), jax.random.key(0))
    places = parallel.places(shapes, shapes.params, layout, alone)
    return jax.tree.map(lambda leaf, place: leaf.update(sharding=place), shapes, places)


def step(
    state: State,
    batch: Mapping[str, Array],
    values: Hyperparameters,
    *,
    model: ds.ModelConfig,
    optimizer: OptimizerConfig,
    config: ObjectiveConfig,
    guard: GuardConfig = guard_lib.DEFAULT,
    microbatch_size: int | None = None,
    layout: Layout | None = None,
) -> tuple[State, StepMetrics]:
    """Gradient, clip and Adam, weight decay, then the routers' biases from the load of the whole batch [2.1.2].

    A bad step (`train.guard`) changes nothing but the count of those in a row.
    """
    gradients, loss, losses = batch_gradients(
        state.params, batch, values.mtp_weight, model, config, microbatch_size, layout
    )
    grad_norm = optax.tree.norm(gradients)
    verdict, history = guard_lib.judge(state.guard, loss, grad_norm, guard)
    directions, optimizer_state = make_optimizer(optimizer).update(gradients, state.optimizer, state.params)
    params = jax.tree.map(lambda leaf, way: leaf - values.learning_rate * way, state.params, directions)
    params = update_router_biases(params, losses.load_LE, values.bias_rate, model)
    params, optimizer_state = jax.tree.map(
        lambda new, old: jnp.where(verdict.accepted, new, old), (params, optimizer_state), state[:2]
    )
    return State(params, optimizer_state, history), StepMetrics(losses, grad_norm, verdict)


def jit_step(shardings: State | None = None) -> jax.stages.Wrapped:
    """`step` under `jax.jit`, its state given away; with `shardings`, the new state lies where they say."""
    static = ('model', 'optimizer', 'config', 'guard', 'microbatch_size', 'layout')
    return jax.jit(step, static_argnames=static, donate_argnums=0, out_shardings=(shardings, None))


train_step = jit_step()


def batch_gradients(
    params: Any,
    batch: Mapping[str, Array],
    mtp_weight: Array | float,
    model: ds.ModelConfig,
    config: ObjectiveConfig,
    microbatch_size: int | None,
    layout: Layout | None = None,
) -> tuple[Any, Array, Losses]:
    """The gradient of the objective over a batch, its value, and its terms.

    With a microbatch size, activations of that many sequences exist at a time, and the gradients of such parts add up
    in float32 to that of the batch: each part's terms are divided by what the whole batch's are. The size must divide
    the batch's. With a layout each device takes its rows of every part, and the gradient is cut as the parameters are.
    """
    axes = () if layout is None else sharding.ROW_AXES
    size = microbatch_size if microbatch_size is None or layout is None else microbatch_size // layout.row_devices
    share = sharding.ALONE if layout is None else layout.parallel

    def gradients_of(params: Any, batch: Mapping[str, Array], mtp_weight: Array | float) -> tuple[Any, tuple]:
        return _gradients(params, batch, mtp_weight, model, config, size, totals(batch, model, axes), share)

    if layout is not None:
        gradients_of = parallel.over_devices(gradients_of, layout, params)
    gradients, (loss, losses) = gradients_of(params, dict(batch), jnp.asarray(mtp_weight))
    return gradients, loss, losses


def _gradients(
    params: Any,
    batch: Mapping[str, Array],
    mtp_weight: Array | float,
    model: ds.ModelConfig,
    config: ObjectiveConfig,
    microbatch_size: int | None,
    whole: Totals,
    parallel: Parallel,
) -> tuple[Any, tuple[Array, Losses]]:
    """Gradient, value and terms of rows that are a batch, or a part of one with these totals."""
    # Outside the scan: what is computed once a step, whatever the number of parts.
    copies = Float8Copies.of(params, model, parallel)

    def loss(params: Any, part: Mapping[str, Array]) -> tuple[Array, Losses]:
        return objective(copies.beside(params), part, model, config, mtp_weight, whole, parallel)

    if microbatch_size in (None, len(batch['tokens'])):
        values, gradients = jax.value_and_grad(loss, has_aux=True)(params, batch)
        return gradients, values
    # Where each layer adds its own to the sum, the gradients of a part never exist beside it.
    sums = jax.tree.map(lambda leaf: jax.new_ref(jnp.zeros_like(leaf)), params)

    def add(_: None, part: Mapping[str, Array]) -> tuple[None, tuple[Array, Losses]]:
        value, backward, losses = jax.vjp(lambda params: loss(params, part), params, has_aux=True)
        backward.with_refs(sums)(jnp.ones_like(value))
        return None, (value, losses)

    _, shares = jax.lax.scan(add, None, microbatches(batch, microbatch_size))
    return jax.tree.map(jax.freeze, sums), jax.tree.map(lambda values: values.sum(axis=0), shares)


def microbatches(batch: Mapping[str, Array], size: int) -> dict[str, Array]:
    """The rows of a batch in n parts of `size`, along a new leading axis: part i holds rows i, i + n, i + 2n, ...

    Where each device holds a stretch of the rows, it has its share of every such part already.
    """
    return {name: rows.reshape(size, -1, *rows.shape[1:]).swapaxes(0, 1) for name, rows in batch.items()}


@functools.partial(jax.jit, static_argnames=('model', 'config', 'layout'))
def eval_step(
    params: Any,
    batch: Mapping[str, Array],
    *,
    model: ds.ModelConfig,
    config: ObjectiveConfig,
    layout: Layout | None = None,
) -> Losses:
    """The losses of a batch, without an update."""
    if layout is None:
        return objective(params, batch, model, config, 0.0)[1]

    def losses(params: Any, batch: Mapping[str, Array]) -> tuple[None, Losses]:
        whole = totals(batch, model, sharding.ROW_AXES)
        return None, objective(params, batch, model, config, 0.0, whole, layout.parallel)[1]

    return parallel.over_devices(losses, layout, params, gradients=False)(params, dict(batch))[1]


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


def as_batch(rows: Mapping[str, Any], layout: Layout | None = None) -> dict[str, jax.Array]:
    """A batch of numpy rows on the device, or cut over those of a layout; of several processes each gives its share of the
    rows (`parallel.row_share`)."""
    if layout is None:
        return jax.device_put(dict(rows))
    return {name: jax.make_array_from_process_local_data(layout.batch, values) for name, values in rows.items()}
