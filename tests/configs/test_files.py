"""The files that come with the project say what they do: nothing missing, nothing unused, nothing wrong in a comment."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs import loader
from deepseek_jax import config, flops
from tests.conftest import ROOT
from train import __main__, run, schedule, sources

CONFIGS = ROOT / 'configs'
MODELS = sorted(path.stem for path in (CONFIGS / 'model').glob('*.gin'))
RUNS = sorted(path.stem for path in (CONFIGS / 'train').glob('*.gin') if path.stem != 'base')
MACROS = {'TOTAL_STEPS', 'CHECKPOINT_EVERY', 'EVAL_EVERY', 'BATCH_SIZE', 'SEQUENCE_LENGTH', 'PRECISION', 'SEED'}
COUNTS_671B = '671.03 B parameters, 36.62 B active, 11.61 B more in MTP'


def resolve(path: Path, *overrides: str) -> tuple[dict[str, Any], str]:
    """What `--print` does with a file, but for the counts: the arguments of `train`, the operative configuration."""
    arguments: dict[str, Any] = {}
    check_arguments = run._check_arguments

    def check_and_keep(given):
        check_arguments(given)
        arguments.update(given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, '_check_arguments', check_and_keep)
        patch.setattr(run, '_describe', lambda *_: '')
        loader.parse(path, overrides)
        assert loader.call(run.train, print_only=True) is None
    for name in ('run_dir', 'config_text', 'print_only'):
        arguments.pop(name)
    return arguments, loader.operative_config()


@pytest.fixture(scope='module')
def resolved() -> dict[str, tuple[dict[str, Any], str]]:
    """Every file of configs/train but base.gin, resolved."""
    return {name: resolve(CONFIGS / 'train' / f'{name}.gin') for name in RUNS}


@pytest.fixture
def printed(monkeypatch, capsys) -> Callable[[str], list[str]]:
    """The lines that `python -m train --print` writes for a file of configs/train."""

    def printed(name: str) -> list[str]:
        file = CONFIGS / 'train' / f'{name}.gin'
        monkeypatch.setattr('sys.argv', ['train', '--config', str(file), '--run-dir', 'not_made', '--print'])
        assert __main__.main() == 0
        out, err = capsys.readouterr()
        assert err == ''
        return out.splitlines()

    return printed


def bindings(text: str) -> set[str]:
    """Names of macros and parameters that a file's own lines bind."""
    return set(re.findall(r'^([\w./]+)\s*=', text, re.MULTILINE))


def own_and_parts(path: Path) -> set[str]:
    """What a file binds and what the parts bind that it includes. An included run file answers for its own lines."""
    text = path.read_text()
    parts = [CONFIGS / name for name in re.findall(r"^include '(.+)'", text, re.MULTILINE)]
    return bindings(text).union(*(own_and_parts(part) for part in parts if part.stem not in RUNS))


def test_the_project_comes_with_these_files():
    assert {'tiny_cpu', 'v3_671b', 'v3_671b_32k', 'v3_671b_128k'} <= set(RUNS)
    assert {'small_h100', 'v2_lite_h100', 'v3_slice_h100'} <= set(RUNS)
    assert {'tiny', 'small', 'small_h100', 'v3_slice', 'v3_671b'} <= set(MODELS)


@pytest.mark.parametrize('name', RUNS)
def test_every_binding_of_a_run_file_is_used(resolved, name):
    bound = own_and_parts(CONFIGS / 'train' / f'{name}.gin')
    assert len(bound) > 8
    assert bound - bindings(resolved[name][1]) == set()


@pytest.mark.parametrize('name', RUNS)
def test_every_promised_macro_is_there_and_used(resolved, name):
    arguments, text = resolved[name]
    assert bindings(text) >= MACROS
    recipe = 'fp32' if arguments['model'].precision.recipe == 'bf16' else 'bf16'
    changed, _ = resolve(
        CONFIGS / 'train' / f'{name}.gin',
        'TOTAL_STEPS = 11', 'CHECKPOINT_EVERY = 12', 'EVAL_EVERY = 13', 'BATCH_SIZE = 15000', 'SEQUENCE_LENGTH = 14',
        f"PRECISION = '{recipe}'", 'SEED = 16',
    )  # fmt: skip
    names = ('total_steps', 'checkpoint_every', 'eval_every', 'batch_size', 'sequence_length', 'seed')
    assert [changed[name] for name in names] == [11, 12, 13, 15000, 14, 16]
    assert changed['model'].precision.recipe == recipe


@pytest.mark.parametrize('name', RUNS)
def test_saved_configuration_binds_the_same_values(resolved, name, tmp_path, monkeypatch):
    arguments, text = resolved[name]
    (tmp_path / 'config.gin').write_text(text)
    monkeypatch.chdir(tmp_path)
    again, text_again = resolve(Path('config.gin'))
    assert again == arguments
    assert text_again == text


def test_saved_configuration_holds_overrides(tmp_path):
    path = CONFIGS / 'train' / 'tiny_cpu.gin'
    pieces = "(('linear', 1e-4, 0.25), ('cosine', 0.0, 0.5))"
    arguments, text = resolve(path, f'learning_rate/schedule.Schedule.pieces = {pieces}', 'SEED = 7')
    (tmp_path / 'config.gin').write_text(text)
    assert resolve(tmp_path / 'config.gin')[0] == arguments
    assert arguments['optimizer'].learning_rate.pieces == (('linear', 1e-4, 0.25), ('cosine', 0.0, 0.5))
    assert arguments['seed'] == 7


@pytest.mark.parametrize('name', RUNS)
def test_print_shows_counts_and_configuration_and_trains_nothing(resolved, printed, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = printed(name)
    if '671b' in name:
        assert lines[0] == COUNTS_671B
    arguments, text = resolved[name]
    tokens = schedule.total_tokens(
        *(arguments[name] for name in ('total_steps', 'batch_size', 'sequence_length', 'batch_ramp'))
    )
    assert lines[1].endswith(f'; {tokens:,} tokens in the run')
    assert lines[2:] == text.splitlines()
    assert list(tmp_path.iterdir()) == []


def test_published_pretraining(resolved):
    """Section 4.2 of the report."""
    arguments = resolved['v3_671b'][0]
    model, optimizer, data = arguments['model'], arguments['optimizer'], arguments['data']
    assert (model.num_layers, model.num_dense_layers, model.model_dim, model.init_std) == (61, 3, 7168, 0.006)
    assert (model.moe.num_experts, model.moe.top_k, model.moe.top_groups, model.moe.num_groups) == (256, 8, 4, 8)
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.95, 0.1, 1.0)
    assert (optimizer.warmup_steps, optimizer.moment_dtype) == (2000, 'bfloat16')
    assert (arguments['sequence_length'], arguments['batch_size'], data.fim_rate) == (4096, 15360, 0.1)
    assert not data.mask_documents


@pytest.mark.parametrize(
    ('name', 'length', 'batch_size', 'start'),
    [('v3_671b_32k', 32768, 1920, 'runs/v3_671b'), ('v3_671b_128k', 131072, 480, 'runs/v3_671b_32k')],
)
def test_published_extensions(resolved, name, length, batch_size, start):
    """Section 4.3 of the report: 1,000 steps each at the last learning rate of the pretraining."""
    arguments = resolved[name][0]
    names = ('sequence_length', 'batch_size', 'total_steps', 'init_from', 'batch_ramp')
    assert [arguments[name] for name in names] == [length, batch_size, 1000, start, None]
    assert arguments['model'].rope.yarn == config.YarnConfig(scale=40.0, original_length=4096)
    rate = arguments['optimizer'].learning_rate
    assert rate(0, 1) == rate(1000 * length * batch_size, 1) == 7.3e-6
    assert arguments['optimizer'].warmup_steps == 0


def test_tiny_run_fits_a_small_machine(resolved):
    arguments = resolved['tiny_cpu'][0]
    assert flops.count_parameters(arguments['model']).total < 5e6
    assert arguments['total_steps'] * arguments['batch_size'] * arguments['sequence_length'] < 5e6
    assert arguments['data'].tokenizer == 'bytes'


H100_RUNS = ('small_h100', 'v2_lite_h100', 'v3_slice_h100')


@pytest.mark.parametrize('name', H100_RUNS)
def test_runs_for_one_gpu_have_widths_that_the_kernels_serve(resolved, name):
    model = resolved[name][0]['model']
    mla, moe = model.mla, model.moe
    assert (mla.nope_head_dim, mla.rope_head_dim, mla.value_head_dim) == (128, 64, 128)
    widths = (model.model_dim, model.dense_ffn_dim, mla.kv_rank, mla.query_rank or 128, moe.ffn_dim)
    assert [width for width in widths if width % 128] == []


@pytest.mark.parametrize('name', H100_RUNS)
def test_runs_for_one_gpu_leave_memory_for_activations(resolved, name):
    """Of 80 GB: float32 masters and gradients (twice if they are added up), bfloat16 moments, float8 weights twice."""
    arguments = resolved[name][0]
    counts = flops.count_parameters(arguments['model'])
    parts = arguments['batch_size'] // arguments['microbatch_size']
    size = 4 + 2 + 2 + 4 * (1 + (parts > 1)) + 2
    assert (counts.total + counts.mtp) * size < 65e9


@pytest.mark.parametrize('name', H100_RUNS)
def test_runs_for_one_gpu_take_their_microbatch_from_a_macro_and_their_text_from_the_machine(resolved, name):
    arguments = resolve(CONFIGS / 'train' / f'{name}.gin', 'BATCH_SIZE = 24', 'MICROBATCH = 6')[0]
    assert arguments['microbatch_size'] == 6
    assert arguments['data'].source == sources.InstalledPython()
    assert arguments['data'].cache_dir is not None
    assert arguments['model'].remat == 'paper'
    assert resolved[name][0]['model'].precision.recipe == 'fp8'


def test_slice_has_the_widths_of_the_671b_model(resolved):
    piece, whole = (resolved[name][0]['model'] for name in ('v3_slice_h100', 'v3_671b'))
    shorter = {'num_layers': piece.num_layers, 'num_dense_layers': piece.num_dense_layers, 'remat': piece.remat}
    experts = dataclasses.replace(whole.moe, num_experts=piece.moe.num_experts, num_groups=1, top_groups=1)
    assert piece == dataclasses.replace(whole, moe=experts, **shorter)
    assert (piece.num_dense_layers, piece.num_moe_layers, piece.mtp_depth) == (1, 2, 1)


def test_v2_lite_run_is_the_published_shape_but_for_what_its_head_says(resolved, models):
    cut = {'num_layers': 5, 'vocab_size': 129280, 'dense_ffn_dim': 11008, 'remat': 'paper'}
    head = (CONFIGS / 'train' / 'v2_lite_h100.gin').read_text().partition('from __gin__')[0].replace(',', '')
    for word in ('5 of its 27 layers', '129280', '11008'):
        assert word in head
    whole = dataclasses.replace(models['v2_lite_shape'][0], precision=resolved['v2_lite_h100'][0]['model'].precision)
    assert resolved['v2_lite_h100'][0]['model'] == dataclasses.replace(whole, **cut)


@pytest.fixture(scope='module')
def models(tmp_path_factory) -> dict[str, tuple[config.ModelConfig, str]]:
    """Every file of configs/model, with the macros that its head says it needs."""
    folder = tmp_path_factory.mktemp('models')
    made = {}
    for name in MODELS:
        text = (CONFIGS / 'model' / f'{name}.gin').read_text()
        needs = re.findall(r'^# Needs: (.+)\.$', text, re.MULTILINE)
        assert needs == ['PRECISION'], name
        (folder / f'{name}.gin').write_text(f"include 'model/{name}.gin'\nPRECISION = 'bf16'\n")
        loader.parse(folder / f'{name}.gin')
        made[name] = (loader.call(config.ModelConfig), loader.operative_config())
    return made


@pytest.mark.parametrize('name', MODELS)
def test_every_binding_of_a_model_file_is_used_and_every_field_is_bound(models, name):
    bound = own_and_parts(CONFIGS / 'model' / f'{name}.gin')
    assert bound - bindings(models[name][1]) == set()
    parts = (config.ModelConfig, config.MLAConfig, config.MoEConfig, config.RopeConfig, config.PrecisionConfig)
    fields = {f'config.{part.__name__}.{field.name}' for part in parts for field in dataclasses.fields(part)}
    # Left to their defaults: what changes no value, and what is the same in all published models.
    assert fields - bound <= {'config.ModelConfig.scan_unroll', 'config.MLAConfig.latent_norm_eps'}


@pytest.mark.parametrize(
    ('name', 'total', 'active'),
    [
        ('v3_671b', '671 B parameters', '37 B active'),
        ('v2_lite_shape', '15.7 B parameters', '2.4 B active'),
        ('moonlight_16b', '16 B parameters', '3 B active'),
        ('small', '0.55 B parameters', '0.18 B of them active'),
        ('small_h100', '0.53 B parameters', '0.17 B of them active'),
        ('v3_slice', '3.60 B parameters', '2.68 B of them active'),
        ('tiny', 'model of 2 M parameters', ''),
    ],
)
def test_counts_in_the_head_of_a_model_file_are_right(models, name, total, active):
    head = (CONFIGS / 'model' / f'{name}.gin').read_text().splitlines()[0]
    counts = flops.count_parameters(models[name][0])
    for words, count in ((total, counts.total), (active, counts.active)):
        assert words in head
        if match := re.search(r'([\d.]+) ([BM])', words):
            # Authors round up or down: within one of the last digit.
            last_digit = 10.0 ** -len(match[1].partition('.')[2])
            assert abs(count / {'B': 1e9, 'M': 1e6}[match[2]] - float(match[1])) < last_digit
