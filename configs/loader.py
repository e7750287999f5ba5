"""Reads .gin files: the only module that imports gin.

Our code carries no gin decorators. A file imports the modules it configures (`from deepseek_jax import config`) and
binds their keyword arguments; `include 'model/tiny.gin'` is looked up in this folder.
"""

import logging
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import gin

_FOLDER = pathlib.Path(__file__).parent
_MACRO = re.compile(r'\s*([A-Za-z_]\w*)\s*=')
_ERRORS = (ValueError, SyntaxError, ImportError, AttributeError, OSError, RuntimeError)
# What gin appends to a message: where in an override, during which call, the whole configuration.
_CONTEXT = re.compile(r'\n\s*In (?:bindings string|call to configurable)| in config string:')

gin.add_config_file_search_path(_FOLDER)


class ConfigError(ValueError):
    """A configuration that cannot be used: one line with the name or value and the rule."""


def parse(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> None:
    """Makes the bindings of a file, then those of `overrides` (`'NAME = value'`), the current configuration.

    Raises `ConfigError` for a missing file, a name that nothing bears, or a value that does not parse.
    """
    gin.clear_config()
    if not pathlib.Path(path).is_file():
        raise ConfigError(f'configuration file {str(path)!r} does not exist')
    # gin logs an error for every folder that it does not find an included file in, before the one that has it.
    logging.disable(logging.ERROR)
    try:
        gin.parse_config_file(str(path))
        for override in overrides:
            _check_macro(override)
            try:
                gin.parse_config(override)
            except _ERRORS as error:
                raise ConfigError(f'--set {override!r}: {_one_line(error)}') from None
        gin.finalize()
    except ConfigError:
        raise
    except _ERRORS as error:
        raise ConfigError(_one_line(error)) from None
    finally:
        logging.disable(logging.NOTSET)


def call[Result](function: Callable[..., Result], **arguments: Any) -> Result:
    """Calls `function` with the configured keyword arguments, and `arguments` on top.

    What the function itself raises passes through. Raises `ConfigError` for an argument that is not configured.
    """
    try:
        configured = gin.get_configurable(function)
    except ValueError:
        name = f'{function.__module__}.{function.__qualname__}'
        raise ConfigError(f'the configuration binds no argument of {name}') from None
    try:
        return configured(**arguments)
    except TypeError as error:
        if 'required keyword-only argument' in str(error):
            raise ConfigError(_one_line(error)) from None
        raise


def operative_config() -> str:
    """Every binding that was used so far, defaults included, as text that `parse` reads."""
    return gin.operative_config_str(max_line_length=100)


def _check_macro(override: str) -> None:
    match = _MACRO.match(override)
    if match is None:
        if '=' not in override:
            raise ConfigError(f"--set {override!r} must have the form 'NAME = value'")
        return
    try:
        gin.query_parameter(f'%{match[1]}')
    except ValueError:
        raise ConfigError(f'--set {override!r}: the configuration has no macro named {match[1]!r}') from None


def _one_line(error: Exception) -> str:
    return ' '.join(_CONTEXT.split(str(error))[0].split())
