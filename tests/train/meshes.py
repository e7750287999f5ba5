"""A step on meshes of CPU devices, held against that of one device."""

import functools
from typing import Any

import jax
import numpy as np

import deepseek_jax as ds
from tests.support import random_params
from train import parallel
from train.collectives import Collective, collectives
from train.loss import ObjectiveConfig
from train.parallel import Layout, MeshConfig
from train.step import as_batch, batch_gradients, eval_step

ALONE = MeshConfig()
MTP_WEIGHT = 0.5


class OnMeshes:
    """A model and a batch.

    Attributes:
      model: whose parameters are random.
      batch: `tokens`, `segments` and `weights`, as numpy.
      objective: with a balance loss that shows, if `balance_weight` is larger than usual.
    """

    def __init__(self, model: ds.ModelConfig, batch: dict[str, np.ndarray], balance_weight: float = 1e-4) -> None:
        self.model, self.batch = model, batch
        self.objective = ObjectiveConfig(rows_per_chunk=64, balance_weight=balance_weight)

    def placed(self, layout: Layout | None, model: ds.ModelConfig | None = None) -> dict[str, Any]:
        """The parameters where a layout has them."""
        params = random_params(model or self.model)
        return jax.device_put(params, parallel.places(params, params, layout))

    @functools.cache  # noqa: B019
    def gradients(
        self, config: MeshConfig, microbatch_size: int | None = None, model: ds.ModelConfig | None = None
    ) -> tuple[tuple, list[Collective]]:
        """Gradients, value and terms, as numpy, and what devices exchange for them."""
        layout, model = config.make(), model or self.model

        def compute(params: Any, batch: Any) -> tuple:
            return batch_gradients(params, batch, MTP_WEIGHT, model, self.objective, microbatch_size, layout)

        arguments = self.placed(layout, model), as_batch(self.batch, layout)
        program = jax.jit(compute).lower(*arguments).compile()
        return jax.device_get(program(*arguments)), collectives(program.as_text() or '')

    def check_gradients(
        self, config: MeshConfig, microbatch_size: int | None = None, model: ds.ModelConfig | None = None
    ) -> None:
        """Asserts that loss, gradients and loads are those of one device with the whole batch at once."""
        (found, _), (wanted, _) = self.gradients(config, microbatch_size, model), self.gradients(ALONE)
        assert_close(found, wanted)
        np.testing.assert_array_equal(found[2].load_LE, wanted[2].load_LE)
        assert found[2].dropped == 0

    def check_evaluation(self, config: MeshConfig) -> None:
        """Asserts that an evaluation finds what one device finds."""

        def found(layout: Layout | None) -> Any:
            batch = as_batch(self.batch, layout)
            return eval_step(self.placed(layout), batch, model=self.model, config=self.objective, layout=layout)

        assert_close(found(config.make()), found(None))


def assert_close(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    """Asserts that two trees of arrays are equal but for a share of each array's largest value."""
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * np.abs(y).max()), found, wanted
    )


def relative_difference(found: Any, wanted: Any) -> float:
    """How far two trees of arrays are from one direction and length, 0 to 2."""
    x, y = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (found, wanted))
    return float(1 - 2 * np.vdot(x, y) / (np.vdot(x, x) + np.vdot(y, y)))
