import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_jax as ds
from deepseek_jax import ops
from deepseek_jax.names import path_names
from deepseek_jax.precision import is_float8
from tests.support import changed, param_shapes, random_params
from train.guard import BAD_LOSS, DEFAULT, LARGE_NORM, no_history
from train.loss import ObjectiveConfig
from train.optimizer import make_optimizer
from train.step import (
    Hyperparameters,
    State,
    as_batch,
    batch_gradients,
    eval_step,
    init_state,
    microbatches,
    train_step,
    update_router_biases,
)

ROWS, LENGTH = 4, 16


@pytest.fixture(scope='module')
def batch():
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 8, (4, 17)).astype(np.int32)
    return as_batch({'tokens': tokens, 'segments': np.ones_like(tokens), 'weights': np.ones((4, 16), np.float32)})


@pytest.fixture(scope='module')
def ragged():
    """A batch whose parts weigh differently: rows of one, three and more documents, padding, a row of nothing else.

    Of the shape of the other batch: a whole step is one program for both.
    """
    draw = np.random.default_rng(1)
    tokens = draw.integers(0, 8, (ROWS, LENGTH + 1)).astype(np.int32)
    segments = np.ones_like(tokens)
    for row, cuts in enumerate([(), (5, 16), (2, 4, 6, 8, 10)]):
        for cut in cuts:
            segments[row, cut:] += 1
    segments[2, 11:] = segments[3] = 0
    weights = ((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)).astype(np.float32)
    return as_batch({'tokens': tokens, 'segments': segments, 'weights': weights})


@pytest.fixture(scope='module')
def take(model, optimizer, objective, batch):
    """One step on the batch or another one; the state given stays usable."""

    def take(
        state: State,
        learning_rate: float = 5e-3,
        mtp_weight: float = 0.3,
        bias_rate: float = 1e-3,
        batch=batch,
        microbatch_size: int | None = None,
    ):
        values = Hyperparameters(learning_rate, mtp_weight, bias_rate)
        return train_step(
            jax.tree.map(lambda leaf: leaf.copy(), state),
            batch,
            values,
            model=model,
            optimizer=optimizer,
            config=objective,
            microbatch_size=microbatch_size,
        )

    return take


@pytest.fixture(scope='module')
def start(params, optimizer) -> State:
    return State(params, make_optimizer(optimizer).init(params), no_history(DEFAULT))


def biases(params) -> np.ndarray:
    """Of the expert layer and of the prediction module, float32 (2, E)."""
    blocks = [params['moe_layers'], params['mtp']['block']]
    return np.concatenate([np.asarray(block['moe']['router']['router_bias_E']) for block in blocks])


def equal(a, b) -> bool:
    """Whether two trees are the same bit for bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) and x.dtype == y.dtype for x, y in pairs)


def test_router_biases_move_against_the_load_by_the_rate(take, start):
    after, metrics = take(start, bias_rate=0.03125)
    load = np.asarray(metrics.losses.load_LE)
    assert load.shape == (2, 4)
    assert (load.sum(axis=1) == 4 * 16 * 2).all()
    direction = np.sign(load.mean(axis=1, keepdims=True) - load)
    assert all(set(layer) == {-1.0, 1.0} for layer in direction.tolist()), 'the case shows both directions'
    np.testing.assert_array_equal(
        biases(after.params), biases(start.params) + np.float32(0.03125) * direction.astype(np.float32)
    )


def test_router_bias_of_an_even_load_stays(params, model):
    load = np.full((2, 4), 32, np.int32)
    load[0] = [32, 31, 33, 32]
    moved = jax.jit(lambda params, load: update_router_biases(params, load, 0.5, model))(params, load)
    np.testing.assert_array_equal(biases(moved) - biases(params), [[0.0, 0.5, -0.5, 0.0], [0.0] * 4])
    assert biases(params).any()


def test_without_rates_nothing_but_the_moments_moves(take, start):
    after, _ = take(start, learning_rate=0.0, bias_rate=0.0)
    assert equal(after.params, start.params)
    assert not equal(after.optimizer, start.optimizer)


def test_the_step_is_linear_in_the_learning_rate(take, start):
    slow, fast = (take(start, learning_rate=rate, bias_rate=0.0)[0].params for rate in (0.001, 0.002))

    def check(before, slow, fast):
        np.testing.assert_allclose(fast - before, 2 * (slow - before), rtol=1e-3, atol=1e-6)

    jax.tree.map(check, *(jax.tree.map(np.asarray, tree) for tree in (start.params, slow, fast)))
    assert not equal(slow, start.params)


def test_loss_falls_on_a_fixed_batch(take, start):
    state, history = start, []
    for _ in range(40):
        state, metrics = take(state)
        history.append(metrics)
    losses = [float(metrics.losses.loss) for metrics in history]
    mtp_losses = [float(metrics.losses.mtp_loss) for metrics in history]
    assert losses[-1] < min(losses[0] - 1, losses[10])
    assert mtp_losses[-1] < min(mtp_losses[0] - 1, mtp_losses[10])
    assert all(np.isfinite(float(metrics.grad_norm)) and metrics.grad_norm > 0 for metrics in history)


def test_prediction_loss_moves_its_module_and_the_main_model_by_its_weight(take, start):
    with_mtp, without = (take(start, mtp_weight=weight)[0].params for weight in (0.3, 0.0))
    # The module's last norm is read by its own loss alone, and Adam takes no step without a gradient.
    before = start.params['mtp']['final_norm_D']
    assert equal(without['mtp']['final_norm_D'], before)
    assert np.abs(np.asarray(with_mtp['mtp']['final_norm_D'] - before)).min() > 1e-3
    assert not equal(with_mtp['moe_layers'], without['moe_layers'])


def test_evaluation_changes_nothing_and_sees_what_the_step_sees(take, start, batch, model, objective):
    copy = jax.tree.map(np.array, start.params)
    evaluated = eval_step(start.params, batch, model=model, config=objective)
    assert equal(start.params, copy)
    stepped = take(start)[1].losses
    np.testing.assert_array_equal(evaluated.load_LE, stepped.load_LE)
    for name in ('loss', 'mtp_loss', 'balance_loss', 'nats'):
        np.testing.assert_allclose(getattr(evaluated, name), getattr(stepped, name), rtol=1e-5, err_msg=name)


def test_step_is_repeatable_bit_for_bit(take, start):
    first, second = take(start), take(start)
    assert equal(first, second)


def test_state_starts_with_no_history(model, optimizer, start):
    made = jax.eval_shape(lambda: init_state(jax.random.key(0), model, optimizer))
    assert made == jax.eval_shape(lambda: start)


def test_gradients_of_microbatches_add_up_to_the_batch_s(model, objective, ragged):
    """Two prediction depths, because each divides by the weight of its own targets; one row a part."""
    model = dataclasses.replace(model, num_layers=1, num_dense_layers=0, mtp_depth=2)
    params = random_params(model)
    parts = np.asarray(ragged['weights']).sum(axis=1)
    assert len(set(parts.tolist())) > 2, 'a mean of the parts would be another one'

    def gradients(size):
        return jax.jit(lambda params, batch: batch_gradients(params, batch, 0.7, model, objective, size))(
            params, ragged
        )

    (whole, loss, losses), divided = gradients(None), gradients(1)
    assert losses.mtp_loss > 0
    assert losses.balance_loss > 0

    def check(name, found, wanted):
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-6 * scale, err_msg=str(name))
        assert found.dtype == wanted.dtype

    jax.tree.map_with_path(check, divided, (whole, loss, losses))
    np.testing.assert_array_equal(divided[2].load_LE, losses.load_LE)


def test_gradients_of_microbatches_exist_once(batch):
    """Beside their sum, which is the result, there are those of no more than a few layers."""
    model = changed(num_layers=6, mtp_depth=0, dense_ffn_dim=512, moe={'ffn_dim': 512}, remat='full')
    params = param_shapes(model)
    objective = ObjectiveConfig(rows_per_chunk=64)
    compute = jax.jit(lambda params, batch: batch_gradients(params, batch, 0.0, model, objective, 2))
    needed = compute.lower(params, batch).compile().memory_analysis()
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    assert needed.output_size_in_bytes >= size
    assert needed.temp_size_in_bytes < size


def test_float8_weights_are_quantised_once_for_all_microbatches(model, objective, ragged, monkeypatch):
    given = []
    layers = ops.linears_fp8

    def spy(x, weights, quantized, **options):
        given.append((weights, quantized))
        return layers(x, weights, quantized, **options)

    monkeypatch.setattr(ops, 'linears_fp8', spy)
    quantized = []
    quantize = ops.quantize
    monkeypatch.setattr(ops, 'quantize', lambda w, *rest: quantized.append(w.shape) or quantize(w, *rest))
    model = dataclasses.replace(model, precision=ds.PrecisionConfig(recipe='fp8'))
    gradients = lambda params: batch_gradients(params, ragged, 0.3, model, objective, 2)[0]  # noqa: E731
    params = param_shapes(model)
    assert jax.eval_shape(gradients, params) == params
    assert given
    assert all(weights is not None and copies is not None for weights, copies in given)
    weights = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    weights = [path for path in map(path_names, weights) if is_float8(path, model.precision) and 'experts' not in path]
    assert len(quantized) == len(weights)


def test_devices_hold_their_share_of_every_microbatch():
    mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('x'))
    rows = jax.device_put(np.arange(96).reshape(32, 3), spread)

    @jax.jit
    def doubled(rows):
        return jax.lax.scan(lambda _, part: (None, part['rows'] * 2), None, microbatches({'rows': rows}, 8))[1]

    program = doubled.trace(rows).lower().compile()
    assert not [name for name in ('all-gather', 'all-to-all', 'collective-permute') if name in program.as_text()]
    parts = program(rows)
    assert parts.shape == (4, 8, 3)
    assert sorted(parts.reshape(32, 3).tolist()) == (2 * rows).tolist()


def test_step_in_microbatches_is_the_step(take, start, ragged):
    whole, divided = (take(start, batch=ragged, microbatch_size=size) for size in (None, 2))
    check = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)  # noqa: E731
    for found, wanted in zip(divided, whole, strict=True):
        jax.tree.map(
            check, *(jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree) for tree in (found, wanted))
        )
    np.testing.assert_array_equal(biases(divided[0].params), biases(whole[0].params))
    assert not equal(whole[0].params, start.params)


def test_state_is_given_away_to_the_last_byte(start, batch, model, optimizer, objective):
    state = jax.tree.map(lambda leaf: leaf.copy(), start)
    arguments = {'model': model, 'optimizer': optimizer, 'config': objective}
    program = train_step.trace(state, batch, Hyperparameters(1e-3, 0.3, 1e-3), **arguments).lower().compile()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert program.memory_analysis().alias_size_in_bytes == size
    program(state, batch, Hyperparameters(1e-3, 0.3, 1e-3))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_step_whose_loss_is_no_number_changes_nothing(take, start, batch):
    spoilt = {**batch, 'weights': batch['weights'].at[1, 3].set(jnp.nan)}
    once, metrics = take(start, batch=spoilt)
    assert np.isnan(metrics.losses.loss)
    assert metrics.verdict.reason == BAD_LOSS
    assert equal(once[:2], start[:2])
    assert equal(once.guard[:2], start.guard[:2])
    twice, metrics = take(once, batch=spoilt)
    assert metrics.verdict.skipped_in_a_row == twice.guard.skipped_in_a_row == 2
    # And the next good one is taken as if there had been none.
    after, metrics = take(twice)
    assert metrics.verdict.accepted
    assert equal(after, take(start)[0])


def test_step_with_an_outlying_gradient_changes_nothing(take, start):
    norm = take(start)[1].grad_norm
    history = start.guard._replace(accepted=jnp.int32(DEFAULT.min_history))

    def taken(share):
        """After norms of which the limit is this share of the gradient's."""
        norms = jnp.full(DEFAULT.window, norm * share / DEFAULT.factor)
        state = start._replace(guard=history._replace(norms=norms))
        return state, *take(state)

    state, after, metrics = taken(0.99)
    assert metrics.verdict.reason == LARGE_NORM
    assert equal(after[:2], state[:2])
    assert equal(after.guard.norms, state.guard.norms)
    state, after, metrics = taken(1.01)
    assert metrics.verdict.accepted
    assert equal(after[:2], take(start)[0][:2])
    assert after.guard.accepted == DEFAULT.min_history + 1
    assert after.guard.norms[DEFAULT.min_history] == norm
