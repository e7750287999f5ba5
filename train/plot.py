"""`loss.png`: training loss, held-out bits per byte, and how evenly the experts are used."""

import pathlib
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def plot_run(metrics: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws the lines of a `metrics.jsonl`; the picture is replaced in one go."""
    steps = [line for line in metrics if 'loss' in line]
    evaluations = [line for line in metrics if 'heldout_bits_per_byte' in line]
    figure = Figure(figsize=(16, 4.2), layout='constrained')
    loss, heldout, spread, load = figure.subplots(1, 4)
    _training(loss, steps)
    _heldout(heldout, evaluations)
    _spread(spread, steps)
    _load(figure, load, evaluations)
    temporary = path.with_name(path.name + '.partial')
    figure.savefig(temporary, dpi=110, format='png')
    temporary.replace(path)


def _training(axes: Axes, steps: list[dict[str, Any]]) -> None:
    axes.set(title='training loss', xlabel='step', ylabel='nats a token')
    if not steps:
        return
    skipped = [line['step'] for line in steps if 'skipped' in line]
    if skipped:
        y = np.full(len(skipped), 0.01)
        axes.plot(skipped, y, '|', color='tab:red', transform=axes.get_xaxis_transform(), label='skipped')
    # The loss of a skipped step need not be a number, and one that is none would spoil the mean of many.
    taken = [line for line in steps if 'skipped' not in line]
    if taken:
        _losses(axes, taken)
    axes.legend()
    axes.grid(alpha=0.3)


def _losses(axes: Axes, steps: list[dict[str, Any]]) -> None:
    x, y = np.array([line['step'] for line in steps]), np.array([line['loss'] for line in steps])
    axes.plot(x, y, color='tab:blue', alpha=0.3, linewidth=0.8)
    window = max(1, len(y) // 50)
    smooth = np.convolve(y, np.ones(window) / window, mode='valid')
    axes.plot(x[window - 1 :], smooth, color='tab:blue', label=f'next token, mean of {window}')
    if any(line['mtp_loss'] for line in steps):
        mtp = np.convolve([line['mtp_loss'] for line in steps], np.ones(window) / window, mode='valid')
        axes.plot(x[window - 1 :], mtp, color='tab:orange', label='multi-token')


def _heldout(axes: Axes, evaluations: list[dict[str, Any]]) -> None:
    axes.set(title='held-out text', xlabel='step', ylabel='bits a byte')
    if not evaluations:
        return
    x, y = zip(*((line['step'], line['heldout_bits_per_byte']) for line in evaluations), strict=True)
    axes.plot(x, y, color='tab:green', marker='o', markersize=3)
    axes.annotate(f'{y[-1]:.3f}', (x[-1], y[-1]), textcoords='offset points', xytext=(-10, 8))
    averaged = [line for line in evaluations if 'heldout_ema_bits_per_byte' in line]
    if averaged:
        x, y = zip(*((line['step'], line['heldout_ema_bits_per_byte']) for line in averaged), strict=True)
        axes.plot(x, y, color='tab:purple', marker='o', markersize=3, label='averaged parameters')
        axes.legend()
    axes.grid(alpha=0.3)


def _spread(axes: Axes, steps: list[dict[str, Any]]) -> None:
    axes.set(title='expert load: maximum over mean', xlabel='step', ylabel='1 is even')
    lines = [line for line in steps if line['load_max_over_mean']]
    if not lines:
        return
    x, y = [line['step'] for line in lines], np.array([line['load_max_over_mean'] for line in lines])
    for layer in range(y.shape[1]):
        axes.plot(x, y[:, layer], linewidth=0.8, label=f'expert layer {layer}')
    if y.shape[1] <= 8:
        axes.legend()
    axes.grid(alpha=0.3)


def _load(figure: Figure, axes: Axes, evaluations: list[dict[str, Any]]) -> None:
    axes.set(title='expert load on held-out text', xlabel='expert', ylabel='expert layer')
    if not evaluations or not evaluations[-1]['expert_load']:
        return
    load = np.array(evaluations[-1]['expert_load'])
    image = axes.imshow(load * load.shape[1], aspect='auto', vmin=0, vmax=2, cmap='coolwarm', interpolation='nearest')
    axes.set_yticks(range(len(load)) if len(load) <= 16 else [])
    figure.colorbar(image, ax=axes, label='times the mean')
