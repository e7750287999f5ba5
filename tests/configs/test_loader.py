import dataclasses

import pytest

from configs import loader
from tests.conftest import ROOT

CONFIG = """
from __gin__ import dynamic_registration
from deepseek_jax import config

RECIPE = 'fp32'
WIDTH = 8

config.MLAConfig.num_heads = 2
config.MLAConfig.nope_head_dim = %WIDTH
config.MLAConfig.rope_head_dim = 4
config.MLAConfig.value_head_dim = %WIDTH
config.MLAConfig.kv_rank = 16
config.PrecisionConfig.recipe = %RECIPE
"""


@pytest.fixture
def file(tmp_path):
    """Writes a configuration file; more text may follow."""

    def file(more: str = '', name: str = 'own.gin'):
        (tmp_path / name).write_text(CONFIG + more)
        return tmp_path / name

    return file


@pytest.fixture
def built():
    """What the current configuration makes of a class of `deepseek_jax.config`."""
    from deepseek_jax import config

    return lambda name, **arguments: loader.call(getattr(config, name), **arguments)


def test_call_binds_what_the_file_says_and_arguments_on_top(file, built):
    loader.parse(file())
    mla = built('MLAConfig')
    assert dataclasses.asdict(mla) == {
        'num_heads': 2, 'nope_head_dim': 8, 'rope_head_dim': 4, 'value_head_dim': 8, 'kv_rank': 16,
        'query_rank': None, 'latent_norm_eps': 1e-6,
    }  # fmt: skip
    assert built('MLAConfig', kv_rank=32) == dataclasses.replace(mla, kv_rank=32)


def test_overrides_replace_macros_and_bindings_in_order(file, built):
    loader.parse(file(), ['WIDTH = 16', 'config.MLAConfig.kv_rank = 24', 'WIDTH = 12'])
    mla = built('MLAConfig')
    assert (mla.nope_head_dim, mla.value_head_dim, mla.kv_rank) == (12, 12, 24)


def test_parse_forgets_the_configuration_before(file, built):
    loader.parse(file(), ['WIDTH = 16', 'config.MLAConfig.query_rank = 6'])
    built('MLAConfig')
    loader.parse(file())
    assert 'MLAConfig' not in loader.operative_config()
    mla = built('MLAConfig')
    assert (mla.nope_head_dim, mla.query_rank) == (8, None)


def test_operative_config_is_what_was_used_with_defaults(file, built):
    loader.parse(file())
    built('MLAConfig')
    text = loader.operative_config()
    assert 'WIDTH = 8\n' in text
    assert 'RECIPE' not in text, 'nothing has asked for it'
    built('PrecisionConfig')
    assert "RECIPE = 'fp32'\n" in loader.operative_config()


def test_operative_config_holds_defaults(tmp_path, monkeypatch):
    # Not a class of the project: the wrapper that checks annotations in tests hides defaults.
    (tmp_path / 'rooms.py').write_text('def area(*, width, height=2.5):\n    return width * height\n')
    (tmp_path / 'own.gin').write_text('from __gin__ import dynamic_registration\nimport rooms\nrooms.area.width = 2\n')
    monkeypatch.syspath_prepend(tmp_path)
    loader.parse(tmp_path / 'own.gin')
    import rooms  # pyright: ignore[reportMissingImports]

    assert loader.call(rooms.area) == 5
    assert 'rooms.area.height = 2.5\nrooms.area.width = 2\n' in loader.operative_config()


@pytest.mark.parametrize('folder', ['.', '/', 'tests'])
def test_includes_are_found_from_any_folder(file, built, monkeypatch, folder):
    monkeypatch.chdir(ROOT / folder)
    loader.parse(file("PRECISION = 'bf16'\ninclude 'model/tiny.gin'\n"))
    assert built('ModelConfig').model_dim == 128


def test_files_are_found_by_relative_path(file, built, tmp_path, monkeypatch):
    file()
    monkeypatch.chdir(tmp_path)
    loader.parse('own.gin')
    assert built('MLAConfig').kv_rank == 16


def test_later_lines_win_over_included_ones(file, built):
    loader.parse(file("PRECISION = 'bf16'\ninclude 'model/tiny.gin'\nconfig.ModelConfig.model_dim = 64\n"))
    assert built('ModelConfig').model_dim == 64


def refused(path, overrides=()) -> str:
    with pytest.raises(loader.ConfigError) as error:
        loader.parse(path, overrides)
    message = str(error.value)
    assert '\n' not in message
    assert len(message) < 300
    return message


@pytest.mark.parametrize(
    ('override', 'rule'),
    [
        ('WIDHT = 3', "no macro named 'WIDHT'"),
        ('WIDTH', "the form 'NAME = value'"),
        ('WIDTH =', 'Unable to parse'),
        ('WIDTH = 3 4', 'Expected newline'),
        ('config.MLAConfig.width = 3', "doesn't have a parameter named 'width'"),
        ('config.MLAConfigs.kv_rank = 3', 'No configurable matching'),
        ('no.such.name = 3', "No configurable matching 'no.such'"),
        ('config.ModelConfig.mla = @config.NoSuch()', 'No configurable matching'),
    ],
)
def test_bad_override_is_named_with_its_rule(file, override, rule):
    message = refused(file(), [override])
    assert message.startswith(f'--set {override!r}')
    assert rule in message


@pytest.mark.parametrize(
    ('line', 'words'),
    [
        ('WIDTH = = 3', ['Unable to parse value', 'own.gin', 'line 14']),
        ('config.MLAConfig.width = 3', ["'width'", 'own.gin']),
        ('config.RopeConfig.theta = %NO_SUCH', ['NO_SUCH']),
        ("include 'model/no_such.gin'", ['model/no_such.gin']),
        ('import no_such_module', ['no_such_module']),
        ('from deepseek_jax import no_such', ['no_such']),
    ],
)
def test_bad_line_of_a_file_is_named(file, line, words):
    message = refused(file(line + '\n'))
    assert all(word in message for word in words), message


def test_missing_file_is_named(tmp_path):
    assert refused(tmp_path / 'gone.gin') == f"configuration file '{tmp_path / 'gone.gin'}' does not exist"
    assert 'does not exist' in refused(tmp_path)


def test_a_refused_file_leaves_the_next_one_alone(file, built):
    refused(file('config.MLAConfig.kv_rank = 99\nWIDTH = = 3\n'))
    loader.parse(file())
    assert built('MLAConfig').kv_rank == 16


def test_missing_value_is_named(file, built):
    loader.parse(file())
    with pytest.raises(loader.ConfigError, match="^[^\n]*'num_experts'[^\n]*$"):
        built('MoEConfig')


def test_function_that_nothing_configures_is_named(file):
    def unknown(*, width):
        return width

    loader.parse(file())
    with pytest.raises(loader.ConfigError, match='binds no argument of .*unknown$'):
        loader.call(unknown)


def test_error_of_the_called_passes_through(file, built):
    loader.parse(file(), ['config.MLAConfig.rope_head_dim = 3'])
    with pytest.raises(ValueError, match='rope_head_dim=3 must be even') as error:
        built('MLAConfig')
    assert not isinstance(error.value, loader.ConfigError)
