"""What an expert layer of DeepSeek-V3 keeps between its passes, bytes a token, by recipe and by what is recomputed.

`python benchmarks/activations.py [--output FILE.json]`. The layer and its gradient are traced for an H100, at the true widths
with 8 experts: what the backward pass is given, but for the weights, is what a training step must hold of every layer. The
sizes are those of the arrays of the traced program; a machine without a GPU will do.
"""

import argparse
import collections
import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp

import deepseek_jax as ds
from configs import loader
from deepseek_jax.block import block, remat_policy
from deepseek_jax.model import causal_attend
from deepseek_jax.precision import Float8Copies

CONFIG = pathlib.Path(__file__).resolve().parent.parent / 'configs' / 'train' / 'v3_slice_h100.gin'
H100 = jax.sharding.AbstractDevice(device_kind='NVIDIA H100 80GB HBM3', platform='gpu', num_cores=132)
LENGTH = 5120  # no width of the model, so that its arrays can be told from weights
PADDED_ROWS = 8 * (LENGTH + 128)  # of tokens sent to 8 experts
RUNS = [('bf16', 'none'), ('bf16', 'paper'), ('fp8', 'none'), ('fp8', 'paper')]


def model(recipe: str, remat: str) -> ds.ModelConfig:
    """One layer of DeepSeek-V3 with 8 of its experts."""
    loader.parse(CONFIG, [f"PRECISION = '{recipe}'"])
    changes = {'num_layers': 1, 'num_dense_layers': 0, 'mtp_depth': 0, 'remat': remat}
    return dataclasses.replace(loader.call(ds.ModelConfig), **changes)


def kept(config: ds.ModelConfig) -> list[jax.ShapeDtypeStruct]:
    """The arrays that the layer's backward pass is given and that grow with the number of tokens."""
    shapes = jax.eval_shape(functools.partial(ds.init, config=config), jax.random.key(0))
    layer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), shapes['moe_layers'])
    x_BTD = jax.ShapeDtypeStruct((1, LENGTH, config.model_dim), jnp.bfloat16)

    def pull(params, copies, x_BTD):
        attend = causal_attend(jnp.zeros((1, LENGTH), jnp.int32), None, config)
        layer = lambda params, x_BTD: block(params, x_BTD, attend, None, config)[0]  # noqa: E731
        if config.remat != 'none':
            layer = jax.checkpoint(layer, policy=remat_policy(config), prevent_cse=False)
        return jax.vjp(lambda params, x_BTD: layer(copies.beside(params), x_BTD), params, x_BTD)[1]

    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=H100)):
        copies = jax.eval_shape(lambda params: Float8Copies.of(params, config), layer)
        given = jax.tree.leaves(jax.eval_shape(pull, layer, copies, x_BTD))
    return [array for array in given if {LENGTH, PADDED_ROWS} & set(array.shape)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=pathlib.Path, help='where to write the figures as JSON')
    options = parser.parse_args()
    rows = []
    for recipe, remat in RUNS:
        sizes = collections.Counter()
        for array in kept(model(recipe, remat)):
            sizes[f'{array.dtype}{list(array.shape)}'] += array.size * array.dtype.itemsize
        by_array = {name: size / LENGTH for name, size in sizes.most_common()}
        rows.append({'recipe': recipe, 'remat': remat, 'bytes_per_token': sum(by_array.values()), 'arrays': by_array})
        print(f'{recipe}, remat={remat!r}: {rows[-1]["bytes_per_token"]:,.0f} bytes a token', flush=True)
        for name, size in list(by_array.items())[:10]:
            print(f'  {name:36}{size:12,.0f}')
    for row in rows[:2]:
        ratio = rows[-1]['bytes_per_token'] / row['bytes_per_token']
        print(f'fp8 with remat="paper" keeps {ratio:.2f} of what bf16 with remat={row["remat"]!r} keeps')
    if options.output:
        header = {'traced_for': H100.device_kind, 'jax': jax.__version__, 'length': LENGTH}
        header['command'] = 'python benchmarks/activations.py --output benchmarks/results/activations.json'
        options.output.write_text(json.dumps(header | {'rows': rows}, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
