import math

import jax
import jax.numpy as jnp
import pytest

from train import memory
from train.memory import REMAT, Setting, divisors, explain, fitting

GIB = 2**30


def need(setting: Setting) -> float:
    """A GiB of state; for each sequence of a microbatch, half as much with each policy as with the one before."""
    return GIB * (1 + setting.microbatch_size * 4 / 2 ** REMAT.index(setting.remat))


def test_divisors_divide_every_batch():
    assert divisors([12]) == [1, 2, 3, 4, 6, 12]
    assert divisors([8, 12, 20]) == [1, 2, 4]
    assert divisors([12, 24], 4) == [4, 12]


def test_policies_are_in_the_order_of_what_they_keep():
    assert REMAT == ('none', 'paper', 'dots', 'full')


@pytest.mark.parametrize(
    ('present', 'limit', 'wanted'),
    [
        (Setting(16, 'none'), 40, Setting(8, 'none')),
        (Setting(16, 'none'), 32, Setting(4, 'none')),
        (Setting(16, 'none'), 6, Setting(1, 'none')),
        (Setting(16, 'none'), 4, Setting(1, 'paper')),
        (Setting(16, 'none'), 2.6, Setting(1, 'dots')),
        (Setting(16, 'none'), 1.6, Setting(1, 'full')),
        (Setting(16, 'none'), 1.5, None),
        (Setting(1, 'none'), 6, Setting(1, 'paper')),
        (Setting(4, 'paper'), 5.5, Setting(2, 'paper')),
        (Setting(1, 'none'), 100, Setting(1, 'paper')),
        (Setting(1, 'full'), 100, None),
    ],
)
def test_largest_smaller_microbatch_that_fits_is_found_then_another_policy(present, limit, wanted):
    assert fitting(present, divisors([16]), need, int(limit * GIB)) == wanted


def test_few_programs_are_compiled():
    asked = []

    def asking(setting):
        asked.append(setting)
        return need(setting)

    explain(Setting(1024, 'none'), divisors([1024]), asking, 100 * GIB)
    assert len(asked) == len(set(asked)) <= 6


def test_without_a_limit_the_next_one_is_proposed():
    assert fitting(Setting(16, 'none'), divisors([16]), need, None) == Setting(8, 'none')
    assert fitting(Setting(16, 'none'), divisors([16]), lambda setting: None, 40 * GIB) == Setting(8, 'none')
    # A program that does not compile for want of memory is no answer.
    compiles = lambda setting: math.inf if setting.microbatch_size > 2 else None  # noqa: E731
    assert fitting(Setting(16, 'none'), divisors([16]), compiles, None) == Setting(2, 'none')


def test_explanation_is_one_line_with_numbers():
    assert explain(Setting(16, 'none'), divisors([16]), need, 40 * GIB) == (
        "out of memory: the training step with train.microbatch_size=16 and ModelConfig.remat='none' needs 65 GiB; "
        "a device has 40 GiB; what fits is train.microbatch_size=8 and ModelConfig.remat='none': 33 GiB"
    )
    assert explain(Setting(1, 'full'), divisors([16]), need, GIB).endswith('take more devices or shorter sequences')
    unknown = explain(Setting(2, 'none'), divisors([2]), lambda setting: None, None)
    assert 'needs an unknown amount; try train.microbatch_size=1 and' in unknown


def test_exhausted_memory_is_told_from_other_errors():
    assert memory.is_exhausted(jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.'))
    assert not memory.is_exhausted(jax.errors.JaxRuntimeError('INTERNAL: no'))
    assert not memory.is_exhausted(ValueError('RESOURCE_EXHAUSTED'))


def test_needed_bytes_count_what_is_given_away_once():
    x = jnp.zeros(1000)
    kept = jax.jit(lambda x: x * 2).trace(x).lower().compile()
    given = jax.jit(lambda x: x * 2, donate_argnums=0).trace(x).lower().compile()
    assert memory.needed_bytes(kept) - memory.needed_bytes(given) == x.nbytes
    assert memory.needed_bytes(given) >= x.nbytes


def test_smallest_device_is_the_limit(monkeypatch):
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    def limit(*stats):
        monkeypatch.setattr(memory.jax, 'local_devices', lambda: [Device(each) for each in stats])
        return memory.available_bytes()

    assert limit({'bytes_limit': 5}, {'bytes_limit': 3}) == 3
    assert limit(None) is None
    assert limit({'bytes_limit': 5}, {}) is None


class Program(jax.stages.Compiled):
    """100 bytes of arguments that it gives back in place, 30 of temporaries."""

    def __init__(self):
        pass

    argument_size_in_bytes = output_size_in_bytes = alias_size_in_bytes = 100
    temp_size_in_bytes, generated_code_size_in_bytes = 30, 0

    def memory_analysis(self):
        return self


def test_two_executions_fit_where_temporaries_do_twice():
    assert memory.fits_twice(Program(), 160)
    assert not memory.fits_twice(Program(), 159)
    assert memory.fits_twice(Program(), None)
