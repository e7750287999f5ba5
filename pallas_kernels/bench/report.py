"""The table on the terminal and the JSON file."""

import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import subprocess
from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels.bench import peers
from pallas_kernels.bench.cases import Ceilings, Row

HEADER = f'{"case":40}{"shape":>24}{"us":>10}{"TFLOP/s":>9}{"GB/s":>7}{"ratio":>7}{"share":>7}{"error":>10}'


def line(row: Row) -> str:
    """One line of the table. `!` behind the error: the checked results were not seen to lie in poisoned memory."""
    shape = ' '.join(f'{letter}{size}' for letter, size in row.shape.items())
    start = f'{row.op + " " + row.name:40}{shape:>24}'
    if row.failure:
        return f'{start}  failed: {row.failure}'
    figures = (
        _number(row.us, '10.1f')
        + _number(row.tflops, '9.0f')
        + _number(row.gbs, '7.0f')
        + _number(row.ratio, '7.2f')
        + _number(row.share, '7.0%')
        + _number(row.error, '10.1e')
    )
    peer = f'  no peer: {row.peer_failure}' if row.peer_failure else ''
    return f'{start}{figures}{"!" if row.poisoned is False else " "}{peer}'


def _number(value: float | None, form: str) -> str:
    return f'{value:{form}}' if value is not None else ' ' * int(form.partition('.')[0])


def machine() -> dict[str, Any]:
    """Device and versions; what cannot be found out is None."""
    device = jax.devices()[0]
    try:
        query = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = None
    try:
        torch = peers.load_torch()
        versions = {'torch': torch.__version__, 'torch_cuda': torch.version.cuda}
    except RuntimeError:
        versions = {'torch': None, 'torch_cuda': None}
    return {
        'device': device.device_kind,
        'driver': driver,
        'jax': jax.__version__,
        'jaxlib': importlib.metadata.version('jaxlib'),
        'platform': device.client.platform_version,
        **versions,
    }


def write_json(
    path: pathlib.Path,
    rows: Sequence[Row],
    ceilings: Ceilings,
    *,
    machine: dict[str, Any],
    command: str,
    timing: str,
) -> None:
    """Writes everything about a run; the file is replaced in one go."""
    result = {
        **machine,
        'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        'command': command,
        'timing': timing,
        'ceilings': dataclasses.asdict(ceilings),
        'rows': [dataclasses.asdict(row) for row in rows],
    }
    temporary = path.with_name(path.name + '.partial')
    temporary.write_text(json.dumps(result, indent=2) + '\n', encoding='utf-8')
    temporary.replace(path)
