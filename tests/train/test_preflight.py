"""The step is compiled for GPUs that are not there, and what it needs is what it takes."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import deepseek_jax as ds
from configs import loader
from tests.pallas_kernels.hopper import needs_hopper_tools
from train import parallel, preflight
from train.optimizer import OptimizerConfig
from train.parallel import MeshConfig
from train.step import as_batch, init_state

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = ROOT / 'configs' / 'train' / 'tiny_cpu.gin'
OVERRIDES = ['config.ModelConfig.num_layers = 2', 'config.ModelConfig.mtp_depth = 0', "PRECISION = 'bf16'"]
MESH = [
    'parallel.MeshConfig.fsdp = 2',
    'parallel.MeshConfig.expert = 2',
    'parallel.MeshConfig.context = 2',
    "config.ModelConfig.remat = 'paper'",
]


def run(*arguments: str, config: str = str(CONFIG)) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, '-m', 'train', '--config', config, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=280)


def as_options(overrides: list[str]) -> list[str]:
    return [word for override in overrides for word in ('--set', override)]


@needs_hopper_tools
def test_a_step_for_eight_gpus_holds_what_eight_devices_hold():
    done = run('--preflight', '--gpus', '8', *as_options(OVERRIDES + MESH))
    assert done.returncode == 0, done.stderr
    argument_mb = float(re.search(r'memory a device: ([\d.]+) MB of state and batch', done.stdout)[1])  # pyright: ignore
    assert re.search(r'all-to-all +expert +dispatch', done.stdout)
    assert re.search(r'reduce-scatter +fsdp +reduce', done.stdout)
    assert re.search(r'all-gather +context +context', done.stdout)
    (total,) = re.findall(r'^a device sends [0-9.]+ [GM]B a step: (.*)$', done.stdout, re.MULTILINE)
    assert {'expert', 'fsdp'} <= set(re.findall(r'along (\w+)', total))

    loader.parse(CONFIG, OVERRIDES)
    model, optimizer = loader.call(ds.ModelConfig), loader.call(OptimizerConfig)
    layout = MeshConfig(fsdp=2, expert=2, context=2).make()
    shapes = jax.eval_shape(lambda: init_state(jax.random.key(0), model, optimizer))
    state = init_state(jax.random.key(0), model, optimizer, places=parallel.places(shapes, shapes.params, layout))
    rows = {name: np.zeros((16, 128 + (name != 'weights')), np.int32) for name in ('tokens', 'segments', 'weights')}
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves((state, as_batch(rows, layout))))
    assert argument_mb * 1e6 == pytest.approx(held, rel=0.02)


@needs_hopper_tools
def test_exchanges_of_a_step_go_on_while_products_run():
    """Gradients of blocks are added up, and what experts computed travels, behind products of the pass that makes them; for what
    does not, the table says that there is no product which could run meanwhile, or that they run at another time."""
    layers = [
        'config.ModelConfig.num_layers = 3',
        'config.ModelConfig.mtp_depth = 0',
        "PRECISION = 'bf16'",
        'MICROBATCH = 8',
    ]
    arguments = as_options([*layers, *MESH, 'parallel.MeshConfig.zero = 3'])
    config = str(ROOT / 'configs' / 'train' / 'small_h100.gin')
    done = run('--preflight', '--gpus', '8', *arguments, config=config)
    assert done.returncode == 0, done.stderr
    table = re.findall(r'^(all-\S+|reduce-\S+) +\S.*?  +(\w+(?:, backward)?)  +(\S.*?)  ', done.stdout, re.MULTILINE)
    meanwhile = {(kind, origin, what) for kind, origin, what in table}
    for kind, origin in (
        ('reduce-scatter', 'gather, backward'),
        ('all-gather', 'gather, backward'),
        ('all-to-all', 'collect'),
        ('all-to-all', 'collect, backward'),
        ('all-to-all', 'dispatch, backward'),
    ):
        assert (kind, origin, 'a product') in meanwhile, done.stdout
    kinds = r'a product|(other kernels|nothing), (products apart|no product could)'
    assert all(re.fullmatch(kinds, what) for _, _, what in meanwhile), done.stdout


@needs_hopper_tools
def test_a_step_for_one_gpu_exchanges_nothing():
    small = [
        'config.ModelConfig.num_layers = 2',
        'config.ModelConfig.moe = None',
        'config.ModelConfig.num_dense_layers = 2',
    ]
    done = run('--preflight', '--gpus', '1', *as_options([*small, *OVERRIDES[1:]]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith('fits\nno collectives\n')


def test_what_does_not_fit_is_said_so():
    found = preflight.Preflight(argument_bytes=10**9, needed_bytes=81 * 10**9, collectives=[], compile_seconds=1)
    assert not found.fits
    wanted = '1.00 GB of state and batch, 80.00 GB beside; of 80.00 GB it needs 81.00 GB: does not fit\nno collectives'
    assert wanted in str(found)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--preflight'], '--preflight needs --gpus N'),
        (['--gpus', '8'], '--preflight needs --gpus N'),
        (['--preflight', '--gpus', '8'], r'--gpus 8: the mesh .* has 1 devices'),
    ],
)
def test_bad_command_lines_are_refused(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert re.search(message, done.stderr)


def test_gpus_come_in_whole_hosts():
    for gpus in (0, 12):
        with pytest.raises(ValueError, match=rf'--gpus {gpus} must be positive and, above 8, whole hosts of 8'):
            preflight.devices(gpus)
