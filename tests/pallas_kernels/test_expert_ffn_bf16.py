"""Routed experts in bfloat16 against the same layer in float32. A product of bfloat16 errs by about 2**-9."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.expert_ffn_bf16.api import expert_ffn_bf16
from pallas_kernels.routes import routes
from tests.pallas_kernels.test_expert_ffn_fp8 import EXPERTS, F, difference, example, plain, with_gradients


@pytest.mark.parametrize('implementation', ['reference', pytest.param('pallas', marks=pytest.mark.gpu)])
def test_output_and_every_gradient_are_those_of_float32_to_the_precision_of_bfloat16(implementation):
    x_TD, gates_TK, experts_TK, weights, d_TD = example()
    if implementation == 'pallas':  # F in multiples of 64
        weights = tuple(jnp.pad(w, [(0, 32 if size == F else 0) for size in w.shape]) for w in weights)

    def ours(x_TD, gates_TK, experts_TK, weights):
        made = routes(experts_TK, EXPERTS)
        return expert_ffn_bf16(x_TD, gates_TK, made, weights, implementation=implementation)

    found = [with_gradients(layer, x_TD, gates_TK, experts_TK, weights, d_TD) for layer in (ours, plain)]
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found[0]), jax.tree.leaves(found[1]), strict=True):
        assert x.shape == y.shape
        assert 1e-8 < difference(x, y) < 1e-4, path
    assert [leaf.dtype for leaf in jax.tree.leaves(found[0])] == [jnp.bfloat16] * 2 + [jnp.float32] * 4
    assert not np.any(found[0][3][0][EXPERTS - 1])


def test_arguments_that_do_not_fit_are_refused():
    x_TD, gates_TK, experts_TK, weights, _ = example()
    made = routes(experts_TK, EXPERTS)
    with pytest.raises(ValueError, match='x is float32, it must be bfloat16'):
        expert_ffn_bf16(x_TD.astype(jnp.float32), gates_TK, made, weights)
    with pytest.raises(ValueError, match=r'x is \(150, 256\) and routes lead to 5 experts'):
        expert_ffn_bf16(x_TD, gates_TK, made, tuple(w[:4] for w in weights))
