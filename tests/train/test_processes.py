"""Several real processes over the loopback device: they train as one, stop as one, and none outlives another."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import yaml

from train import __main__ as command_line
from train import processes
from train.metrics import METRICS_FILE, read_jsonl

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / 'configs' / 'launch'
DEVICES = 4
SMALL = """from __gin__ import dynamic_registration
from deepseek_jax import config
from train import data
from train import run
from train import schedule
from train import sources

include 'train/tiny_cpu.gin'

SEQUENCE_LENGTH = 64
BATCH_SIZE = 8
EVAL_EVERY = 1000
PRECISION = 'fp32'
config.ModelConfig.num_layers = 2
config.ModelConfig.mtp_depth = 0
config.ModelConfig.model_dim = 64
run.train.eval_rows = 8
run.train.ema_decay = 0.9
data.DataConfig.heldout_fraction = 0.2
data.DataConfig.source = @sources.TextDirectory()
sources.TextDirectory.path = '{text}'
# What processes round apart must not grow into another run.
learning_rate/schedule.Schedule.pieces = (('constant', 1e-4, 1.0),)
"""
SECONDS = 200


class Fleet:
    """Processes of one run, each with a log."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.run_dir = folder, folder / 'run'
        self.running: list[subprocess.Popen[bytes]] = []
        text = folder / 'text'
        text.mkdir()
        for index in range(16):
            (text / f'{index}.txt').write_text(' '.join(str(n * n + index) for n in range(4000)))
        (folder / 'small.gin').write_text(SMALL.format(text=text))

    def command(self, *overrides: str) -> list[str]:
        config = str(self.folder / 'small.gin')
        words = [sys.executable, '-m', 'train', '--config', config, '--run-dir', str(self.run_dir)]
        for override in overrides:
            words += ['--set', override]
        return words

    def launch(
        self, words: Sequence[str], log: str, devices: int, folder: pathlib.Path = ROOT
    ) -> subprocess.Popen[bytes]:
        flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={devices}'
        programs = str(self.folder / 'programs')
        environment = os.environ | {
            'XLA_FLAGS': flags,
            'JAX_COMPILATION_CACHE_DIR': programs,
            'PYTHONPATH': str(ROOT),
        }
        with (self.folder / log).open('wb') as output:
            process = subprocess.Popen(words, cwd=folder, env=environment, stdout=output, stderr=output)
        self.running.append(process)
        return process

    def start(
        self,
        count: int,
        *overrides: str,
        each: Callable[[int], Sequence[str]] = lambda index: (),
        folder: Callable[[int], pathlib.Path] = lambda index: ROOT,
    ) -> None:
        """So many processes with all devices together; `each` gives further overrides of one, `folder` where it runs."""
        self.running = []
        address = f'127.0.0.1:{free_port()}'
        for index in range(count):
            together = ['--coordinator', address, '--processes', str(count), '--process', str(index)]
            words = self.command(*overrides, *each(index)) + together
            self.launch(words, f'{index}.log', DEVICES // count, folder(index))

    def codes(self, seconds: float = SECONDS) -> list[int]:
        """The exit codes, once all have ended."""
        end = time.monotonic() + seconds
        return [process.wait(max(end - time.monotonic(), 0.1)) for process in self.running]

    def log(self, name: str) -> str:
        return (self.folder / name).read_text(errors='replace')

    def lines(self) -> list[dict]:
        return [line for line in read_jsonl(self.run_dir / METRICS_FILE) if 'loss' in line]

    def await_steps(self, count: int) -> None:
        end = time.monotonic() + SECONDS
        while len(self.lines()) < count:
            assert all(process.poll() is None for process in self.running), self.log('0.log')
            assert time.monotonic() < end, self.log('0.log')
            time.sleep(0.1)


def free_port() -> int:
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


@pytest.fixture
def fleet(tmp_path) -> Iterator[Fleet]:
    made = Fleet(tmp_path)
    yield made
    for process in made.running:
        process.kill()
        process.wait()


@pytest.mark.timeout(600)
def test_a_run_goes_on_in_another_number_of_processes_on_another_mesh(fleet, tmp_path_factory):
    """Of four processes two and two have the same rows; one of them is asked to stop."""
    steps = 'TOTAL_STEPS = 60'
    fleet.start(
        4, steps, 'parallel.MeshConfig.data = 2', 'parallel.MeshConfig.context = 2', "config.ModelConfig.remat = 'full'"
    )
    fleet.await_steps(5)
    fleet.running[2].send_signal(signal.SIGTERM)
    assert fleet.codes() == [128 + signal.SIGTERM] * 4
    (stopped,) = {re.findall(r'step (\d+) is saved', fleet.log(f'{index}.log'))[-1] for index in range(4)}
    assert 'another process was asked to stop' in fleet.log('0.log')
    assert 'another process' not in fleet.log('2.log')
    assert fleet.lines()[-1]['step'] == int(stopped) < 60

    fleet.start(2, steps, 'parallel.MeshConfig.fsdp = 2', 'parallel.MeshConfig.expert = 2')
    assert fleet.codes() == [0, 0], fleet.log('0.log')
    assert f'from step {stopped} to 60' in fleet.log('0.log')
    together = read_jsonl(fleet.run_dir / METRICS_FILE)

    alone = Fleet(tmp_path_factory.mktemp('alone'))
    (fleet.folder / 'programs').rename(alone.folder / 'programs')
    alone.launch(alone.command(steps), 'alone.log', 1)
    assert alone.codes() == [0], alone.log('alone.log')
    wanted = read_jsonl(alone.run_dir / METRICS_FILE)
    assert [line['step'] for line in together] == [line['step'] for line in wanted]
    for name in ('loss', 'bits_per_byte', 'heldout_loss', 'heldout_bits_per_byte', 'heldout_ema_bits_per_byte'):
        found, exact = ([line[name] for line in lines if name in line] for lines in (together, wanted))
        np.testing.assert_allclose(found, exact, rtol=1e-5, err_msg=name)
        assert found, name


@pytest.mark.timeout(600)
def test_a_lost_process_ends_the_others_and_the_supervisor_starts_them_again(fleet):
    words = fleet.command('TOTAL_STEPS = 40', 'CHECKPOINT_EVERY = 4', 'parallel.MeshConfig.fsdp = 2')
    supervise = str(LAUNCH / 'supervise.sh')
    supervisor = fleet.launch([supervise, '-r', '2', '-p', '1', '2', *words], '0.log', 1)
    fleet.await_steps(6)
    children = subprocess.run(
        ['pgrep', '-P', str(supervisor.pid), '-f', 'train'], capture_output=True, text=True, check=True
    )
    other, victim = sorted(map(int, children.stdout.split()))  # process 0, and the last one
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    while pathlib.Path(f'/proc/{other}').exists():
        assert time.monotonic() - began < 30
        time.sleep(0.1)
    assert fleet.codes() == [0], fleet.log('0.log')
    log = fleet.log('0.log')
    assert re.search(r'error: another process was lost .*: the same command goes on from step \d+', log)
    assert 'supervise: process 1 ended with 137: killed' in log
    assert 'supervise: a process was lost; starting again in 1 s (1 of 2)' in log
    first, second = map(int, re.findall(r'from step (\d+) to 40', log))
    assert first == 0
    assert second % 4 == 0 < second
    assert [line['step'] for line in fleet.lines()] == list(range(1, 41))


@pytest.mark.timeout(300)
def test_what_does_not_fit_together_is_refused_before_anything_is_written(fleet):
    mesh = 'parallel.MeshConfig.fsdp = 4'
    fleet.start(2, mesh, each=lambda index: [f'SEED = {index}'])
    assert fleet.codes() == [2, 2]
    for index in range(2):
        assert 'configuration: process 0 has seed=0, process 1 has seed=1' in fleet.log(f'{index}.log')
    fleet.start(2, 'parallel.MeshConfig.fsdp = 2')
    assert fleet.codes() == [2, 2]
    for index in range(2):
        assert '2 processes must train on all of their 4' in fleet.log(f'{index}.log')
    assert not fleet.run_dir.exists()


@pytest.mark.timeout(300)
def test_a_run_directory_that_is_not_shared_is_refused(fleet):
    """Each process has a directory of this name, where it runs."""
    hosts = [fleet.folder / f'host{index}' for index in range(2)]
    for host in hosts:
        host.mkdir()
    fleet.run_dir = pathlib.Path('run')
    fleet.start(2, 'parallel.MeshConfig.fsdp = 4', folder=lambda index: hosts[index])
    assert fleet.codes() == [2, 2]
    for index in range(2):
        told = 'must see the same directory run, .*: process 0 has model.json=True, process 1 has model.json=False'
        assert re.search(told, fleet.log(f'{index}.log')), fleet.log(f'{index}.log')
    (hosts[0] / 'run' / 'checkpoints').mkdir(parents=True)
    fleet.start(2, 'parallel.MeshConfig.fsdp = 4', folder=lambda index: hosts[index])
    assert fleet.codes() == [2, 2]
    assert 'process 0 has checkpoints=True, process 1 has checkpoints=False' in fleet.log('1.log'), fleet.log('1.log')


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--processes', '2'], 'belong together'),
        (['--coordinator', 'host', '--processes', '2', '--process', '0'], r"'host' must be HOST:PORT"),
        (['--coordinator', 'host:1', '--processes', '2', '--process', '2'], r'--process 2 must lie in 0\.\.1'),
    ],
)
def test_bad_command_lines_are_refused(words, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        sys,
        'argv',
        [
            'train',
            '--config',
            str(ROOT / 'configs' / 'train' / 'tiny_cpu.gin'),
            '--run-dir',
            str(tmp_path / 'run'),
            *words,
        ],
    )
    monkeypatch.setattr(command_line, 'keep_programs', lambda: None)
    assert command_line.main() == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('tasks', 'nodes', 'gpus', 'local', 'wanted'),
    [(16, 2, 8, 3, [3]), (2, 2, 8, 0, [0, 1, 2, 3, 4, 5, 6, 7]), (4, 1, 8, 3, [6, 7]), (2, 1, 0, 1, None)],
)
def test_tasks_share_the_gpus_of_their_node(tasks, nodes, gpus, local, wanted):
    environment = {'SLURM_STEP_NUM_NODES': str(nodes), 'SLURM_GPUS_ON_NODE': str(gpus), 'SLURM_LOCALID': str(local)}
    assert processes._gpus_of_task(tasks, environment) == wanted


def test_tasks_that_cannot_share_gpus_are_refused():
    environment = {'SLURM_STEP_NUM_NODES': '1', 'SLURM_GPUS_ON_NODE': '8', 'SLURM_LOCALID': '0'}
    with pytest.raises(ValueError, match='3 tasks cannot share 8 GPUs of each node evenly'):
        processes._gpus_of_task(3, environment)


def test_sums_of_one_process_are_its_counts():
    assert processes.Sums().begin([0, 7, 2**45 + 3]).value() == [0, 7, 2**45 + 3]


def test_launch_files_say_what_the_command_line_takes(tmp_path):
    jobset = yaml.safe_load((LAUNCH / 'jobset.yaml').read_text())
    name = jobset['metadata']['name']
    (hosts,) = jobset['spec']['replicatedJobs']
    job = hosts['template']['spec']
    pod = job['template']['spec']
    (container,) = pod['containers']
    values = {entry['name']: entry['value'] for entry in container['env']}
    assert job['completionMode'] == 'Indexed'
    assert job['parallelism'] == job['completions'] == int(values['PROCESSES'])
    port = container['ports'][0]['containerPort']
    assert values['COORDINATOR'] == f'{name}-{hosts["name"]}-0-0.{name}:{port}'
    claimed = {volume['name'] for volume in pod['volumes']}
    assert {mount['name'] for mount in container['volumeMounts']} == claimed
    # The command itself, on as many devices as the pods have, up to where it would begin.
    script = container['command'][-1].removeprefix('exec python').replace('"$JOB_COMPLETION_INDEX"', '0')
    gpus = job['completions'] * int(container['resources']['limits']['nvidia.com/gpu'])
    checked = subprocess.run(
        ['bash', '-c', f'{sys.executable} {script} --print'],
        cwd=ROOT,
        env=os.environ | values,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr
    sizes = re.findall(r'^parallel\.MeshConfig\.(data|fsdp|expert|context) = (\d+)$', checked.stdout, re.MULTILINE)
    assert np.prod([int(size) for _, size in sizes]) == gpus
    for script in ('supervise.sh', 'slurm.sbatch'):
        subprocess.run(['bash', '-n', str(LAUNCH / script)], check=True)


@pytest.mark.parametrize('words', [[], ['0', 'python'], ['two', 'python'], ['2']])
def test_the_supervisor_refuses_a_bad_command(words):
    done = subprocess.run([str(LAUNCH / 'supervise.sh'), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert 'usage' in done.stderr


@pytest.mark.parametrize(('code', 'starts', 'ended'), [(0, 1, 0), (1, 1, 1), (2, 1, 2), (143, 1, 143), (75, 3, 75)])
def test_the_supervisor_starts_again_what_may_succeed(code, starts, ended, tmp_path):
    program = tmp_path / 'program'
    program.write_text(
        f'#!{sys.executable}\nopen({str(tmp_path / "starts")!r}, "a").write("x")\nraise SystemExit({code})\n'
    )
    program.chmod(0o755)
    words = [str(LAUNCH / 'supervise.sh'), '-r', '2', '-p', '0', '1', str(program)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == ended, done.stderr
    assert (tmp_path / 'starts').read_text() == 'x' * starts
