"""Notebooks run from top to bottom in a checkout where nothing has been trained yet."""

import os
import tempfile
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ('configs', 'deepseek_jax', 'infer', 'pallas_kernels', 'train')
SHORT_RUN = (
    'TOTAL_STEPS = 2',
    'EVAL_EVERY = 1',
    'CHECKPOINT_EVERY = 2',
    'BATCH_SIZE = 2',
    'SEQUENCE_LENGTH = 32',
    'run.train.eval_rows = 2',
)


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A folder with the project's packages and no runs, and an environment that names none."""
    for package in PACKAGES:
        (tmp_path / package).symlink_to(ROOT / package)
    (tmp_path / 'notebooks').mkdir()
    monkeypatch.delenv('DEEPSEEK_RUN', raising=False)
    monkeypatch.setenv('IPYTHONDIR', str(tmp_path / 'ipython'))
    # Two steps of training do not repay what optimising their code takes.
    monkeypatch.setenv('XLA_FLAGS', f'{os.environ["XLA_FLAGS"]} --xla_backend_optimization_level=0')
    return tmp_path


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Runs the cells in `folder` with this interpreter, whatever kernels are registered; outputs go to the cells.

    Raises `CellExecutionError` if a cell fails.
    """
    # Sockets in a folder of their own: other tests look for free ports at the same time. Their paths must be short.
    with tempfile.TemporaryDirectory() as sockets:
        manager = AsyncKernelManager(
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
            connection_file=str(Path(sockets) / 'kernel.json'),
            transport='ipc',
        )
        resources = {'metadata': {'path': str(folder)}}
        nbclient.NotebookClient(notebook, km=manager, resources=resources, timeout=240).execute(cleanup_kc=True)


def tagged(notebook: nbformat.NotebookNode, tag: str) -> nbformat.NotebookNode:
    (cell,) = (cell for cell in notebook.cells if tag in cell.metadata.get('tags', ()))
    return cell


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get('outputs', ())]


def printed(notebook: nbformat.NotebookNode, stream: str) -> str:
    return ''.join(output.text for output in outputs(notebook) if output.get('name') == stream)


def test_model_notebook_trains_and_shows_a_run(checkout):
    notebook = jupytext.read(ROOT / 'notebooks/01_model.py')
    parameters = tagged(notebook, 'parameters')
    assert parameters.source.startswith('SHORT_RUN = ')
    parameters.source = f'SHORT_RUN = {SHORT_RUN}'
    execute(notebook, checkout / 'notebooks')

    assert (checkout / 'runs/notebook/checkpoints/2').is_dir()
    assert sum('image/png' in output.get('data', {}) for output in outputs(notebook)) == 4
    text = printed(notebook, 'stdout')
    (v3,) = (line.split() for line in text.splitlines() if line.startswith('v3_671b'))
    assert v3 == ['v3_671b', '68.6', 'KiB', '4.77', 'MiB', '71.1x']
    assert 'absorbed steps against one expanded pass' in text
    assert text.count('--- temperature') == 4
    assert 'Warning' not in printed(notebook, 'stderr')
