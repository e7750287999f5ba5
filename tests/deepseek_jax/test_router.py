import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_jax as ds
from deepseek_jax import ops, router

MOE = ds.MoEConfig(
    num_experts=16, num_shared_experts=0, top_k=4, num_groups=4, top_groups=2, ffn_dim=8, gate_scale=2.5
)  # fmt: skip


def example(moe=MOE, tokens=64, skew=0.0, seed=0):
    rng = np.random.default_rng(seed)
    params = {
        'w_router_DE': jnp.asarray(rng.standard_normal((8, moe.num_experts)), jnp.float32),
        'router_bias_E': jnp.asarray(0.3 * rng.standard_normal(moe.num_experts), jnp.float32),
    }
    x_MD = jnp.asarray(rng.standard_normal((tokens, 8)) + skew, jnp.float32)
    return params, x_MD


def test_route_equals_selection_by_hand():
    params, x_MD = example()
    routing = router.route(params, x_MD, MOE)
    affinity = 1 / (1 + np.exp(-np.asarray(x_MD, np.float64) @ np.asarray(params['w_router_DE'], np.float64)))
    np.testing.assert_allclose(routing.affinity_ME, affinity, atol=1e-6)
    size = MOE.num_experts // MOE.num_groups
    for token, s in enumerate(affinity):
        biased = s + np.asarray(params['router_bias_E'])
        group_scores = [np.sort(biased[g * size : (g + 1) * size])[-2:].sum() for g in range(MOE.num_groups)]
        groups = set(np.argsort(group_scores)[-MOE.top_groups :])
        allowed = [e for e in range(MOE.num_experts) if e // size in groups]
        chosen = sorted(allowed, key=lambda e: -biased[e])[: MOE.top_k]
        assert set(np.asarray(routing.experts_MK[token])) == set(chosen)
        gates = dict(zip(np.asarray(routing.experts_MK[token]), np.asarray(routing.gates_MK[token]), strict=True))
        for expert in chosen:
            assert gates[expert] == pytest.approx(2.5 * s[expert] / s[chosen].sum(), rel=1e-5)


def test_product_of_bfloat16_activations_loses_nothing_of_the_weight():
    rng = np.random.default_rng(0)
    x_MD = jnp.asarray(rng.standard_normal((64, 512)), jnp.bfloat16)
    w_DE = jnp.asarray(rng.standard_normal((512, 32)) * np.exp(rng.standard_normal((512, 32))), jnp.float32)
    d_ME = jnp.asarray(rng.standard_normal((64, 32)), jnp.float32)
    x, w, d = (np.asarray(a, np.float64) for a in (x_MD, w_DE, d_ME))
    logits_ME, pull = jax.jit(lambda x, w: jax.vjp(ops.router_product, x, w))(x_MD, w_DE)
    d_x_MD, d_w_DE = pull(d_ME)
    assert (logits_ME.dtype, d_x_MD.dtype, d_w_DE.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    # In units of the sums of magnitudes: float32 sums, and one rounding of d_x to bfloat16.
    for got, wanted, size, tolerance in (
        (logits_ME, x @ w, abs(x) @ abs(w), 1e-6),
        (d_w_DE, x.T @ d, abs(x).T @ abs(d), 1e-6),
        (d_x_MD, d @ w.T, abs(d) @ abs(w).T, 2**-8),
    ):
        assert np.max(np.abs(np.asarray(got, np.float64) - wanted) / size) < tolerance
    rounded = np.abs(x @ np.asarray(w_DE.astype(jnp.bfloat16), np.float64) - x @ w) / (abs(x) @ abs(w))
    assert rounded.max() > 1e-4  # what casting the weight would cost


def test_groups_limit_where_experts_are_chosen():
    params, x_MD = example(tokens=200)
    experts_MK = np.asarray(router.route(params, x_MD, MOE).experts_MK)
    assert max(len(set(row // 4)) for row in experts_MK) == MOE.top_groups
    free = ds.MoEConfig(**{**MOE.__dict__, 'num_groups': 1, 'top_groups': 1})
    assert max(len(set(row // 4)) for row in np.asarray(router.route(params, x_MD, free).experts_MK)) > MOE.top_groups


def test_selection_of_negative_scores_stays_inside_the_groups():
    scores_ME = jnp.asarray(-1.0 - np.random.default_rng(0).random((32, 16)), jnp.float32)
    experts_MK = np.asarray(router.select_experts(scores_ME, MOE))
    assert max(len(set(row // 4)) for row in experts_MK) == MOE.top_groups


def test_bias_moves_selection_and_gets_no_gradient():
    params, x_MD = example()
    pushed = params | {'router_bias_E': params['router_bias_E'].at[3].set(100.0)}
    assert np.all(np.any(np.asarray(router.route(pushed, x_MD, MOE).experts_MK) == 3, axis=1))
    gradients = jax.grad(lambda p: router.route(p, x_MD, MOE).gates_MK[:, 0].sum())(params)
    assert jnp.all(gradients['router_bias_E'] == 0)
    assert jnp.abs(gradients['w_router_DE']).max() > 1e-3


def test_bias_update_evens_out_skewed_load_without_auxiliary_loss():
    """With inputs that favour some experts, maximum over mean falls below 1.2 within 500 updates."""
    moe = ds.MoEConfig(
        num_experts=16, num_shared_experts=0, top_k=2, num_groups=4, top_groups=2, ffn_dim=8, gate_scale=1.0
    )  # fmt: skip
    rng = np.random.default_rng(0)
    w_router_DE = jnp.asarray(0.3 * rng.standard_normal((8, 16)), jnp.float32)

    @jax.jit
    def update(bias_E, key):
        x_MD = jax.random.normal(key, (2048, 8)) + 1.5
        routing = router.route({'w_router_DE': w_router_DE, 'router_bias_E': bias_E}, x_MD, moe)
        load_E = router.expert_load(routing.experts_MK, 16)
        return router.update_bias(bias_E[None], load_E[None], 0.001)[0], load_E.max() / load_E.mean()

    bias_E, spread = jnp.zeros(16), []
    for key in jax.random.split(jax.random.key(0), 500):
        bias_E, max_over_mean = update(bias_E, key)
        spread.append(float(max_over_mean))
    assert spread[0] > 3
    assert np.mean(spread[-20:]) < 1.2


def test_balance_loss_is_one_when_even_and_larger_when_skewed():
    even = jnp.tile(jnp.eye(16)[None], (2, 4, 1)) * 0.5 + 0.25
    assert float(router.balance_loss(even, 1)) == pytest.approx(1.0, rel=1e-5)
    skewed = jnp.broadcast_to(jnp.linspace(0.1, 0.9, 16), (2, 64, 16))
    assert float(router.balance_loss(skewed, 4)) > 1.5


def test_expert_load_counts_every_choice():
    experts_MK = jnp.asarray([[0, 3], [3, 1], [3, 0]])
    np.testing.assert_array_equal(router.expert_load(experts_MK, 5), [2, 1, 0, 3, 0])
