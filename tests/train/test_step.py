import jax
import numpy as np
import pytest

from train.optimizer import make_optimizer
from train.step import Hyperparameters, State, as_batch, eval_step, train_step, update_router_biases


@pytest.fixture(scope='module')
def batch():
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 8, (4, 17)).astype(np.int32)
    return as_batch({'tokens': tokens, 'segments': np.ones_like(tokens), 'weights': np.ones((4, 16), np.float32)})


@pytest.fixture(scope='module')
def take(model, optimizer, objective, batch):
    """One step on the batch; the state given stays usable."""

    def take(state: State, learning_rate: float = 5e-3, mtp_weight: float = 0.3, bias_rate: float = 1e-3):
        values = Hyperparameters(learning_rate, mtp_weight, bias_rate)
        return train_step(
            jax.tree.map(lambda leaf: leaf.copy(), state),
            batch,
            values,
            model=model,
            optimizer=optimizer,
            config=objective,
        )

    return take


@pytest.fixture(scope='module')
def start(params, optimizer) -> State:
    return State(params, make_optimizer(optimizer).init(params))


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
