import subprocess
import sys
from pathlib import Path

import pytest

from infer.request import Request, SamplingParams

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('temperature', -0.1),
        ('temperature', float('nan')),
        ('top_k', -1),
        ('top_k', 2**31),
        ('top_p', 0.0),
        ('top_p', 1.01),
        ('min_p', -0.1),
        ('min_p', 1.1),
        ('repetition_penalty', 0.0),
        ('repetition_penalty', float('inf')),
        ('max_tokens', 0),
        ('stop', ('',)),
        ('seed', -1),
        ('seed', 2**64),
    ],
)
def test_sampling_params_name_the_wrong_value_in_one_line(name, value):
    with pytest.raises(ValueError, match=name) as error:
        SamplingParams(**{name: value})
    assert str(value).strip("(),'") in str(error.value)
    assert '\n' not in str(error.value)


def test_sampling_params_reject_values_of_a_wrong_type():
    # In a process of its own: here the annotations are checked before the constructor is.
    code = """
from infer.request import SamplingParams
wrong = dict(
    temperature=['hot', True, None], top_k=[1.5, True], top_p=[None], min_p=['0'], repetition_penalty=[()],
    max_tokens=['7', None], stop=['end', (3,), 3], seed=[0.5, True], ignore_eos=[1, None],
)
for name, values in wrong.items():
    for value in values:
        try:
            SamplingParams(**{name: value})
        except ValueError as error:
            assert f'{name}={value!r} must be' in str(error), error
        else:
            raise AssertionError(f'{name}={value!r}')
"""
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)


def test_sampling_params_accept_the_borders():
    SamplingParams(temperature=0, top_k=0, top_p=1, min_p=1, repetition_penalty=0.5, max_tokens=1, seed=2**64 - 1)


def test_request_freezes_its_prompt_and_rejects_an_empty_one():
    assert Request([1, 2]).prompt_ids == (1, 2)
    with pytest.raises(ValueError, match='at least one'):
        Request([])
    with pytest.raises(TypeError):
        Request([1.5])


def test_request_module_imports_no_jax():
    code = 'import sys, infer.request; sys.exit("jax" in sys.modules or "deepseek_jax" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0
