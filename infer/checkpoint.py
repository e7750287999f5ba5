"""What a checkpoint directory holds, for generation: a training run, or the published Hugging Face layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepseek_jax as ds
from deepseek_jax.checkpoint import read_model_file
from deepseek_jax.names import map_with_names
from deepseek_jax.precision import compute_dtype
from deepseek_jax.router import PARAMETER_NAMES as ROUTER_NAMES
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


def compute_params(params: Mapping[str, Any], config: ds.ModelConfig) -> dict[str, Any]:
    """The parameters with those that are rounded to the compute dtype at every use rounded once and for all.

    Results stay the same to the bit; a bf16 model takes half the memory. Norms and router stay as they are.
    """
    dtype = compute_dtype(config.precision)

    def round_once(path: tuple[str, ...], leaf: Any) -> Any:
        name = path[-1]
        rounded = name in ('embedding_VD', 'head_DV') or (name.startswith('w_') and name not in ROUTER_NAMES)
        return leaf.astype(dtype) if rounded else leaf

    return map_with_names(round_once, params)


def _file_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise FileNotFoundError(f'tokenizer {str(path)!r} is missing')
    return load_tokenizer(str(path))
