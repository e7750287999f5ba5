"""Run directories: what `python -m train` leaves behind, read back as a configuration and parameters.

A run directory holds `model.json` (the model and its tokenizer) and `checkpoints/STEP/` with the checkpointables
`params`, `optimizer` and `progress`.
"""

import json
import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp

from deepseek_jax import config as config_lib
from deepseek_jax import model, names

MODEL_FILE = 'model.json'
CHECKPOINTS = 'checkpoints'
PARAMS = 'params'


def load_run(directory: str | os.PathLike, step: int | None = None) -> tuple[config_lib.ModelConfig, dict[str, Any]]:
    """The configuration and parameters of a run's newest checkpoint, or of the one at `step`.

    Raises:
      FileNotFoundError: the directory is no run directory, or has no such checkpoint.
      ValueError: the checkpoint's parameters are not those of the configuration.
    """
    directory = pathlib.Path(directory)
    config = read_model_file(directory)[0]
    with ocp.training.Checkpointer(str((directory / CHECKPOINTS).absolute())) as checkpointer:
        steps = [checkpoint.step for checkpoint in checkpointer.checkpoints]
        if not steps or (step is not None and step not in steps):
            wanted = 'no checkpoint' if step is None else f'no checkpoint of {step=}; it has {sorted(steps)}'
            raise FileNotFoundError(f'{directory / CHECKPOINTS} holds {wanted}')
        step = max(steps) if step is None else step
        shapes = jax.eval_shape(lambda key: model.init(key, config), jax.random.key(0))
        # Wherever they lay when they were saved.
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shapes = jax.tree.map(lambda leaf: leaf.update(sharding=here), shapes)
        return config, load_parts(checkpointer, step, {PARAMS: shapes})[PARAMS]


def load_parts(checkpointer: ocp.training.Checkpointer, step: int, parts: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpointables of `parts`, given as trees of shapes, after a check of every shape.

    Raises `ValueError` naming the first array that differs.
    """
    found = checkpointer.checkpointables_metadata(step).metadata
    for part, wanted in parts.items():
        if part not in found:
            raise ValueError(f'checkpoint {step} of {checkpointer.directory} has no part {part!r}')
        _check_shapes(part, dict(_shapes(found[part])), dict(_shapes(wanted)))
    with warnings.catch_warnings():
        # Without a sharding in the wanted shapes the stored one is used, which is meant.
        warnings.filterwarnings('ignore', message='Sharding info not provided')
        return dict(checkpointer.load_checkpointables(step, dict(parts)))


def write_model_file(directory: pathlib.Path, config: config_lib.ModelConfig, tokenizer: str) -> None:
    """Writes the model and the name of its tokenizer: 'bytes' or a file of the directory."""
    text = json.dumps({'model': config_lib.to_dict(config), 'tokenizer': tokenizer}, indent=2)
    (directory / MODEL_FILE).write_text(text + '\n', encoding='utf-8')


def read_model_file(directory: pathlib.Path) -> tuple[config_lib.ModelConfig, str]:
    """The model of a run directory and the name of its tokenizer."""
    path = directory / MODEL_FILE
    if not path.is_file():
        raise FileNotFoundError(f'{directory} is not a run directory: it holds no {MODEL_FILE}')
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        return config_lib.from_dict(content['model']), content['tokenizer']
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path} is damaged: {error}') from None


def _shapes(tree: Any) -> list[tuple[str, tuple[int, ...]]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, 'shape'))
    return [('/'.join(names.path_names(path)), tuple(leaf.shape)) for path, leaf in leaves if hasattr(leaf, 'shape')]


def _check_shapes(part: str, found: Mapping[str, tuple], wanted: Mapping[str, tuple]) -> None:
    for name in sorted(set(found) | set(wanted)):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f'the checkpoint is of another shape: {part}/{name} is {found.get(name, "absent")} in it '
                f'and {wanted.get(name, "absent")} in the configured model'
            )
