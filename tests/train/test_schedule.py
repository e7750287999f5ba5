import dataclasses
import itertools
import math

import pytest

from configs import loader
from tests.conftest import ROOT
from train.loss import ObjectiveConfig
from train.optimizer import OptimizerConfig
from train.schedule import BatchRamp, LengthRamp, Schedule, total_tokens


@pytest.fixture(scope='module')
def published() -> tuple[OptimizerConfig, ObjectiveConfig, BatchRamp]:
    """The schedules of the published pretraining [4.2]."""
    loader.parse(ROOT / 'configs' / 'train' / 'v3_671b.gin')
    return loader.call(OptimizerConfig), loader.call(ObjectiveConfig), loader.call(BatchRamp)


@pytest.mark.parametrize(
    ('tokens', 'rate'),
    [
        (0, 2.2e-4),
        (9.99e12, 2.2e-4),
        (10e12, 2.2e-4),
        (12.15e12, (2.2e-4 + 2.2e-5) / 2),
        (11.075e12, 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + math.sqrt(0.5)) / 2),
        (14.3e12, 2.2e-5),
        (14.4e12, 2.2e-5),
        (14.632e12, 2.2e-5),
        (14.634e12, 7.3e-6),
        (14.7e12, 7.3e-6),
        (14.9e12, 7.3e-6),
    ],
)
def test_published_learning_rate(published, tokens, rate):
    assert published[0].learning_rate(int(tokens), int(14.8e12)) == pytest.approx(rate, rel=1e-9)


def test_published_loss_weights(published):
    objective = published[1]
    at = [int(tokens) for tokens in (0, 9.99e12, 10.01e12, 14.29e12, 14.31e12, 14.8e12)]
    assert [objective.mtp_weight(tokens, 1) for tokens in at] == [0.3, 0.3, 0.1, 0.1, 0.1, 0.1]
    assert [objective.bias_rate(tokens, 1) for tokens in at] == [1e-3, 1e-3, 1e-3, 1e-3, 0.0, 0.0]
    assert objective.balance_weight == 1e-4


def test_published_schedules_are_the_defaults_of_the_objective(published):
    assert published[1] == ObjectiveConfig()


def test_published_batch_ramp(published):
    ramp = published[2]
    assert ramp(0, 15360) == 3072
    assert [ramp(int(tokens), 15360) for tokens in (469e9, 470e9, 14e12)] == [15360] * 3
    sizes = [ramp(int(469e9 * k / 5000), 15360) for k in range(5001)]
    assert all(a <= b for a, b in itertools.pairwise(sizes))
    assert all(size % ramp.multiple_of == 0 for size in sizes)
    # On the straight line, rounded down to a multiple.
    assert all(0 <= 3072 + 12288 * k / 5000 - size < ramp.multiple_of for k, size in enumerate(sizes))


def test_published_run_is_the_first_that_reaches_all_its_tokens(published):
    steps = 243761
    assert 'TOTAL_STEPS = 243761\n' in (ROOT / 'configs' / 'train' / 'v3_671b.gin').read_text()
    tokens = total_tokens(steps, 15360, 4096, published[2])
    assert tokens - 15360 * 4096 < 14.8e12 <= tokens


def test_unit_run_is_a_share_of_all_tokens():
    pieces = (('linear', 1.0, 0.2), ('constant', 0.5, 0.3), ('cosine', 0.1, 0.5))
    in_tokens = tuple((shape, value, length * 5000) for shape, value, length in pieces)
    for tokens in range(0, 6000, 37):
        expected = Schedule(pieces=in_tokens)(tokens, 999)
        assert Schedule(pieces=pieces, unit='run')(tokens, 5000) == pytest.approx(expected, rel=1e-12)


def test_linear_starts_from_the_value_before():
    schedule = Schedule(pieces=(('linear', 3.0, 100.0), ('linear', 1.0, 100.0)), start=1.0)
    assert [schedule(tokens, 1) for tokens in (0, 50, 100, 150, 200, 999)] == [1.0, 2.0, 3.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ('match', 'fields'),
    [
        ('at least one', {'pieces': ()}),
        ("'constant', 1.0, 0.0.*must be positive", {'pieces': (('constant', 1.0, 0.0),)}),
        ('at most 1', {'pieces': (('constant', 1.0, 0.6), ('constant', 1.0, 0.5)), 'unit': 'run'}),
    ],
)
def test_bad_schedule_is_refused(match, fields):
    with pytest.raises(ValueError, match=match):
        Schedule(**fields)


@pytest.mark.parametrize(('field', 'type_'), [('start', int), ('tokens', float), ('multiple_of', int)])
def test_bad_batch_ramp_is_refused(field, type_):
    with pytest.raises(ValueError, match=f'BatchRamp.{field}={type_(0)} must be positive'):
        dataclasses.replace(BatchRamp(start=4, tokens=100.0, multiple_of=2), **{field: type_(0)})


@pytest.mark.parametrize(
    'ramp', [None, BatchRamp(start=2, tokens=300.0, multiple_of=2), BatchRamp(start=3, tokens=1e9, multiple_of=4)]
)
@pytest.mark.parametrize('steps', [1, 7, 40])
def test_total_tokens_are_those_of_all_steps(ramp, steps):
    tokens = 0
    for _ in range(steps):
        tokens += (10 if ramp is None else ramp(tokens, 10)) * 8
    assert total_tokens(steps, 10, 8, ramp) == tokens


def test_sequences_grow_with_the_tokens_seen():
    ramp = LengthRamp(pieces=((8, 100.0), (32, 300.0)))
    assert [ramp(tokens, 64) for tokens in (0, 99, 100, 299, 300, 10**9)] == [8, 8, 32, 32, 64, 64]
    assert ramp.lengths == (8, 32)


@pytest.mark.parametrize(
    ('pieces', 'match'),
    [
        ((), 'must hold at least one'),
        (((0, 10.0),), 'lengths must be positive and ascending'),
        (((8, 10.0), (8, 20.0)), 'lengths must be positive and ascending'),
        (((8, 10.0), (16, 10.0)), 'tokens must be positive and ascending'),
    ],
)
def test_bad_length_ramp_is_refused(pieces, match):
    with pytest.raises(ValueError, match=match):
        LengthRamp(pieces=pieces)
