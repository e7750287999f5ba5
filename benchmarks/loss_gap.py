"""How far training in float8 ends from training in bfloat16: the same model, data and order, a recipe at a time.

`python benchmarks/loss_gap.py` trains `configs/train/tiny_cpu.gin` for 200 steps from each of eight seeds in each
recipe, prints the training loss at the end (the mean of the last steps, in nats a token), the held-out bits a byte and
their gaps to bf16, and writes `benchmarks/results/loss_gap.json` and `loss_gap.png`.

Any other rounding sends a run another way, and 200 steps at a high learning rate wander by a percent: the mean over seeds
and its standard error count. The yardstick is fp32, which differs from bf16 by nothing but rounding. The report's bar for
its own, long runs is 0.25 %.
"""

import argparse
import concurrent.futures
import datetime
import functools
import itertools
import json
import multiprocessing
import os
import pathlib
import platform
import sys
import tempfile
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from configs import loader
from train import run
from train.metrics import METRICS_FILE, read_jsonl

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = pathlib.Path(__file__).parent / 'results'
RECIPES = {'bf16': 'tab:blue', 'fp8': 'tab:orange', 'fp32': 'tab:green'}
LAST = 20


def losses(config: pathlib.Path, rate: float | None, steps: int, seed: int, recipe: str) -> tuple[list[float], float]:
    """The training loss of every step of a new run, and the held-out bits a byte at its end."""
    overrides = [f'{name} = {steps}' for name in ('TOTAL_STEPS', 'EVAL_EVERY', 'CHECKPOINT_EVERY')]
    if rate is not None:
        pieces = (('constant', rate, 0.6), ('cosine', rate / 10, 0.4))
        overrides.append(f'learning_rate/train.schedule.Schedule.pieces = {pieces}')
    with tempfile.TemporaryDirectory() as run_dir:
        loader.parse(config, [f"PRECISION = '{recipe}'", f'SEED = {seed}', *overrides])
        result = loader.call(run.train, run_dir=run_dir, config_text=loader.operative_config)
        assert result is not None
        lines = read_jsonl(pathlib.Path(run_dir) / METRICS_FILE)
    return [line['loss'] for line in lines if 'loss' in line], result.heldout_bits_per_byte


def smooth(losses_S: np.ndarray) -> np.ndarray:
    """The mean of each step and the LAST - 1 before it."""
    return np.convolve(losses_S, np.ones(LAST) / LAST, mode='valid')


def gaps(values: list[float], baseline: list[float]) -> dict[str, Any]:
    """Relative gaps, seed by seed, their mean and its standard error."""
    relative = np.array(values) / np.array(baseline) - 1
    error = relative.std(ddof=1) / np.sqrt(len(relative)) if len(relative) > 1 else None
    return {'by_seed': relative.tolist(), 'mean': float(relative.mean()), 'standard_error': error}


def draw(curves: dict[str, list[list[float]]], path: pathlib.Path) -> None:
    """Losses over steps, mean of the seeds, and below them the gap to bf16, seed by seed and in the mean."""
    figure = Figure(figsize=(8, 6), layout='constrained')
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    running = {recipe: np.array([smooth(np.array(curve)) for curve in runs]) for recipe, runs in curves.items()}
    steps = np.arange(running['bf16'].shape[1]) + LAST
    for recipe in curves:
        color = RECIPES[recipe]
        above.plot(steps, running[recipe].mean(0), color=color, label=recipe)
        if recipe != 'bf16':
            gap = 100 * (running[recipe] / running['bf16'] - 1)
            below.plot(steps, gap.T, color=color, alpha=0.3, linewidth=0.8)
            below.plot(steps, gap.mean(0), color=color)
    below.axhline(0, color='gray', linewidth=0.6)
    above.set(title=f'training loss, mean of {LAST} steps and {len(curves["bf16"])} seeds', ylabel='nats a token')
    below.set(xlabel='step', ylabel='gap to bf16, %')
    above.legend()
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', type=pathlib.Path, default=ROOT / 'configs' / 'train' / 'tiny_cpu.gin')
    parser.add_argument('--steps', type=int, default=200)
    parser.add_argument('--seeds', type=int, default=8)
    parser.add_argument(
        '--rate', type=float, help="learning rate, a tenth of it at the end, in place of the configuration's"
    )
    parser.add_argument(
        '--recipes', nargs='+', choices=RECIPES, default=list(RECIPES), help='bf16 is always among them'
    )
    parser.add_argument('--processes', type=int, default=1, help='runs at the same time: one a CPU core is fastest')
    options = parser.parse_args()
    if options.steps < LAST or options.seeds < 1:
        parser.error(f'--steps must be at least {LAST} and --seeds at least 1')
    recipes = [recipe for recipe in RECIPES if recipe == 'bf16' or recipe in options.recipes]
    curves, heldout = {recipe: [] for recipe in recipes}, {recipe: [] for recipe in recipes}
    spawn = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(options.processes, mp_context=spawn) as pool:
        jobs = list(itertools.product(range(options.seeds), recipes))
        train = functools.partial(losses, options.config, options.rate, options.steps)
        for (seed, recipe), (curve, bits) in zip(jobs, pool.map(train, *zip(*jobs, strict=True)), strict=True):
            curves[recipe].append(curve)
            heldout[recipe].append(bits)
            print(
                f'seed {seed} {recipe}: loss {np.mean(curve[-LAST:]):.5f}, held-out {bits:.5f} bits a byte', flush=True
            )
    final = {recipe: [float(np.mean(curve[-LAST:])) for curve in runs] for recipe, runs in curves.items()}
    result = {
        'device': f'{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores, {platform.machine()}',
        'jax': jax.__version__,
        'python': platform.python_version(),
        'command': ' '.join(['python', *sys.argv]),
        'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
        'config': options.config.name,
        'learning_rate': options.rate,
        'steps': options.steps,
        'last_steps_averaged': LAST,
        'final_loss': final,
        'heldout_bits_per_byte': heldout,
    }
    for recipe in recipes[1:]:
        loss, bits = gaps(final[recipe], final['bf16']), gaps(heldout[recipe], heldout['bf16'])
        result[f'{recipe}_gap_to_bf16'] = {'loss': loss, 'heldout_bits_per_byte': bits}
        for name, gap in (('training loss', loss), ('held-out bits', bits)):
            spread = '' if gap['standard_error'] is None else f' +- {100 * gap["standard_error"]:.3f}'
            print(f'{recipe} against bf16, {name}: {100 * gap["mean"]:+.3f}{spread} %')
    result['loss'] = {
        recipe: [[round(value, 5) for value in curve] for curve in runs] for recipe, runs in curves.items()
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / 'loss_gap.json').write_text(json.dumps(result) + '\n', encoding='utf-8')
    draw(curves, RESULTS / 'loss_gap.png')


if __name__ == '__main__':
    main()
