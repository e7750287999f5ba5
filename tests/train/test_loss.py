import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.oracles import numpy_model
from tests.pallas_kernels.hopper import calls_on_h100
from tests.support import changed
from tests.train.conftest import BATCH_SIZE, SEQUENCE_LENGTH
from train.cross_entropy import cross_entropy
from train.loss import ObjectiveConfig, objective
from train.schedule import Schedule
from train.step import as_batch, eval_step


def random_rows(vocab_size: int, weights: tuple[float, ...] = (0.0, 1.0, 0.5)) -> dict[str, Any]:
    """Five rows of three tokens, of width 8, with targets and weights."""
    draw = np.random.default_rng(0)
    return {
        'hidden_BTD': jnp.asarray(draw.standard_normal((5, 3, 8)), jnp.float32),
        'head_DV': jnp.asarray(draw.standard_normal((8, vocab_size)), jnp.float32),
        'targets_BT': jnp.asarray(draw.integers(0, vocab_size, (5, 3)), jnp.int32),
        'weights_BT': jnp.asarray(draw.choice(weights, (5, 3)), jnp.float32),
    }


def whole_cross_entropy(hidden_BTD, head_DV, targets_BT, weights_BT):
    log_BTV = jax.nn.log_softmax(jnp.einsum('BTD,DV->BTV', hidden_BTD, head_DV, precision='highest'))
    return -(jnp.take_along_axis(log_BTV, targets_BT[..., None], -1)[..., 0] * weights_BT).sum()


def value_and_gradients(function, rows):
    """The value and the gradients by state, head and weights."""

    def of(hidden_BTD, head_DV, weights_BT):
        return function(hidden_BTD, head_DV, rows['targets_BT'], weights_BT)

    differentiated = jax.jit(jax.value_and_grad(of, argnums=(0, 1, 2)))
    return differentiated(rows['hidden_BTD'], rows['head_DV'], rows['weights_BT'])


def chunked(rows_per_chunk: int):
    def function(hidden_BTD, head_DV, targets_BT, weights_BT):
        flat = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), head_DV, targets_BT.reshape(-1), weights_BT.reshape(-1)
        return cross_entropy(*flat, changed(), rows_per_chunk)[0]

    return function


@pytest.fixture(scope='module')
def wanted():
    return value_and_gradients(whole_cross_entropy, random_rows(50))


@pytest.mark.parametrize('rows_per_chunk', [4, 5, 1024])
def test_chunked_cross_entropy_equals_that_of_whole_logits(wanted, rows_per_chunk):
    rows = random_rows(50)
    found = value_and_gradients(chunked(rows_per_chunk), rows)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_targets_of_no_weight_do_not_count():
    rows = random_rows(50)
    masked = np.asarray(rows['weights_BT']) == 0
    assert 0 < masked.sum() < masked.size
    function = jax.jit(jax.value_and_grad(chunked(4), argnums=(0, 1)))
    other = dict(rows)
    other['hidden_BTD'] = jnp.where(masked[..., None], 7.0, rows['hidden_BTD'])
    other['targets_BT'] = jnp.where(masked, 0, rows['targets_BT'])
    value, (hidden, head) = function(*rows.values())
    other_value, (other_hidden, other_head) = function(*other.values())
    assert value == other_value > 0
    assert (np.asarray(hidden)[masked] == 0).all()
    assert (np.asarray(other_hidden)[masked] == 0).all()
    np.testing.assert_array_equal(head, other_head)


def test_gradient_of_the_head_is_added_up_by_a_kernel_on_hopper():
    """For an H100 in bf16: of the products, that of the weight's gradient; no TF32, no float32 operand."""
    rows, width, vocab_size = 512, 128, 384
    hidden_ND = jax.ShapeDtypeStruct((rows, width), jnp.bfloat16)
    head_DV = jax.ShapeDtypeStruct((width, vocab_size), jnp.float32)
    numbers = jax.ShapeDtypeStruct((rows,), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.float32)
    function = lambda *arrays: cross_entropy(*arrays, changed(), 256)[0]  # noqa: E731
    called = calls_on_h100(jax.grad(function, argnums=(0, 1)), hidden_ND, head_DV, *numbers)
    assert (called['kernel grouped_wgrad_bf16'], called['dot_general']) == (1, 2)


def sizes_in_program(text: str) -> set[int]:
    """Element counts of all arrays of a compiled program."""
    shapes = re.findall(r'\b(?:pred|[suf]\d+|bf16)\[([\d,]+)\]', text)
    return {int(np.prod([int(size) for size in shape.split(',')])) for shape in shapes}


def test_no_array_of_the_program_holds_all_logits():
    rows, vocab_size = random_rows(1009), 1009  # a prime: no other array has a multiple of it by chance

    def largest(rows_per_chunk: int) -> int:
        gradient = jax.jit(jax.grad(chunked(rows_per_chunk), argnums=(0, 1)))
        sizes = sizes_in_program(gradient.lower(*rows.values()).compile().as_text())
        return max(size for size in sizes if size % vocab_size == 0) // vocab_size

    assert largest(15) == 15, 'one chunk of all rows is seen'
    assert largest(4) == 8, 'the head and its gradient are the largest; a chunk has 4 rows'


def sizes_in_jaxpr(jaxpr) -> set[int]:
    """Element counts of all values of a traced program, inner ones included."""
    sizes = {int(np.prod(v.aval.shape)) for equation in jaxpr.eqns for v in equation.outvars}
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, 'eqns')):
            inner = getattr(value, 'jaxpr', value)
            if hasattr(inner, 'eqns'):
                sizes |= sizes_in_jaxpr(inner)
    return sizes


def test_no_array_of_the_objective_holds_all_logits(model, params):
    # 64 rows, a prime vocabulary, and nothing else as large as 64 rows of logits.
    large = dataclasses.replace(model, vocab_size=1009)
    head = {'embedding_VD': jnp.zeros((1009, 16)), 'head_DV': jnp.zeros((16, 1009))}
    batch = full_batch(1009)

    config = ObjectiveConfig(rows_per_chunk=24)
    gradient = jax.grad(lambda params, batch: objective(params, batch, large, config, 0.3)[0])
    # One chunk is seen; nothing is larger.
    assert max(sizes_in_jaxpr(jax.make_jaxpr(gradient)({**params, **head}, batch).jaxpr)) == 24 * 1009


def full_batch(vocab_size: int) -> dict[str, np.ndarray]:
    """A batch without padding or masks."""
    draw = np.random.default_rng(1)
    shape = (BATCH_SIZE, SEQUENCE_LENGTH + 1)
    return {
        'tokens': draw.integers(0, vocab_size, shape).astype(np.int32),
        'segments': np.ones(shape, np.int32),
        'weights': np.ones((BATCH_SIZE, SEQUENCE_LENGTH), np.float32),
    }


def test_losses_equal_the_oracle(model, objective, params):
    batch = full_batch(256)
    losses = eval_step(params, batch, model=model, config=objective)
    main, output = numpy_model.loss(params, model, batch['tokens'], None, mtp_weight=0.0, balance_weight=0.0)
    with_mtp, _ = numpy_model.loss(params, model, batch['tokens'], None, mtp_weight=1.0, balance_weight=0.0)
    np.testing.assert_allclose(losses.loss, main, rtol=1e-5)
    np.testing.assert_allclose(losses.nats, main * batch['weights'].size, rtol=1e-5)
    np.testing.assert_allclose(losses.mtp_loss, with_mtp - main, rtol=1e-5)
    np.testing.assert_allclose(losses.balance_loss, output.balance_loss_L.sum(), rtol=1e-5)
    np.testing.assert_array_equal(losses.load_LE, output.load_LE)


def row_of(documents: list[np.ndarray]) -> dict[str, np.ndarray]:
    """A row of masked documents and padding, its targets weighted where they continue a document."""
    length = SEQUENCE_LENGTH + 1
    tokens, segments = np.zeros(length, np.int32), np.zeros(length, np.int32)
    start = 0
    for number, document in enumerate(documents, 1):
        tokens[start : start + len(document)] = document
        segments[start : start + len(document)] = number
        start += len(document)
    weights = ((segments[1:] == segments[:-1]) & (segments[1:] > 0)).astype(np.float32)
    return {'tokens': tokens, 'segments': segments, 'weights': weights}


def test_packed_loss_is_the_mean_over_targets_of_separate_documents(model, objective, params):
    draw = np.random.default_rng(2)
    # Two documents end where their row ends, with no padding after them; one is too short for a second target.
    packed_lengths = [[6, 11], [17], [2, 7, 5], [9, 3, 2]]
    packed = [[draw.integers(0, 256, length) for length in lengths] for lengths in packed_lengths]
    alone = [document for documents in packed for document in documents]
    alone += [np.zeros(0, np.int64)] * (-len(alone) % BATCH_SIZE)

    def losses(rows):
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return eval_step(params, batch, model=model, config=objective)

    together = losses([row_of(documents) for documents in packed])
    nats, targets, mtp_nats, mtp_targets = 0.0, 0, 0.0, 0
    for first in range(0, len(alone), BATCH_SIZE):
        documents = alone[first : first + BATCH_SIZE]
        part = losses([row_of([document]) for document in documents])
        count = sum(max(len(document) - 2, 0) for document in documents)
        nats += float(part.nats)
        targets += sum(max(len(document) - 1, 0) for document in documents)
        mtp_nats += float(part.mtp_loss) * count
        mtp_targets += count
    np.testing.assert_allclose(together.nats, nats, rtol=1e-5)
    np.testing.assert_allclose(together.loss, nats / targets, rtol=1e-5)
    np.testing.assert_allclose(together.mtp_loss, mtp_nats / mtp_targets, rtol=1e-5)


def test_terms_are_weighted_and_masked(monkeypatch):
    """The objective over given states, against loops over positions: three rows, three modules."""
    depth, batch_size, length, width, vocab_size = 3, 3, 7, 4, 11
    draw = np.random.default_rng(3)
    hidden = draw.standard_normal((depth + 1, batch_size, length, width)).astype(np.float32)
    head = draw.standard_normal((width, vocab_size)).astype(np.float32)
    tokens = draw.integers(0, vocab_size, (batch_size, length + 1)).astype(np.int32)
    segments = np.array([[1] * 8, [1, 1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 2, 3, 3, 0, 0]], np.int32)
    weights = draw.random((batch_size, length)).astype(np.float32)

    def states(params, given_BT, config, given_segments_BT, ahead_LBT, parallel):
        return SimpleNamespace(
            hidden_BTD=jnp.asarray(hidden[0]),
            mtp_LBTD=jnp.asarray(hidden[1:]),
            load_LE=jnp.zeros((2, 4), jnp.int32),
            balance_loss_L=jnp.asarray([2.0, 5.0]),
            dropped_L=jnp.zeros(2, jnp.int32),
        )

    monkeypatch.setattr('train.loss.ds.states', states)
    model = changed(mtp_depth=depth, vocab_size=vocab_size, model_dim=width)
    config = ObjectiveConfig(
        balance_weight=0.25, rows_per_chunk=4, mtp_weight=Schedule(pieces=(('constant', 9.0, 1.0),))
    )
    batch = as_batch({'tokens': tokens, 'segments': segments, 'weights': weights})
    total, losses = jax.jit(lambda head_DV: objective({'head_DV': head_DV}, batch, model, config, 0.5))(head)

    def nats(depth: int, row: int, position: int) -> float:
        logits_V = hidden[depth, row, position].astype(np.float64) @ head
        return np.log(np.exp(logits_V).sum()) - logits_V[tokens[row, position + depth + 1]]

    positions = [(row, position) for row in range(batch_size) for position in range(length)]
    main = sum(weights[place] * nats(0, *place) for place in positions)
    per_depth = []
    for k in range(1, depth + 1):
        counted = [
            nats(k, row, i)
            for row, i in positions
            if i + k + 1 <= length and segments[row, i] == segments[row, i + k + 1] != 0
        ]
        per_depth.append(np.mean(counted))
    np.testing.assert_allclose(losses.nats, main, rtol=1e-5)
    np.testing.assert_allclose(losses.loss, main / weights.sum(), rtol=1e-5)
    np.testing.assert_allclose(losses.mtp_loss, np.mean(per_depth), rtol=1e-5)
    np.testing.assert_allclose(losses.balance_loss, 7.0)
    np.testing.assert_allclose(total, main / weights.sum() + 0.5 * np.mean(per_depth) + 0.25 * 7, rtol=1e-5)


@pytest.mark.parametrize(
    ('match', 'fields'),
    [('rows_per_chunk=0 must be positive', {'rows_per_chunk': 0}), ('balance_weight=-1.0', {'balance_weight': -1.0})],
)
def test_bad_value_is_refused(match, fields):
    with pytest.raises(ValueError, match=match):
        ObjectiveConfig(**fields)
