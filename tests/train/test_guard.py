import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.guard import (
    BAD_LOSS,
    BAD_NORM,
    LARGE_NORM,
    GuardConfig,
    SkippedStepsError,
    Verdict,
    check_streak,
    judge,
    no_history,
    why_skipped,
)

CONFIG = GuardConfig(window=5, factor=3.0, min_history=3, max_in_a_row=3)


@functools.partial(jax.jit, static_argnames='config')
def judged(history, loss, norm, config=CONFIG):
    return judge(history, jnp.float32(loss), jnp.float32(norm), config)


def test_verdicts_are_those_of_the_plain_rule():
    draw = np.random.default_rng(0)
    norms = np.exp(draw.standard_normal(300) * 1.2).astype(np.float32)
    norms[draw.random(300) < 0.05] = np.nan
    history, accepted, in_a_row, reasons = no_history(CONFIG), [], 0, []
    for norm in norms:
        limit = CONFIG.factor * np.median(accepted[-CONFIG.window :]) if len(accepted) >= 3 else np.inf
        reason = BAD_NORM if np.isnan(norm) else LARGE_NORM if norm > limit else 0
        in_a_row = in_a_row + 1 if reason else 0
        if not reason:
            accepted.append(norm)
        verdict, history = judged(history, 1.0, norm)
        assert verdict.reason == reason
        assert verdict.accepted == (reason == 0)
        np.testing.assert_allclose(verdict.limit, limit, rtol=1e-6)
        assert verdict.skipped_in_a_row == history.skipped_in_a_row == in_a_row
        assert history.accepted == len(accepted)
        assert sorted(history.norms.tolist()) == sorted([*accepted[-5:], *[0.0] * (5 - len(accepted))])
        reasons.append(reason)
    assert {0, BAD_NORM, LARGE_NORM} == set(reasons)
    assert max(np.diff(np.flatnonzero(np.array(reasons) == 0))) > 2, 'some are skipped in a row'


@pytest.mark.parametrize(
    ('loss', 'norm', 'reason', 'text'),
    [
        (np.nan, 1.0, BAD_LOSS, 'the loss is not finite'),
        (np.inf, np.nan, BAD_LOSS, 'the loss is not finite'),
        (1.0, np.inf, BAD_NORM, 'the gradient norm is not finite'),
        (1.0, np.nan, BAD_NORM, 'the gradient norm is not finite'),
        (1.0, 1e30, 0, None),
    ],
)
def test_what_is_not_finite_is_skipped_from_the_first_step_on(loss, norm, reason, text):
    verdict, history = judged(no_history(CONFIG), loss, norm)
    assert verdict.reason == reason
    assert why_skipped(verdict, norm) == text
    assert history.accepted == (reason == 0)


def test_outlier_is_reported_with_its_limit():
    verdict = Verdict(np.int32(LARGE_NORM), np.float32(2.5), np.int32(1))
    assert why_skipped(verdict, 40.0) == 'the gradient norm 40 exceeds the limit 2.5'


def test_as_many_in_a_row_as_configured_end_the_run():
    for in_a_row in (0, 1, 2):
        check_streak(Verdict(np.int32(1), np.float32(1), np.int32(in_a_row)), 7, 'because', CONFIG)
    with pytest.raises(SkippedStepsError, match='the last 3 steps were skipped .*; of step 7 because; ') as error:
        check_streak(Verdict(np.int32(1), np.float32(1), np.int32(3)), 7, 'because', CONFIG)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('change', 'match'),
    [
        ({'window': 0}, 'window=0 must be positive'),
        ({'max_in_a_row': 0}, 'max_in_a_row=0 must be positive'),
        ({'min_history': 200}, 'min_history=200 exceeds window=128'),
        ({'factor': 1.0}, 'factor=1.0 must be above 1'),
        ({'factor': float('nan')}, 'factor=nan must be above 1'),
    ],
)
def test_bad_value_is_refused(change, match):
    with pytest.raises(ValueError, match=match):
        GuardConfig(**change)
