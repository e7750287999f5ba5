"""Rules of the project that linters cannot hold: what a file may import and contain, and that the set-up is in force."""

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from packaging.requirements import Requirement

from deepseek_jax import norm

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ('configs', 'deepseek_jax', 'infer', 'pallas_kernels', 'train')
CODE = (*PACKAGES, 'benchmarks', 'notebooks', 'tests')

PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']


def python_files(*folders: str) -> list[Path]:
    """Python files below top-level folders, relative to the root, sorted."""
    return sorted(path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob('*.py'))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything a file imports, in functions too: `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = '.' * node.level + (node.module or '')
            yield from ((node.lineno, f'{prefix}.{alias.name}') for alias in node.names)


def top_level(name: str) -> str:
    return name.partition('.')[0]


def repository_files() -> list[Path]:
    """Files that git tracks or would add, relative to the root. Skips the test outside a git checkout."""
    if not (ROOT / '.git').exists():
        pytest.skip('not a git checkout')
    command = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split('\0')
    return sorted(Path(name) for name in names if name and (ROOT / name).is_file())


def test_packages_have_an_init_and_modules():
    for package in PACKAGES:
        assert (ROOT / package / '__init__.py').is_file(), package
    missing = {path.parent for path in python_files(*PACKAGES) if not (ROOT / path.parent / '__init__.py').is_file()}
    assert not missing, 'folders of modules without __init__.py are not installed'


def test_annotations_are_never_postponed():
    offenders = [path for path in python_files(*CODE) for _, name in imports(path) if name == '__future__.annotations']
    assert not offenders, 'the shape checks need annotations to be objects'


def test_imports_are_absolute():
    assert not [(path, line) for path in python_files(*CODE) for line, name in imports(path) if name.startswith('.')]


def test_pallas_kernels_imports_jax_and_numpy_only():
    allowed = {'jax', 'jaxtyping', 'numpy', 'pallas_kernels', *sys.stdlib_module_names}
    bench = Path('pallas_kernels/bench')
    offenders = [
        (str(path), line, name)
        for path in python_files('pallas_kernels')
        for line, name in imports(path)
        if top_level(name) not in allowed and not (bench in path.parents and top_level(name) == 'matplotlib')
    ]
    assert not offenders


def test_kernels_do_not_import_their_benchmark():
    bench = Path('pallas_kernels/bench')
    offenders = [
        (str(path), line, name)
        for path in python_files('pallas_kernels')
        for line, name in imports(path)
        if bench not in path.parents and name.startswith('pallas_kernels.bench')
    ]
    assert not offenders


def test_command_line_flags_stay_in_main_modules():
    offenders = [
        (str(path), line, name)
        for path in python_files(*PACKAGES)
        for line, name in imports(path)
        if path.name != '__main__.py' and top_level(name) in {'argparse', 'click', 'typer'}
    ]
    assert not offenders


def test_outside_libraries_are_declared():
    declared = {Requirement(line).name.replace('_', '-').lower() for line in PROJECT['dependencies']}
    distribution = {'gin': 'gin-config', 'orbax': 'orbax-checkpoint'}
    offenders = [
        (str(path), line, name)
        for path in python_files(*PACKAGES)
        for line, name in imports(path)
        if (top := top_level(name)) not in sys.stdlib_module_names
        and top not in PACKAGES
        and distribution.get(top, top.replace('_', '-')) not in declared
    ]
    assert not offenders


def test_constraints_pin_every_dependency_within_its_range():
    lines = (ROOT / 'constraints.txt').read_text().split()
    pins = dict(line.split('==') for line in lines)
    pins = {name.replace('_', '-').lower(): version for name, version in pins.items()}
    groups = [PROJECT['dependencies'], PROJECT['optional-dependencies']['dev']]
    for requirement in map(Requirement, (line for group in groups for line in group)):
        assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_cuda_extra_asks_for_the_same_jax():
    (plain,) = (line for line in PROJECT['dependencies'] if Requirement(line).name == 'jax')
    (cuda,) = PROJECT['optional-dependencies']['cuda']
    assert cuda == plain.replace('jax', 'jax[cuda13]', 1)


def test_files_name_no_machine_and_no_package_index():
    folders = '|'.join(('work', 'root', 'farm'))
    hosts = '|'.join(('index' + '-url', 'extra' + '-index', r'https?://[\w.:-]*/simple', r'resolved"?: *"https?:'))
    pattern = re.compile(rf'/({folders})/|/(home|Users)/\w+/|{hosts}'.encode())
    offenders = [
        f'{path}:{number}'
        for path in repository_files()
        if b'\0' not in (data := (ROOT / path).read_bytes())
        for number, line in enumerate(data.splitlines(), 1)
        if pattern.search(line)
    ]
    assert not offenders


def test_files_are_small():
    assert not [path for path in repository_files() if (ROOT / path).stat().st_size > 1_500_000]


@pytest.mark.parametrize('package', ['deepseek_jax', 'infer', 'pallas_kernels', 'train'])
def test_annotations_of_a_package_are_checked(package):
    loader = importlib.import_module(package).__spec__.loader
    assert type(loader).__module__.startswith('jaxtyping'), 'imported before the import hook was installed'


def test_a_wrong_shape_raises():
    # Without the hook a scale of one element would broadcast.
    with pytest.raises(jaxtyping.TypeCheckError, match='scale_D'):
        norm.rms_norm(jnp.ones((2, 3)), jnp.ones(1), 1e-6)


def test_eight_devices_run_queued_collectives():
    if jax.default_backend() != 'cpu':
        pytest.skip('virtual devices are CPU devices')
    assert jax.device_count() == 8
    assert int(os.environ['NPROC']) >= 16
    mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec('x')
    step = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, 'x') / 8 + x, mesh=mesh, in_specs=spec, out_specs=spec))
    x = jnp.zeros(8)
    outs = [step(x) for _ in range(300)]
    assert all((out == 0).all() for out in outs)
