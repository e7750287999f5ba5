"""Expert layers as a pipeline over devices: the step is that of one device, and layers stay where they are."""

import dataclasses

import numpy as np
import pytest

import deepseek_jax as ds
from tests.support import TINY, changed
from tests.train.meshes import ALONE, OnMeshes, relative_difference
from train.parallel import MeshConfig

ROWS, LENGTH = 16, 24
MODEL = dataclasses.replace(TINY, num_layers=5, remat='paper')
EXPERTS = MeshConfig(data=2, stage=2, expert=2)
PARTS = MeshConfig(stage=4, fsdp=2, stage_parts=2, zero=3)
CONTEXT = MeshConfig(stage=2, context=2, stage_parts=2)


def batch() -> dict[str, np.ndarray]:
    """Rows of several documents, cut elsewhere in each, with padding at the end of some."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, TINY.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    cuts = np.sort(rng.integers(1, LENGTH + 4, (ROWS, 3)), axis=1)
    numbers = (np.arange(LENGTH + 1)[None, :, None] >= cuts[:, None]).sum(-1)
    segments = np.where(numbers == 3, 0, numbers + 1).astype(np.int32)
    weights = ((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)).astype(np.float32)
    return {'tokens': tokens, 'segments': segments, 'weights': weights}


STEP = OnMeshes(MODEL, batch(), balance_weight=0.1)


@pytest.mark.parametrize(
    ('config', 'microbatch_size'),
    [(EXPERTS, 8), (PARTS, None), (CONTEXT, 8)],
    ids=['experts', 'parts_zero_3', 'context'],
)
def test_loss_and_every_gradient_equal_those_of_one_device(config, microbatch_size):
    STEP.check_gradients(config, microbatch_size)


def test_each_device_holds_its_layers_and_sends_activations():
    """Layers' parameters and gradients do not travel; a row goes to each stage once, and its gradient comes back once."""
    layout = EXPERTS.make()
    layers = STEP.placed(layout)['moe_layers']['attention']['w_o_HUD']
    assert layers.addressable_shards[0].data.shape[0] == MODEL.num_moe_layers // EXPERTS.stage
    _, found = STEP.gradients(EXPERTS, 8)
    sent = sum(one.times * one.sent_bytes for one in found if one.kind == 'collective-permute')
    assert layout is not None
    # Of each part of the batch: every tick, forward and backward.
    ticks = EXPERTS.stage * EXPERTS.stage_parts + EXPERTS.stage - 1
    row = LENGTH * MODEL.model_dim * 4
    assert sent == pytest.approx(2 * (ROWS // 8) * ticks * row * 8 // layout.row_devices, rel=0.01)


def test_evaluation_equals_that_of_one_device():
    STEP.check_evaluation(PARTS)


def test_float8_is_within_its_roundings():
    """Forward, tokens are scaled one by one. Gradients of weights see other tiles of tokens."""
    model = changed(
        TINY,
        num_layers=2,
        num_dense_layers=0,
        mtp_depth=0,
        model_dim=128,
        mla={'num_heads': 2, 'value_head_dim': 64},
        moe={'ffn_dim': 128},
        precision=ds.PrecisionConfig(recipe='fp8'),
        remat='paper',
    )
    (found, _), (wanted, _) = (STEP.gradients(config, None, model) for config in (MeshConfig(stage=2), ALONE))
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-4)
    assert relative_difference(found[0], wanted[0]) < 2e-3


def test_rows_that_cannot_be_cut_are_refused():
    with pytest.raises(ValueError, match='4 rows of a device cannot be cut into 3 parts for the stages'):
        STEP.gradients(MeshConfig(stage=4, stage_parts=3))
