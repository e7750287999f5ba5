import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax import names
from train.optimizer import OptimizerConfig, make_optimizer, scale_by_adam
from train.schedule import Schedule

FP32 = OptimizerConfig(
    learning_rate=Schedule(pieces=(('constant', 1.0, 1.0),)), moment_dtype='float32', epsilon=1e-3, weight_decay=0.1
)
VECTORS = {'attention_norm_D', 'ffn_norm_D', 'final_norm_D', 'hidden_norm_D', 'embedding_norm_D', 'query_norm_Q',
           'latent_norm_C'}  # fmt: skip


def arrays(seed: int, std: float = 1.0) -> dict:
    """A small tree with every kind of leaf: matrix, vector, stacked vector, router bias."""
    draw = np.random.default_rng(seed)
    shapes = {
        'head_DV': (4, 6),
        'final_norm_D': (4,),
        'moe_layers': {'ffn_norm_D': (2, 4), 'moe': {'router': {'w_router_DE': (2, 4, 3), 'router_bias_E': (2, 3)}}},
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(std * draw.standard_normal(shape), jnp.float32),
        shapes,
        is_leaf=lambda shape: isinstance(shape, tuple),
    )


def split_bias(tree: dict) -> tuple[dict, jax.Array]:
    """The tree without the router's bias, and the bias."""
    moe = tree['moe_layers']['moe']['router']
    rest = {'ffn_norm_D': tree['moe_layers']['ffn_norm_D'], 'w_router_DE': moe['w_router_DE']}
    return {'head_DV': tree['head_DV'], 'final_norm_D': tree['final_norm_D'], 'moe_layers': rest}, moe['router_bias_E']


def moments(state) -> tuple[list[np.ndarray], list[np.ndarray]]:
    adam = next(part for part in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, 'mu')) if hasattr(part, 'mu'))
    return jax.tree.leaves(adam.mu), jax.tree.leaves(adam.nu)


@pytest.fixture(scope='module')
def update():
    return jax.jit(make_optimizer(FP32).update)


def test_first_steps_equal_optax_adamw(update):
    rate = 0.01
    decayed = {'head_DV': True, 'final_norm_D': False, 'moe_layers': {'ffn_norm_D': False, 'w_router_DE': True}}
    reference = optax.chain(
        optax.clip_by_global_norm(FP32.clip_norm),
        optax.adamw(rate, FP32.beta1, FP32.beta2, FP32.epsilon, weight_decay=FP32.weight_decay, mask=decayed),
    )
    reference_update = jax.jit(reference.update)
    params = arrays(0)
    expected = split_bias(params)[0]
    state, reference_state = make_optimizer(FP32).init(params), reference.init(expected)
    for step in range(5):
        # Norms from 0.3 to 30: some are clipped, some are not.
        gradients = arrays(step + 1, std=0.05 * 10 ** (step / 2))
        directions, state = update(gradients, state, params)
        params = jax.tree.map(lambda leaf, direction: leaf - rate * direction, params, directions)
        # The bias's gradient, which the model never has, would add to the norm.
        gradients = split_bias(gradients)[0]
        updates, reference_state = reference_update(gradients, reference_state, expected)
        expected = optax.apply_updates(expected, updates)
        jax.tree.map(
            lambda found, wanted: np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-7),
            split_bias(params)[0],
            expected,
        )
    np.testing.assert_array_equal(split_bias(params)[1], split_bias(arrays(0))[1])


def test_clip_scales_all_gradients_to_the_norm(update):
    params, gradients = arrays(0), arrays(1, std=7.0)
    norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(split_bias(gradients)[0])))
    assert norm > 20
    mu, nu = moments(update(gradients, make_optimizer(FP32).init(params), params)[1])
    clipped = [leaf / norm for leaf in jax.tree.leaves(split_bias(gradients)[0])]
    for found, wanted in zip(mu, clipped, strict=True):
        np.testing.assert_allclose(found, 0.1 * wanted, rtol=1e-5)
    for found, wanted in zip(nu, clipped, strict=True):
        np.testing.assert_allclose(found, 0.05 * wanted**2, rtol=1e-5)


def test_weight_decay_is_for_leaves_of_two_letters_or_more(params):
    # Without a gradient Adam's direction is 0, so that what is left is the decay.
    config = dataclasses.replace(FP32, moment_dtype='bfloat16', weight_decay=0.5)
    optimizer = make_optimizer(config)

    @jax.jit
    def direction(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optimizer.update(zeros, optimizer.init(params), params)[0]

    seen = set()

    def check(path, found, leaf):
        seen.add(path[-1])
        factor = 0.0 if path[-1] in {*VECTORS, 'router_bias_E'} else 0.5
        np.testing.assert_array_equal(found, factor * np.asarray(leaf), '/'.join(path))

    names.map_with_names(check, direction(params), params)
    assert VECTORS | {'router_bias_E', 'embedding_VD', 'head_DV', 'w_router_DE', 'w_gate_EDF', 'w_hidden_DD'} < seen


def test_router_bias_has_no_moments(params):
    mu, nu = moments(make_optimizer(FP32).init(params))
    num_leaves = len(jax.tree.leaves(params))
    assert len(mu) == len(nu) == num_leaves - 2  # one of the main model's, one of the prediction module's


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_moments_are_stored_in_the_configured_type(dtype):
    params = arrays(0)
    optimizer = make_optimizer(dataclasses.replace(FP32, moment_dtype=dtype))
    state = optimizer.init(params)
    directions, after = jax.eval_shape(optimizer.update, params, state, params)
    for leaves in (*moments(state), *moments(after)):
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(directions)} == {jnp.dtype(jnp.float32)}


def mean_second_moment(dtype, beta2: float, scales: np.ndarray) -> np.ndarray:
    """The mean over 4,096 elements of nu after each step, given the gradients' scale at each step."""
    transformation = scale_by_adam(0.9, beta2, 1e-8, dtype)
    draws = np.random.default_rng(0).standard_normal((50, 4096)).astype(np.float32)

    @jax.jit
    def run(draws, scales):
        def step(state, numbered):
            number, scale = numbered
            _, state = transformation.update(scale * draws[number % len(draws)], state)
            return state, jnp.mean(state.nu.astype(jnp.float32))

        numbers = jnp.arange(len(scales))
        return jax.lax.scan(step, transformation.init(draws[0]), (numbers, scales))[1]

    return np.asarray(run(draws, scales.astype(np.float32)))


def test_bfloat16_moments_are_unbiased():
    scales = np.concatenate([np.full(300, 1.0), np.full(300, 0.1), np.full(300, 3.0)])
    ratio = mean_second_moment(jnp.bfloat16, 0.95, scales) / mean_second_moment(jnp.float32, 0.95, scales)
    # Where the scale has settled, and on average on the way.
    for settled in (slice(100, 300), slice(450, 600), slice(700, 900), slice(0, 900)):
        assert abs(ratio[settled].mean() - 1) < 0.01


def test_bfloat16_moments_that_never_decay_are_refused():
    scales = np.concatenate([np.full(200, 1.0), np.zeros(2000)])
    stored = mean_second_moment(jnp.bfloat16, 0.999, scales)
    assert stored[-1] == stored[200] > 0, 'the reason for the rule'
    with pytest.raises(ValueError, match="beta2=0.999 with moment_dtype='bfloat16'.*use beta2 <= 0.99"):
        dataclasses.replace(FP32, moment_dtype='bfloat16', beta2=0.999)
    dataclasses.replace(FP32, moment_dtype='float32', beta2=0.999)


@pytest.mark.parametrize(
    ('match', 'fields'),
    [
        ('beta1=1.0 must lie in', {'beta1': 1.0}),
        ('beta2=-0.1 must lie in', {'beta2': -0.1}),
        ('clip_norm=0.0 must be positive', {'clip_norm': 0.0}),
        ('weight_decay=-0.1 must not be negative', {'weight_decay': -0.1}),
        ('warmup_steps=-1', {'warmup_steps': -1}),
    ],
)
def test_bad_value_is_refused(match, fields):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(FP32, **fields)
