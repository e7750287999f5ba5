"""How wrong float8 makes a gradient, and how much more without a part of its recipe.

`python benchmarks/gradient_error.py --run DIR --config FILE.gin`, on a Hopper GPU, takes the parameters of a run's newest
checkpoint and rows of its training text, and compares the gradient in bf16, in float8, and in each recipe of
`ablated_recipes.py` with that in fp32: |g - g_fp32| / |g_fp32|, by kind of weight. Beside them stand products alone, of
random operands with one scale a matrix, with and without promotion of partial sums, by how much they sum; and rounding
alone, where one token in 128 is larger than the others: what tiles of a token each keep to that token.

Writes `benchmarks/results/NAME.json` and `.png`.
"""

import argparse
import dataclasses
import datetime
import json
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ablated_recipes import ABLATIONS, per_tensor, unpromoted
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import deepseek_jax as ds
import pallas_kernels as pk
from configs import loader
from deepseek_jax import names
from pallas_kernels.fp8 import BLOCK, E4M3, Quantized, blocks, dequantize_blocks, dequantize_rows
from train import data as data_lib
from train.loss import ObjectiveConfig
from train.step import as_batch, batch_gradients

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = pathlib.Path(__file__).parent / 'results'
KINDS = {
    'attention projections': ('attention',),
    'dense and shared FFN': ('ffn', 'shared'),
    'routed experts': ('experts',),
    'all other parameters': (),
}
MTP_WEIGHT = 0.3
OUTLIERS = tuple(2**power for power in range(0, 19, 2))
SUMS = (2048, 8192, 32768, 131072)


def kind(path: tuple[str, ...]) -> str:
    """What a parameter is a weight of."""
    if path[-1].startswith('w_'):
        for name, parts in KINDS.items():
            if any(part in path for part in parts):
                return name
    return 'all other parameters'


def gradient(params: Any, batch: Any, model: ds.ModelConfig, objective: ObjectiveConfig) -> tuple[Any, float]:
    """The gradient and the loss."""

    def traced(params: Any, batch: Any) -> tuple[Any, jax.Array]:  # a function of its own: no trace is shared
        gradients, _, losses = batch_gradients(params, batch, MTP_WEIGHT, model, objective, None)
        return gradients, losses.loss

    gradients, loss = jax.jit(traced)(params, batch)
    return gradients, float(loss)


@jax.jit
def squares(found: Any, wanted: Any) -> Any:
    """Of each parameter the squared norms of the error and of what it is an error of."""
    return jax.tree.map(lambda a, b: (jnp.sum(jnp.square(a - b)), jnp.sum(jnp.square(b))), found, wanted)


def errors(found: Any, wanted: Any) -> dict[str, float]:
    """Relative errors of a gradient, by kind of parameter."""
    sums = {name: np.zeros(2) for name in (*KINDS, 'all')}
    leaves = jax.tree_util.tree_leaves_with_path(squares(found, wanted), is_leaf=lambda leaf: isinstance(leaf, tuple))
    for path, both in leaves:
        for name in (kind(tuple(names.path_names(path))), 'all'):
            sums[name] += np.array(both, np.float64)
    return {name: float(np.sqrt(error / norm)) for name, (error, norm) in sums.items()}


def gradient_errors(options: argparse.Namespace) -> dict[str, Any]:
    """The errors of each recipe at a run's parameters."""
    loader.parse(options.config, ["PRECISION = 'fp32'"])
    model, params = ds.load_run(options.run)
    objective, data = loader.call(ObjectiveConfig), loader.call(data_lib.DataConfig)
    rows = data_lib.training_rows(data_lib.load_corpus(data), options.length, seed=1)
    batch = as_batch(data_lib.batch(rows, options.rows))
    params = jax.device_put(params, jax.devices()[0])
    in_recipe = lambda recipe: dataclasses.replace(  # noqa: E731
        model, precision=dataclasses.replace(model.precision, recipe=recipe)
    )
    exact, exact_loss = gradient(params, batch, in_recipe('fp32'), objective)
    found: dict[str, Any] = {}
    for name in options.recipes:
        if name in ABLATIONS:
            with ABLATIONS[name]():
                computed, loss = gradient(params, batch, in_recipe('fp8'), objective)
        else:
            computed, loss = gradient(params, batch, in_recipe(name), objective)
        found[name] = errors(computed, exact) | {'loss': loss / exact_loss - 1}
        print(f'{name:16}', '  '.join(f'{key} {value:.4f}' for key, value in found[name].items()), flush=True)
        del computed
    return {'loss_fp32': exact_loss, 'relative_errors': found}


def product_errors() -> dict[str, Any]:
    """Errors of weight gradients (512, 512) of random values over so many tokens, one scale a matrix: with promotion and
    without."""
    found: dict[str, list[float]] = {'promoted': [], 'not promoted': []}
    for tokens in SUMS:
        lhs, rhs = (_one_scale(jax.random.key(seed), 512, tokens) for seed in range(2))
        exact = np.asarray(lhs.values, np.float64) @ np.asarray(rhs.values, np.float64).T
        exact *= float(lhs.scales[0, 0]) * float(rhs.scales[0, 0])
        products = {'promoted': pk.wgrad_fp8(lhs, rhs)}
        with unpromoted():
            products['not promoted'] = pk.wgrad_fp8(lhs, rhs)
        for name, product in products.items():
            error = np.linalg.norm(np.asarray(product, np.float64) - exact) / np.linalg.norm(exact)
            found[name].append(float(error))
            print(f'sums of {tokens:7,} {name:14} {error:.2e}', flush=True)
    return {'sums': SUMS, 'relative_errors': found}


def rounding_errors() -> dict[str, Any]:
    """Errors of ordinary tokens where one in 128 is larger by a factor, by what shares a scale."""
    found: dict[str, list[float]] = {'128 values of a token': [], '128 of 128 tokens': [], 'the matrix': []}
    x_MK = jax.random.normal(jax.random.key(0), (1024, 1024))
    for factor in OUTLIERS:
        larger_MK = x_MK.at[::BLOCK].multiply(factor)
        tiles = dequantize_rows(pk.quantize_rows(larger_MK))
        in_blocks = dequantize_blocks(*pk.quantize_blocks(larger_MK)[0])
        with per_tensor():
            whole = dequantize_rows(pk.quantize_rows(larger_MK))
        ordinary = np.arange(1024) % BLOCK > 0
        for name, rounded in zip(found, (tiles, in_blocks, whole), strict=True):
            error = np.linalg.norm((rounded - x_MK)[ordinary]) / np.linalg.norm(x_MK[ordinary])
            found[name].append(float(error))
    return {'factors': OUTLIERS, 'relative_errors': found}


def _one_scale(key: jax.Array, rows: int, tokens: int) -> Quantized:
    values = jax.random.normal(key, (rows, tokens))
    scale = jnp.max(jnp.abs(values)) / 448
    return Quantized((values / scale).astype(E4M3), jnp.full((blocks(tokens), blocks(rows) * BLOCK), scale))


def draw(result: Mapping[str, Any], path: pathlib.Path) -> None:
    """Bars of the recipes' errors; errors of rounding over the size of outliers, and of products over what they sum."""
    figure = Figure(figsize=(13, 4.5), layout='constrained')
    left, middle, right = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    found = result['gradients']['relative_errors']
    kinds, width = (*KINDS, 'all'), 0.8 / len(found)
    for index, (name, values) in enumerate(found.items()):
        left.bar(np.arange(len(kinds)) + index * width, [100 * values[kind] for kind in kinds], width, label=name)
    left.set_xticks(np.arange(len(kinds)) + 0.4 - width / 2, [kind.replace(' ', '\n', 1) for kind in kinds])
    left.set(ylabel='error of the gradient, % of fp32', title='gradients of a trained model')
    left.legend()
    rounding, products = result['rounding'], result['products']
    _lines(middle, rounding['factors'], rounding['relative_errors'])
    middle.set(xlabel='size of one token in 128', ylabel='error of the others', title='what shares a scale')
    middle.legend()
    _lines(right, products['sums'], products['relative_errors'])
    right.set(xlabel='products in a sum', ylabel='error', title='sums in the tensor cores')
    right.legend()
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def _lines(axes: Axes, x: Sequence[float], lines: Mapping[str, Sequence[float]]) -> None:
    for name, values in lines.items():
        axes.loglog(x, values, marker='o', label=name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--run', type=pathlib.Path, required=True, help='directory of a run with a checkpoint')
    parser.add_argument('--config', type=pathlib.Path, default=ROOT / 'configs' / 'train' / 'small_h100.gin')
    parser.add_argument('--rows', type=int, default=4)
    parser.add_argument('--length', type=int, default=4096, help='tokens a row')
    parser.add_argument(
        '--recipes', nargs='+', default=['bf16', 'fp8', *ABLATIONS], choices=['bf16', 'fp8', *ABLATIONS]
    )
    parser.add_argument('--name', default='gradient_error_h100', help='of the files in benchmarks/results')
    options = parser.parse_args()
    result = {
        'device': jax.devices()[0].device_kind,
        'versions': {'jax': jax.__version__},
        'command': shlex.join(['python', 'benchmarks/gradient_error.py', *sys.argv[1:]]),
        'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
        'products': product_errors(),
        'rounding': rounding_errors(),
        'gradients': gradient_errors(options),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f'{options.name}.json').write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')
    draw(result, RESULTS / f'{options.name}.png')
    return 0


if __name__ == '__main__':
    sys.exit(main())
