import dataclasses
import typing

import pytest

import deepseek_jax as ds
from deepseek_jax.config import check_values, from_dict, to_dict
from tests.support import TINY, changed


@pytest.mark.parametrize(
    ('build', 'error', 'message'),
    [
        (lambda: changed(moe={'top_k': 5}), ValueError, 'top_k=5 exceeds the 4 experts in the allowed groups'),
        (lambda: changed(moe={'top_groups': 5}), ValueError, 'top_groups=5 exceeds num_groups=4'),
        (lambda: changed(moe={'num_experts': 9}), ValueError, 'num_experts=9 must be a multiple of num_groups=4'),
        (lambda: changed(moe={'gate_scale': 0.0}), ValueError, 'gate_scale=0.0 must be positive'),
        (lambda: changed(mla={'rope_head_dim': 5}), ValueError, 'rope_head_dim=5 must be even'),
        (lambda: changed(mla={'kv_rank': 0}), ValueError, 'kv_rank=0 must be positive'),
        (lambda: changed(num_dense_layers=4), ValueError, r'num_dense_layers=4 must lie in 0\.\.'),
        (lambda: dataclasses.replace(TINY, moe=None), ValueError, 'moe=None needs every layer dense'),
        (lambda: changed(mtp_depth=-1), ValueError, 'mtp_depth=-1 must not be negative'),
        (lambda: ds.YarnConfig(scale=0.5), ValueError, r'scale=0\.5 must be at least 1'),
        (lambda: ds.YarnConfig(beta_slow=64.0), ValueError, r'beta_slow=64\.0 exceeds beta_fast=32\.0'),
        (lambda: ds.init_cache(TINY, 0, 8), ValueError, 'batch_size=0'),
    ],
)
def test_bad_value_is_named_with_its_rule(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ('name', 'value', 'message'),
    [
        ('num_layers', 'three', "ModelConfig.num_layers='three' must be of type int"),
        ('num_layers', True, 'num_layers=True must be of type int'),
        ('num_layers', 2.0, r'num_layers=2\.0 must be of type int'),
        ('init_std', '1', "init_std='1' must be of type float"),
        ('remat', 'some', "remat='some' must be of type Literal"),
        ('moe', 3, r'moe=3 must be of type .*MoEConfig \| None'),
    ],
)
def test_value_of_a_wrong_type_is_named(name, value, message):
    """Checked apart from the constructor, whose annotations the test session checks already."""
    with pytest.raises(TypeError, match=message):
        check_values('ModelConfig', typing.get_type_hints(ds.ModelConfig), {name: value})


def test_check_values_takes_ints_as_floats_and_nested_tuples():
    hint = tuple[tuple[str, float], ...]
    check_values('x', {'pieces': hint, 'scale': float}, {'pieces': (('a', 1), ('b', 2.5)), 'scale': 3})
    with pytest.raises(TypeError, match='pieces'):
        check_values('x', {'pieces': hint}, {'pieces': (('a', 'b'),)})


def test_dict_round_trip():
    config = changed(rope=ds.RopeConfig(yarn=ds.YarnConfig(scale=4.0)))
    assert from_dict(to_dict(config)) == config
    with pytest.raises(ValueError, match="ModelConfig has no field 'depth'"):
        from_dict(to_dict(config) | {'depth': 3})
    without = {name: value for name, value in to_dict(config).items() if name != 'model_dim'}
    with pytest.raises(ValueError, match=r"ModelConfig needs \['model_dim'\]"):
        from_dict(without)


def test_softmax_scale_grows_with_yarn():
    plain = TINY.softmax_scale
    assert plain == pytest.approx((8 + 4) ** -0.5)
    extended = changed(rope=ds.RopeConfig(yarn=ds.YarnConfig(scale=40.0))).softmax_scale
    assert extended == pytest.approx(plain * (0.1 * 3.6888794541139363 + 1) ** 2)
