"""How far training in float8 ends from training in bfloat16: the same model, data and order, a recipe at a time.

`python benchmarks/loss_gap.py` trains `configs/train/tiny_cpu.gin` for 200 steps from each of eight seeds in each recipe, and
writes `benchmarks/results/loss_gap.json` and `loss_gap.png`: training and held-out loss, and their gaps to bf16.

`python benchmarks/loss_gap.py --config configs/train/small_h100.gin --steps 4400 --seeds 1 --recipes fp8 --gpus 0 1 --runs DIR
--name small_h100_loss` trains 144 M tokens in each recipe, on a GPU each. What DIR holds is gone on with: `--minutes` stops the
runs after so long, and the same command takes them up again from their checkpoints.

Any other rounding sends a run another way, and 200 steps at a high learning rate wander by a percent: the mean over seeds
and its standard error count. The yardstick is fp32, which differs from bf16 by nothing but rounding; or runs of one recipe
among themselves, which `--microbatches 8 4` makes differ by the order of sums alone, in place of seeds. The report's bar for its
own, long runs is 0.25 %.

`--begin-with RUN RUN ...` has the runs of seed i go on from the state of the i-th of these, whose directory is copied: what recipes
make of models that have behind them what a difference of rounding decides the time of. They are begun with that seed and the
TOTAL_STEPS of `--steps`, and stopped: `timeout --signal=TERM 300 python -m train --set "SEED = i" ...`.

`--recipes` takes those of `ablated_recipes.py`, too: float8 without a part of what ours has.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import itertools
import json
import os
import pathlib
import platform
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ablated_recipes import ABLATIONS
from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure

from train.metrics import METRICS_FILE, read_jsonl

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = pathlib.Path(__file__).parent / 'results'
RECIPES = ('bf16', 'fp8', 'fp32', *ABLATIONS)
LAST = {'training': 20, 'heldout': 3}
"""Steps, and evaluations, that a smoothed loss is the mean of."""


class Curves(NamedTuple):
    """Of a run: step and loss in nats a token, of training and of held-out text, and the latter's bits a byte."""

    training: list[tuple[int, float]]
    heldout: list[tuple[int, float]]
    heldout_bits_per_byte: list[float]


class Job(NamedTuple):
    """A run: where it is, and how it is trained."""

    directory: pathlib.Path
    command: list[str]
    steps: int
    begin_with: pathlib.Path | None

    def curves(self) -> Curves:
        """What it has measured so far."""
        file = self.directory / METRICS_FILE
        lines = read_jsonl(file) if file.exists() else []
        evaluations = [line for line in lines if 'heldout_loss' in line]
        return Curves(
            [(line['step'], line['loss']) for line in lines if 'loss' in line],
            [(line['step'], line['heldout_loss']) for line in evaluations],
            [line['heldout_bits_per_byte'] for line in evaluations],
        )

    @property
    def done(self) -> bool:
        return any(step == self.steps for step, _ in self.curves().heldout)


class Runner:
    """Trains jobs in processes of their own, each on a GPU of its own if there are any, and ends them with itself."""

    def __init__(self, gpus: Sequence[str], processes: int, deadline: float) -> None:
        self._gpus, self._deadline = queue.SimpleQueue(), deadline
        for gpu in gpus:
            self._gpus.put(gpu)
        self._uses_gpus = bool(gpus)
        self._pool = concurrent.futures.ThreadPoolExecutor(len(gpus) or processes)
        self._running: set[subprocess.Popen[bytes]] = set()

    def train(self, job: Job) -> None:
        """Trains a job, or goes on with it, up to its end or the deadline.

        Raises:
          RuntimeError: it failed; the message has the last of what it said.
        """
        if job.done or time.monotonic() > self._deadline:
            return
        if job.begin_with is not None and not job.directory.exists():
            shutil.copytree(job.begin_with, job.directory)
        gpu = self._gpus.get() if self._uses_gpus else None
        environment = os.environ | ({} if gpu is None else {'CUDA_VISIBLE_DEVICES': gpu})
        job.directory.mkdir(parents=True, exist_ok=True)
        log = job.directory.with_suffix('.log')
        with log.open('ab') as output:
            process = subprocess.Popen(job.command, cwd=ROOT, env=environment, stdout=output, stderr=output)
            self._running.add(process)
            try:
                status = process.wait(max(self._deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                status = 0
            finally:
                _end(process)
                self._running.discard(process)
                if gpu is not None:
                    self._gpus.put(gpu)
        if status:
            raise RuntimeError(f'{job.directory}: failed with {status}\n{log.read_text(errors="replace")[-2000:]}')

    def all(self, jobs: Sequence[Job]) -> None:
        """Trains jobs, and shows how far each is every half a minute."""
        left = {self._pool.submit(self.train, job): job for job in jobs}
        try:
            while left:
                finished, _ = concurrent.futures.wait(left, 30, concurrent.futures.FIRST_COMPLETED)
                for future, job in left.items():
                    if training := job.curves().training:
                        step, loss = training[-1]
                        print(f'{job.directory.name}: step {step}/{job.steps}, loss {loss:.4f}', flush=True)
                    if future in finished:
                        future.result()
                left = {future: job for future, job in left.items() if future not in finished}
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in list(self._running):
                _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()  # it saves the step that it is in
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()


def jobs(options: argparse.Namespace, recipes: Sequence[str], folder: pathlib.Path) -> Iterator[tuple[str, Job]]:
    """A run of each recipe for each seed, or each microbatch size."""
    overrides = [f'{name} = {options.every}' for name in ('EVAL_EVERY', 'CHECKPOINT_EVERY')]
    overrides += [f'TOTAL_STEPS = {options.steps}', *options.set]
    if options.rate is not None:
        pieces = (('constant', options.rate, 0.6), ('cosine', options.rate / 10, 0.4))
        overrides.append(f'learning_rate/train.schedule.Schedule.pieces = {pieces}')
    for variant, recipe in itertools.product(options.microbatches or range(options.seeds), recipes):
        directory = folder / f'{recipe}-{variant}'
        ablated = recipe in ABLATIONS
        program = [str(ROOT / 'benchmarks' / 'ablated_recipes.py'), recipe] if ablated else ['-m', 'train']
        command = [sys.executable, *program, '--config', str(options.config.resolve()), '--run-dir', str(directory)]
        precision = 'fp8' if ablated else recipe
        varied = 'MICROBATCH' if options.microbatches else 'SEED'
        for override in (f"PRECISION = '{precision}'", f'{varied} = {variant}', *overrides):
            command += ['--set', override]
        begin_with = options.begin_with[variant] if options.begin_with else None
        yield recipe, Job(directory, command, options.steps, begin_with)


def smooth(points: Sequence[tuple[int, float]], last: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean of each point and the `last - 1` before it."""
    steps, values = np.array(points).T
    return steps[last - 1 :], np.convolve(values, np.ones(last) / last, mode='valid')


def gaps(values: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """Relative gaps, run by run, their mean and its standard error."""
    relative = np.array(values) / np.array(baseline) - 1
    error = relative.std(ddof=1) / np.sqrt(len(relative)) if len(relative) > 1 else None
    return {'by_run': relative.tolist(), 'mean': float(relative.mean()), 'standard_error': error}


def draw(curves: dict[str, list[Curves]], path: pathlib.Path, orders: bool) -> None:
    """Training and held-out loss over steps, mean of the runs, and below them the gaps to bf16, run by run and in the mean;
    those of other runs in bf16 to its first, too, where runs differ by the order of sums."""
    figure = Figure(figsize=(10, 6), layout='constrained')
    panels = figure.subplots(2, 2, sharex=True, height_ratios=(3, 2))
    for (kind, last), (above, below) in zip(LAST.items(), panels.T, strict=True):
        smoothed = {recipe: [smooth(getattr(run, kind), last) for run in runs] for recipe, runs in curves.items()}
        steps = smoothed['bf16'][0][0]
        losses = {recipe: np.array([values for _, values in runs]) for recipe, runs in smoothed.items()}
        for recipe, color in zip(RECIPES, TABLEAU_COLORS, strict=False):
            if recipe not in losses:
                continue
            above.plot(steps, losses[recipe].mean(0), color=color, label=recipe)
            if recipe != 'bf16':
                gap = 100 * (losses[recipe] / losses['bf16'] - 1)
                below.plot(steps, gap.T, color=color, alpha=0.3, linewidth=0.8)
                below.plot(steps, gap.mean(0), color=color)
            elif orders:
                gap = 100 * (losses['bf16'][1:] / losses['bf16'][0] - 1)
                below.plot(steps, gap.T, color=color, linewidth=0.8, linestyle=':')
        what = 'steps' if kind == 'training' else 'evaluations'
        runs = f' and {len(curves["bf16"])} runs' if len(curves['bf16']) > 1 else ''
        above.set(title=f'{kind} loss, mean of {last} {what}{runs}', ylabel='nats a token')
        below.axhline(0, color='gray', linewidth=0.6)
        below.set(xlabel='step', ylabel='gap to bf16, %')
        above.legend()
        for axes in (above, below):
            axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def result(options: argparse.Namespace, curves: dict[str, list[Curves]]) -> dict[str, Any]:
    """What the JSON file holds; the gaps are printed."""
    found: dict[str, Any] = {
        'device': f'{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores, {platform.machine()}',
        'jax': jax.__version__,
        'python': platform.python_version(),
        'command': shlex.join(['python', 'benchmarks/loss_gap.py', *sys.argv[1:]]),
        'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
        'config': options.config.name,
        'learning_rate': options.rate,
        'steps': options.steps,
        'averaged': LAST,
        'microbatches': options.microbatches,
        'begun_at_step': [_last_step(run) for run in options.begin_with],
    }
    for kind, last in LAST.items():
        final = {
            recipe: [float(smooth(getattr(run, kind), last)[1][-1]) for run in runs] for recipe, runs in curves.items()
        }
        found[f'final_{kind}_loss'] = final
        for recipe, (first, *others) in final.items() if options.microbatches else ():
            spread = found[f'{recipe}_{kind}_spread'] = [value / first - 1 for value in others]
            among = ', '.join(f'{100 * value:+.3f}' for value in spread)
            print(f'{recipe} among itself, {kind} loss: {among} %')
        for recipe in curves.keys() - {'bf16'}:
            gap = found[f'{recipe}_{kind}_gap_to_bf16'] = gaps(final[recipe], final['bf16'])
            spread = '' if gap['standard_error'] is None else f' +- {100 * gap["standard_error"]:.3f}'
            print(f'{recipe} against bf16, {kind} loss: {100 * gap["mean"]:+.3f}{spread} %')
    found['curves'] = {recipe: [run._asdict() for run in runs] for recipe, runs in curves.items()}
    return found


def _last_step(run: pathlib.Path) -> int:
    return read_jsonl(run / METRICS_FILE)[-1]['step']


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', type=pathlib.Path, default=ROOT / 'configs' / 'train' / 'tiny_cpu.gin')
    parser.add_argument('--steps', type=int, default=200)
    parser.add_argument('--every', type=int, help='steps between evaluations, each with a checkpoint; a 20th of them')
    parser.add_argument('--seeds', type=int, default=8)
    parser.add_argument('--microbatches', type=int, nargs='+', metavar='ROWS', help='in place of seeds')
    parser.add_argument(
        '--rate', type=float, help="learning rate, a tenth of it at the end, in place of the configuration's"
    )
    parser.add_argument('--set', action='append', default=[], metavar="'NAME = value'", help='as of python -m train')
    parser.add_argument(
        '--recipes', nargs='*', choices=RECIPES, default=['fp8', 'fp32'], help='beside bf16, which is always among them'
    )
    parser.add_argument('--processes', type=int, default=1, help='runs at the same time: one a CPU core is fastest')
    parser.add_argument('--gpus', nargs='*', default=[], help='numbers of GPUs, one for each run at the same time')
    parser.add_argument(
        '--runs', type=pathlib.Path, help='folder of the runs, which are gone on with if they are there'
    )
    parser.add_argument(
        '--begin-with', type=pathlib.Path, nargs='+', default=[], metavar='RUN', help='runs, a seed each, to go on from'
    )
    parser.add_argument('--minutes', type=float, default=float('inf'), help='after which the runs are stopped')
    parser.add_argument('--name', default='loss_gap', help='of the files in benchmarks/results')
    options = parser.parse_args()
    options.every = options.every or max(options.steps // 20, 1)
    needed = max(LAST['training'], options.every * LAST['heldout'])
    if options.steps < needed or options.seeds < 1:
        parser.error(f'--steps must be at least {needed}, --seeds at least 1')
    for run in options.begin_with:
        if not (run / METRICS_FILE).exists():
            parser.error(f'--begin-with {run}: no run is there')
    if options.begin_with:
        if options.microbatches:
            parser.error('--begin-with is for seeds, not for --microbatches')
        options.seeds = len(options.begin_with)
    recipes = [recipe for recipe in RECIPES if recipe == 'bf16' or recipe in options.recipes]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that runs are ended, too
    with contextlib.ExitStack() as stack:
        folder = options.runs or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        planned = list(jobs(options, recipes, folder.resolve()))
        runner = Runner(options.gpus, options.processes, time.monotonic() + 60 * options.minutes)
        runner.all([job for _, job in planned])
        if not all(job.done for _, job in planned):
            print('stopped before the end: the same command goes on')
            return 3
        curves = {recipe: [job.curves() for name, job in planned if name == recipe] for recipe in recipes}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f'{options.name}.json').write_text(json.dumps(result(options, curves)) + '\n', encoding='utf-8')
    draw(curves, RESULTS / f'{options.name}.png', bool(options.microbatches))
    return 0


if __name__ == '__main__':
    sys.exit(main())
