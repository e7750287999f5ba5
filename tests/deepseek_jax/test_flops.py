"""Work counted by hand from the shapes in the report, layer by layer, apart from the parameter tree."""

import dataclasses

import pytest

import deepseek_jax as ds
from deepseek_jax import flops
from tests.support import TINY

D, H, N, R, U, Q, C = 7168, 128, 128, 64, 128, 1536, 512
DENSE, EXPERT, VOCABULARY, TOP_K, EXPERTS = 18432, 2048, 129280, 8, 256
V3 = ds.ModelConfig(
    vocab_size=VOCABULARY,
    num_layers=61,
    num_dense_layers=3,
    model_dim=D,
    dense_ffn_dim=DENSE,
    mla=ds.MLAConfig(num_heads=H, nope_head_dim=N, rope_head_dim=R, value_head_dim=U, kv_rank=C, query_rank=Q),
    moe=ds.MoEConfig(
        num_experts=EXPERTS, num_shared_experts=1, top_k=TOP_K, num_groups=8, top_groups=4, ffn_dim=EXPERT
    ),
    mtp_depth=1,
)
ATTENTION = D * Q + Q * H * (N + R) + D * (C + R) + C * H * (N + U) + H * U * D
MOE_BLOCK = ATTENTION + 3 * D * EXPERT * (TOP_K + 1) + D * EXPERTS


def core(length: int) -> float:
    """Scores and their product with the values, forward (2 operations) and backward (4): half of the keys are seen."""
    return 6 * H * (N + R + U) * length / 2


def test_v3_matrices_that_multiply_a_token():
    assert ATTENTION == 187_105_280
    head = D * VOCABULARY
    main = 3 * (ATTENTION + 3 * D * DENSE) + 58 * MOE_BLOCK + head
    assert flops.count_parameters(V3).active == main
    assert main == pytest.approx(36.62e9, abs=0.005e9)


@pytest.mark.parametrize('length', [4096, 32768])
def test_v3_work_a_token_with_and_without_its_module(length):
    main = 3 * (ATTENTION + 3 * D * DENSE) + 58 * MOE_BLOCK + D * VOCABULARY
    module = 2 * D * D + MOE_BLOCK + D * VOCABULARY
    plain = flops.train_flops_per_token(V3, length)
    assert plain == pytest.approx(6 * main + 61 * core(length), rel=1e-12)
    assert flops.train_flops_per_token(V3, length, mtp=True) == pytest.approx(
        plain + 6 * module + core(length), rel=1e-12
    )


def test_two_modules_take_twice_the_work_of_one():
    work = [
        flops.train_flops_per_token(dataclasses.replace(TINY, mtp_depth=depth), 64, mtp=True) for depth in (0, 1, 2)
    ]
    assert work[0] == flops.train_flops_per_token(TINY, 64)
    assert work[2] - work[1] == work[1] - work[0] > 0


def test_published_utilisation():
    """arXiv 2505.09343, table 4: 1,542 tokens a second a GPU are 38.9 % of the peak, counted causally."""
    work = flops.train_flops_per_token(V3, 4096)
    assert flops.mfu(work, 1542.0, 'NVIDIA H800') == pytest.approx(0.389, abs=0.002)
    assert flops.mfu(work, 2048 * 1542.0, 'NVIDIA H800', devices=2048) == pytest.approx(0.389, abs=0.002)


def test_utilisation_of_known_devices_alone():
    assert flops.mfu(989.4e12, 1.0, 'NVIDIA H100 80GB HBM3') == flops.mfu(989.4e12, 1.0, 'NVIDIA H200') == 1
    for kind in ('cpu', 'NVIDIA H100 PCIe', 'NVIDIA H100 80GB HBM3 MIG 1g.10gb'):
        assert flops.mfu(989.4e12, 1.0, kind) is None
