import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax import dispatch

TOKENS, TOP_K, EXPERTS, WIDTH = 13, 3, 6, 5


def example(seed=0):
    rng = np.random.default_rng(seed)
    experts_MK = jnp.asarray(np.stack([rng.choice(EXPERTS - 1, TOP_K, replace=False) for _ in range(TOKENS)]))
    x_MD = jnp.asarray(rng.standard_normal((TOKENS, WIDTH)), jnp.float32)
    gates_MK = jnp.asarray(rng.random((TOKENS, TOP_K)), jnp.float32)
    return experts_MK, x_MD, gates_MK


def test_permute_sorts_rows_by_expert_and_keeps_token_order():
    experts_MK, x_MD, _ = example()
    plan = dispatch.plan(experts_MK, EXPERTS)
    np.testing.assert_array_equal(plan.group_sizes_E, np.bincount(np.asarray(experts_MK).ravel(), minlength=EXPERTS))
    assert plan.group_sizes_E[EXPERTS - 1] == 0
    rows = [x_MD[m] for e in range(EXPERTS) for m in range(TOKENS) if e in experts_MK[m]]
    np.testing.assert_array_equal(dispatch.permute(x_MD, plan), np.stack(rows))


def test_permute_then_unpermute_is_the_weighted_identity():
    experts_MK, x_MD, gates_MK = example()
    plan = dispatch.plan(experts_MK, EXPERTS)
    out_MD = dispatch.unpermute(dispatch.permute(x_MD, plan), plan, gates_MK)
    np.testing.assert_allclose(out_MD, x_MD * gates_MK.sum(-1, keepdims=True), rtol=1e-6)


def test_gradients_equal_those_of_plain_indexing():
    experts_MK, x_MD, gates_MK = example()
    plan = dispatch.plan(experts_MK, EXPERTS)
    w_JD = jnp.asarray(np.random.default_rng(1).standard_normal((TOKENS * TOP_K, WIDTH)), jnp.float32)

    def ours(x_MD, gates_MK):
        y_JD = jnp.tanh(dispatch.permute(x_MD, plan) * w_JD)
        return jnp.sum(jnp.square(dispatch.unpermute(y_JD, plan, gates_MK)))

    def plain(x_MD, gates_MK):
        y_JD = jnp.tanh(jnp.repeat(x_MD, TOP_K, axis=0) * w_JD[plan.inverse_J])
        y_MKD = y_JD.reshape(TOKENS, TOP_K, WIDTH)
        return jnp.sum(jnp.square(jnp.sum(y_MKD * gates_MK[..., None], axis=1)))

    for got, wanted in zip(
        jax.grad(ours, (0, 1))(x_MD, gates_MK), jax.grad(plain, (0, 1))(x_MD, gates_MK), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
