"""What is left of the speed of N GPUs when they train together, and whether they compute what one computes.

`python benchmarks/scaling.py --gpus 2` trains a few steps of `configs/train/small_h100.gin` on one GPU and on meshes of all: copies of
the state (data), the state cut (fsdp), blocks that gather their parameters (ZeRO-3), experts apart (expert) with room for all
tokens or for a quarter more than an even share, layers apart (stage). Work a GPU is equal. Efficiency is tokens a second against N times those of one GPU;
the loss of each step is held against that of one GPU with the batch of all of them, in parts. `--profile` of `python -m train`
measures, and says where the rest goes.

Writes `benchmarks/results/NAME.json`. With `--config configs/train/tiny_cpu.gin` and
XLA_FLAGS=--xla_force_host_platform_device_count=2 it runs on a CPU, where it says nothing about speed.
"""

import argparse
import datetime
import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from train.metrics import METRICS_FILE, read_jsonl
from train.profile import REPORT_FILE
from train.run import PROFILE_FOLDER

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = pathlib.Path(__file__).parent / 'results'
ONE, WHOLE_BATCH = 'one GPU', 'one GPU, batch of all'
ALONE = (ONE, WHOLE_BATCH)


def meshes(gpus: int) -> dict[str, dict[str, float]]:
    """The fields of `MeshConfig` of each run."""
    return {
        ONE: {},
        WHOLE_BATCH: {},
        'data': {'data': gpus},
        'fsdp': {'fsdp': gpus},
        'fsdp, ZeRO-3': {'fsdp': gpus, 'zero': 3},
        'expert': {'expert': gpus},
        'expert, room 1.25': {'expert': gpus, 'capacity_factor': 1.25},
        'stage, 4 parts': {'stage': gpus, 'stage_parts': 4},
    }


def train(
    name: str, mesh: Mapping[str, float], options: argparse.Namespace, folder: pathlib.Path, gpu: int
) -> dict[str, Any]:
    """Takes the steps of one run: its profile and the losses.

    Raises:
      RuntimeError: it failed; the message has the last of what it said.
    """
    alone = name in ALONE
    rows = options.rows * (1 if name == ONE else options.gpus)
    directory = folder / name.replace(' ', '_')
    command = [sys.executable, '-m', 'train', '--config', str(options.config.resolve()), '--run-dir', str(directory)]
    command += ['--profile', str(options.steps)]
    microbatch = options.rows if alone else rows
    overrides = [
        f'BATCH_SIZE = {rows}',
        f'run.train.microbatch_size = {microbatch}',
        f"PRECISION = '{options.precision}'",
    ]
    overrides += [f'parallel.MeshConfig.{field} = {value}' for field, value in mesh.items()]
    for override in (*overrides, *options.set):
        command += ['--set', override]
    environment = os.environ | ({'CUDA_VISIBLE_DEVICES': str(gpu)} if alone else {})
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f'{name}: failed with {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}')
    found = json.loads((directory / PROFILE_FOLDER / REPORT_FILE).read_text(encoding='utf-8'))
    losses = [line['loss'] for line in read_jsonl(directory / METRICS_FILE) if 'loss' in line]
    return {'losses': losses, **{key: value for key, value in found.items() if key != 'longest'}}


def compared(found: Mapping[str, dict[str, Any]], gpus: int) -> dict[str, dict[str, Any]]:
    """Of each mesh the efficiency and the largest relative difference of a loss, against one GPU."""
    one, reference = found[ONE]['tokens_per_second'], found[WHOLE_BATCH]['losses']
    return {
        name: {
            'efficiency': run['tokens_per_second'] / (gpus * one),
            'loss_difference': max(abs(a / b - 1) for a, b in zip(run['losses'], reference, strict=True)),
        }
        for name, run in found.items()
        if name not in ALONE
    }


def table(found: Mapping[str, dict[str, Any]], compared: Mapping[str, dict[str, Any]]) -> list[str]:
    """A line a run."""
    lines = [f'{"":24}{"tokens/s":>12}{"efficiency":>12}{"loss differs":>14}{"peak GiB":>10}']
    for name, run in found.items():
        peak = run['peak_memory_bytes']
        more = compared.get(name)
        values = ('', '') if more is None else (f'{more["efficiency"]:.1%}', f'{more["loss_difference"]:.1e}')
        memory = '' if peak is None else f'{peak / 2**30:.1f}'
        lines.append(f'{name:24}{run["tokens_per_second"]:12,.0f}{values[0]:>12}{values[1]:>14}{memory:>10}')
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', type=pathlib.Path, default=ROOT / 'configs' / 'train' / 'small_h100.gin')
    parser.add_argument('--gpus', type=int, default=2)
    parser.add_argument('--rows', type=int, default=8, help='sequences a GPU')
    parser.add_argument('--steps', type=int, default=10, help='that are measured')
    parser.add_argument('--precision', default='fp8')
    parser.add_argument('--only', nargs='+', help='of the meshes, beside one GPU')
    parser.add_argument('--set', action='append', default=[], metavar="'NAME = value'", help='as of python -m train')
    parser.add_argument('--name', default='scaling_h200', help='of the file in benchmarks/results')
    options = parser.parse_args()
    chosen = meshes(options.gpus)
    if unknown := set(options.only or ()) - set(chosen):
        parser.error(f'--only has {", ".join(sorted(unknown))}, which is none of {", ".join(chosen)}')
    chosen = {name: mesh for name, mesh in chosen.items() if not options.only or name in (*ALONE, *options.only)}
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(min(options.gpus, len(ALONE))) as pool:
        start = lambda name, gpu=0: train(name, chosen[name], options, pathlib.Path(folder), gpu)  # noqa: E731
        # Those of one GPU beside each other, on two; where there is a corpus to tokenise, the first one does it for all.
        found |= zip(ALONE, pool.map(start, ALONE, range(len(ALONE))), strict=True)
        for name in chosen:
            if name not in ALONE:
                found[name] = start(name)
                print('\n'.join(table({name: found[name]}, compared({**found}, options.gpus))[1:]), flush=True)
    ratios = compared(found, options.gpus)
    print('\n'.join(table(found, ratios)))
    result = {
        'command': shlex.join(['python', 'benchmarks/scaling.py', *sys.argv[1:]]),
        'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
        'jax': jax.__version__,
        'gpus': options.gpus,
        'rows': options.rows,
        'runs': found,
        'compared': ratios,
    }
    (RESULTS / f'{options.name}.json').write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')
    return 0


if __name__ == '__main__':
    sys.exit(main())
