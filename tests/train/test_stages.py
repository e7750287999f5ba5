"""Expert layers as a pipeline over devices: the step is that of one device, and layers stay where they are."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import deepseek_jax as ds
from tests.support import TINY, changed, random_params
from train import parallel
from train.collectives import Collective, collectives
from train.loss import ObjectiveConfig
from train.parallel import Layout, MeshConfig
from train.step import as_batch, batch_gradients, eval_step

ROWS, LENGTH = 16, 24
MODEL = dataclasses.replace(TINY, num_layers=5, remat='paper')
OBJECTIVE = ObjectiveConfig(rows_per_chunk=64, balance_weight=0.1)
EXPERTS = MeshConfig(data=2, stage=2, expert=2)
PARTS = MeshConfig(stage=4, fsdp=2, stage_parts=2, zero=3)
CONTEXT = MeshConfig(stage=2, context=2, stage_parts=2)


@functools.cache
def batch() -> dict[str, np.ndarray]:
    """Rows of several documents, cut elsewhere in each, with padding at the end of some."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, TINY.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    cuts = np.sort(rng.integers(1, LENGTH + 4, (ROWS, 3)), axis=1)
    numbers = (np.arange(LENGTH + 1)[None, :, None] >= cuts[:, None]).sum(-1)
    segments = np.where(numbers == 3, 0, numbers + 1).astype(np.int32)
    weights = ((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)).astype(np.float32)
    return {'tokens': tokens, 'segments': segments, 'weights': weights}


def placed(layout: Layout | None, model: ds.ModelConfig) -> dict:
    params = random_params(model)
    return jax.device_put(params, parallel.places(params, params, layout))


@functools.cache
def gradients(
    config: MeshConfig, microbatch_size: int | None = None, model: ds.ModelConfig = MODEL
) -> tuple[tuple, list[Collective]]:
    """Gradients, value and terms, as numpy, and what devices exchange for them."""
    layout = config.make()
    compute = jax.jit(
        lambda params, batch: batch_gradients(params, batch, 0.5, model, OBJECTIVE, microbatch_size, layout)
    )
    arguments = placed(layout, model), as_batch(batch(), layout)
    program = compute.lower(*arguments).compile()
    return jax.device_get(program(*arguments)), collectives(program.as_text() or '')


def assert_close(found: tuple, wanted: tuple, tolerance: float = 1e-5) -> None:
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * np.abs(y).max()), found, wanted
    )


@pytest.mark.parametrize(
    ('config', 'microbatch_size'),
    [(EXPERTS, 8), (PARTS, None), (CONTEXT, 8)],
    ids=['experts', 'parts_zero_3', 'context'],
)
def test_loss_and_every_gradient_equal_those_of_one_device(config, microbatch_size):
    (found, _), (wanted, _) = gradients(config, microbatch_size), gradients(MeshConfig())
    assert_close(found, wanted)
    np.testing.assert_array_equal(found[2].load_LE, wanted[2].load_LE)
    assert found[2].dropped == 0


def test_each_device_holds_its_layers_and_sends_activations():
    """Layers' parameters and gradients do not travel; a row goes to each stage once, and its gradient comes back once."""
    layout = EXPERTS.make()
    layers = placed(layout, MODEL)['moe_layers']['attention']['w_o_HUD']
    assert layers.addressable_shards[0].data.shape[0] == MODEL.num_moe_layers // EXPERTS.stage
    _, found = gradients(EXPERTS, 8)
    sent = sum(one.times * one.sent_bytes for one in found if one.kind == 'collective-permute')
    assert layout is not None
    # Of each part of the batch: every tick, forward and backward.
    ticks = EXPERTS.stage * EXPERTS.stage_parts + EXPERTS.stage - 1
    row = LENGTH * MODEL.model_dim * 4
    assert sent == pytest.approx(2 * (ROWS // 8) * ticks * row * 8 // layout.row_devices, rel=0.01)


def test_evaluation_equals_that_of_one_device():
    layout = PARTS.make()
    found = eval_step(placed(layout, MODEL), as_batch(batch(), layout), model=MODEL, config=OBJECTIVE, layout=layout)
    wanted = eval_step(placed(None, MODEL), as_batch(batch()), model=MODEL, config=OBJECTIVE)
    assert_close(found, wanted)


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
    (found, _), (wanted, _) = (gradients(config, None, model) for config in (MeshConfig(stage=2), MeshConfig()))
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-4)
    x, y = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree[0])]) for tree in (found, wanted))
    assert 1 - 2 * np.vdot(x, y) / (np.vdot(x, x) + np.vdot(y, y)) < 2e-3


def test_rows_that_cannot_be_cut_are_refused():
    with pytest.raises(ValueError, match='4 rows of a device cannot be cut into 3 parts for the stages'):
        gradients(MeshConfig(stage=4, stage_parts=3))
