"""The picture of a run: products under their roofline, and what only moves bytes against the copy."""

import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pallas_kernels.bench.cases import Ceilings, Row

OURS, PEER = 'tab:blue', 'tab:orange'
MARKERS = 'osD^vP'


def plot(path: pathlib.Path, rows: Sequence[Row], ceilings: Ceilings, title: str) -> None:
    """Draws rows that have a time as points, and their peers'; the measured ceilings are the lines."""
    rows = [row for row in rows if row.us]
    products, movers = [row for row in rows if row.flops], [row for row in rows if not row.flops]
    panels = [panel for panel in ((_products, products), (_movers, movers)) if panel[1]]
    figure = Figure(figsize=(7.5 * max(1, len(panels)), 5.5), layout='constrained')
    figure.suptitle(title)
    for axes, (draw, some) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0] if panels else [], panels, strict=True
    ):
        draw(axes, some, ceilings)
        axes.grid(which='both', alpha=0.2)
        axes.legend(fontsize=8)
    temporary = path.with_name(path.name + '.partial')
    figure.savefig(temporary, dpi=120, format='png')
    temporary.replace(path)


def _products(axes: Axes, rows: Sequence[Row], ceilings: Ceilings) -> None:
    axes.set(xscale='log', yscale='log', xlabel='operations a byte', ylabel='TFLOP/s')
    intensity = np.array([row.flops / row.bytes for row in rows])
    x = np.geomspace(0.5 * intensity.min(), 2 * intensity.max(), 200)
    roof = np.minimum(ceilings.gemm_tflops, 1e-3 * x * ceilings.copy_gbs)
    label = f'measured: {ceilings.gemm_tflops:.0f} TFLOP/s, {ceilings.copy_gbs:.0f} GB/s'
    axes.plot(x, roof, color='black', linewidth=1, label=label)
    for marker, op in zip(MARKERS, dict.fromkeys(row.op for row in rows), strict=False):
        mine = [row for row in rows if row.op == op]
        _points(axes, mine, marker, op, lambda row: row.flops / row.bytes, lambda row, us: row.flops / us * 1e-6)


def _movers(axes: Axes, rows: Sequence[Row], ceilings: Ceilings) -> None:
    axes.set(xscale='log', xlabel='bytes read and written', ylabel='GB/s', ylim=(0, 1.15 * ceilings.copy_gbs))
    axes.axhline(ceilings.copy_gbs, color='black', linewidth=1, label=f'copy: {ceilings.copy_gbs:.0f} GB/s')
    for marker, name in zip(MARKERS, dict.fromkeys(row.name for row in rows), strict=False):
        mine = [row for row in rows if row.name == name]
        _points(axes, mine, marker, name, lambda row: row.bytes, lambda row, us: row.bytes / us * 1e-3)


def _points(axes: Axes, rows: Sequence[Row], marker: str, label: str, x, y) -> None:
    """Ours filled, the peer's hollow, a thin line between the two of a row."""
    theirs = [row for row in rows if row.peer_us]
    for row in theirs:
        axes.plot([x(row)] * 2, [y(row, row.us), y(row, row.peer_us)], color='gray', linewidth=0.5)
    axes.plot([x(row) for row in rows], [y(row, row.us) for row in rows], marker, color=OURS, markersize=5, label=label)
    if theirs:
        points = [y(row, row.peer_us) for row in theirs]
        axes.plot([x(row) for row in theirs], points, marker, color=PEER, fillstyle='none', label=f'{label}: peer')
