"""The JAX model against the float64 numpy model written from the report: values, and the gradient of every parameter.

Errors are relative to the largest magnitude of the expected array; gradients are compared along a random direction,
relative to the size that such a projection typically has.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_jax as ds
from tests.oracles import numpy_model

VALUE_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 3e-5
CLOSEST_CALL = 1e-5
"""Selections with a smaller gap could be turned by float32 rounding; the cases have none."""
STEP = 1e-6
MTP_WEIGHT, BALANCE_WEIGHT = 0.3, 0.05
BATCH, LENGTH = 2, 8

GROUPS = ds.ModelConfig(
    vocab_size=29,
    num_layers=3,
    num_dense_layers=1,
    model_dim=16,
    dense_ffn_dim=20,
    mla=ds.MLAConfig(num_heads=2, nope_head_dim=6, rope_head_dim=4, value_head_dim=5, kv_rank=8, query_rank=10),
    moe=ds.MoEConfig(
        num_experts=12, num_shared_experts=1, top_k=3, num_groups=4, top_groups=2, ffn_dim=7, gate_scale=2.5
    ),
    mtp_depth=2,
    precision=ds.PrecisionConfig(recipe='fp32'),
)
YARN = dataclasses.replace(
    GROUPS,
    num_dense_layers=2,
    mla=ds.MLAConfig(num_heads=3, nope_head_dim=5, rope_head_dim=8, value_head_dim=6, kv_rank=7),
    moe=ds.MoEConfig(
        num_experts=5, num_shared_experts=0, top_k=2, num_groups=5, top_groups=3, ffn_dim=6, gate_scale=1.0
    ),
    rope=ds.RopeConfig(theta=500.0, yarn=ds.YarnConfig(scale=8.0, original_length=256, mscale=0.7, mscale_all_dim=1.2)),
    mtp_depth=1,
    norm_eps=1e-3,
)
SEGMENTS = dataclasses.replace(
    GROUPS,
    num_layers=2,
    num_dense_layers=0,
    mla=ds.MLAConfig(num_heads=2, nope_head_dim=6, rope_head_dim=2, value_head_dim=5, kv_rank=8),
    moe=ds.MoEConfig(
        num_experts=6, num_shared_experts=2, top_k=1, num_groups=1, top_groups=1, ffn_dim=5, gate_scale=1.5
    ),
    remat='full',
)
CASES = {'groups': GROUPS, 'yarn': YARN, 'segments': SEGMENTS}
CASES_WITH_EVERY_PARAMETER = ('groups', 'segments')


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration with random parameters (float32 numpy), T + 1 tokens a row, and segments of the first T."""

    config: ds.ModelConfig
    params: dict
    tokens_BT1: np.ndarray
    segments_BT: np.ndarray | None

    @property
    def segments(self) -> jax.Array | None:
        return None if self.segments_BT is None else jnp.asarray(self.segments_BT)


@functools.cache
def make_case(name: str) -> Case:
    config = CASES[name]
    rng = np.random.default_rng(0)

    def random_leaf(path, leaf) -> np.ndarray:
        normal = rng.normal(size=leaf.shape)
        if '_norm_' in path[-1].key:
            value = 1 + 0.3 * normal
        elif '_bias_' in path[-1].key:
            value = 0.3 * normal - 0.5  # above and below zero once added to an affinity
        else:
            value = normal / np.sqrt(config.model_dim)
        return value.astype(np.float32)

    shapes = jax.eval_shape(lambda key: ds.init(key, config), jax.random.key(0))
    params = jax.tree_util.tree_map_with_path(random_leaf, shapes)
    tokens_BT1 = rng.integers(config.vocab_size, size=(BATCH, LENGTH + 1)).astype(np.int32)
    segments_BT = np.sort(rng.integers(3, size=(BATCH, LENGTH))).astype(np.int32) if name == 'segments' else None
    return Case(config, params, tokens_BT1, segments_BT)


def relative_error(actual, expected) -> float:
    """The largest deviation over the largest magnitude expected."""
    return float(np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max())


def jax_loss(params: dict, config: ds.ModelConfig, tokens_BT1: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
    """The loss of `numpy_model.loss`, composed of the public outputs of the JAX model."""
    length, depth = tokens_BT1.shape[1] - 1, config.mtp_depth
    padded = jnp.pad(tokens_BT1, ((0, 0), (0, depth)))
    ahead_LBT = jnp.stack([padded[:, k : k + length] for k in range(1, depth + 1)])
    out = ds.states(params, tokens_BT1[:, :-1], config, segments_BT, ahead_LBT)
    assert out.mtp_LBTD is not None

    def cross_entropy(hidden_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
        log_probabilities = jax.nn.log_softmax(ds.logits(params, hidden_BTD, config))
        return -jnp.mean(jnp.take_along_axis(log_probabilities, targets_BT[..., None], axis=-1))

    total = cross_entropy(out.hidden_BTD, tokens_BT1[:, 1:])
    for k in range(1, depth + 1):
        total += MTP_WEIGHT / depth * cross_entropy(out.mtp_LBTD[k - 1, :, : length - k], tokens_BT1[:, k + 1 :])
    return total + BALANCE_WEIGHT * out.balance_loss_L.sum()


def numpy_loss(params: dict, case: Case) -> tuple[float, numpy_model.Output]:
    return numpy_model.loss(params, case.config, case.tokens_BT1, case.segments_BT, MTP_WEIGHT, BALANCE_WEIGHT)


@pytest.mark.parametrize('name', CASES)
def test_forward_equals_numpy_model(name):
    case = make_case(name)
    tokens_BT = case.tokens_BT1[:, :-1]
    depths = range(1, case.config.mtp_depth + 1)
    ahead = [numpy_model.embedded_ahead(tokens_BT, depth, LENGTH) for depth in depths]
    expected = numpy_model.forward(case.params, case.config, tokens_BT, case.segments_BT, ahead)
    assert min(routing.margin for layer in expected.routings for routing in layer) > CLOSEST_CALL
    params = jax.tree.map(jnp.asarray, case.params)

    out = ds.forward(params, jnp.asarray(tokens_BT), case.config, case.segments, mtp=True)

    assert out.logits_BTV.dtype == jnp.float32
    assert relative_error(out.logits_BTV, expected.logits_BTV) < VALUE_TOLERANCE
    assert len(out.mtp_logits) == case.config.mtp_depth
    for depth, logits_BTV in zip(depths, out.mtp_logits, strict=True):
        assert logits_BTV.shape == (BATCH, LENGTH - depth, case.config.vocab_size)
        assert relative_error(logits_BTV, expected.mtp_logits[depth - 1][:, : LENGTH - depth]) < VALUE_TOLERANCE
    assert relative_error(out.balance_loss_L, expected.balance_loss_L) < VALUE_TOLERANCE
    np.testing.assert_array_equal(out.load_LE, expected.load_LE)


def test_forward_without_mtp_leaves_modules_out():
    case = make_case('segments')
    tokens_BT = case.tokens_BT1[:, :-1]
    expected = numpy_model.forward(case.params, case.config, tokens_BT, case.segments_BT)

    out = ds.forward(jax.tree.map(jnp.asarray, case.params), jnp.asarray(tokens_BT), case.config, case.segments)

    assert out.mtp_logits == ()
    assert relative_error(out.logits_BTV, expected.logits_BTV) < VALUE_TOLERANCE
    assert relative_error(out.balance_loss_L, expected.balance_loss_L) < VALUE_TOLERANCE
    np.testing.assert_array_equal(out.load_LE, expected.load_LE)


@pytest.mark.parametrize('name', CASES_WITH_EVERY_PARAMETER)
def test_gradient_equals_finite_differences_of_numpy_model(name):
    case = make_case(name)
    params = jax.tree.map(jnp.asarray, case.params)
    # Little is computed, much is compiled.
    quickly_compiled = {'xla_backend_optimization_level': 0}
    value_and_grad = jax.jit(jax.value_and_grad(jax_loss), static_argnums=1, compiler_options=quickly_compiled)
    value, gradient = value_and_grad(params, case.config, jnp.asarray(case.tokens_BT1), case.segments)
    expected_value, expected = numpy_loss(case.params, case)
    assert abs(float(value) - expected_value) < VALUE_TOLERANCE * expected_value

    rng = np.random.default_rng(1)
    point = numpy_model.to_float64(case.params)
    errors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        leaf = np.asarray(leaf, np.float64)
        label = jax.tree_util.keystr(path, simple=True, separator='/')
        if path[-1].key == 'router_bias_E':
            assert not leaf.any(), label
            continue
        assert np.linalg.norm(leaf) > 0, label
        direction = rng.normal(size=leaf.shape)
        direction /= np.linalg.norm(direction)
        above = shifted_loss(case, point, path, STEP * direction, expected)
        below = shifted_loss(case, point, path, -STEP * direction, expected)
        slope = (above - below) / (2 * STEP)
        typical_slope = np.linalg.norm(leaf) / np.sqrt(leaf.size)
        errors[label] = abs(np.sum(leaf * direction) - slope) / typical_slope
    assert not {label: error for label, error in errors.items() if error > GRADIENT_TOLERANCE}


def shifted_loss(case: Case, point: dict, path, shift: np.ndarray, base: numpy_model.Output) -> float:
    """The numpy loss with one leaf shifted; the shift must not change any selection."""
    tree = branch = dict(point)
    for key in path[:-1]:
        branch[key.key] = dict(branch[key.key])
        branch = branch[key.key]
    branch[path[-1].key] = branch[path[-1].key] + shift
    value, output = numpy_loss(tree, case)
    assert output.selections == base.selections
    return value
