"""What a checkpoint directory holds, for generation: a training run, or the published Hugging Face layout."""

from pathlib import Path
from typing import Any

import deepseek_jax as ds
from deepseek_jax.checkpoint import read_model_file
from deepseek_jax.precision import compute_params
from deepseek_jax.tokenizer import Tokenizer, load_tokenizer


def load(directory: str | Path) -> tuple[ds.ModelConfig, dict[str, Any], Tokenizer]:
    """The model, its parameters as it computes with them, and its tokenizer.

    A directory with `model.json` is a run of `python -m train`, which names its tokenizer there; one with
    `config.json` is in the Hugging Face layout, with a `tokenizer.json` beside it. Raises `FileNotFoundError` if the
    directory or a part of it is missing, `ValueError` if it is neither.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f'checkpoint {str(directory)!r} is not a directory')
    if (directory / 'model.json').is_file():
        _, name = read_model_file(directory)
        tokenizer = load_tokenizer(name) if name == 'bytes' else _file_tokenizer(directory / name)
        config, params = ds.load_run(directory)
    elif (directory / 'config.json').is_file():
        tokenizer = _file_tokenizer(directory / 'tokenizer.json')
        config, params = ds.load_hf(directory)
    else:
        raise ValueError(
            f'checkpoint {str(directory)!r} must hold model.json (a training run) or config.json (Hugging Face layout)'
        )
    return config, compute_params(params, config), tokenizer


def _file_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise FileNotFoundError(f'tokenizer {str(path)!r} is missing')
    return load_tokenizer(str(path))
