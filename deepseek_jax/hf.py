"""Published checkpoints: safetensors in the Hugging Face layout to our parameter tree and back.

A published weight is (out, in) and may join several of ours along an output axis. `_BLOCK`, `_TOP` and `_MTP` say
which; both directions read the same tables. Rotary dimensions stay interleaved, as published.
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from deepseek_jax import model, names
from deepseek_jax.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig, YarnConfig

INDEX = 'model.safetensors.index.json'


class _Entry(NamedTuple):
    """How one published tensor is made of our parameters.

    Attributes:
      published: its name under the layer; `{e}` stands for the expert.
      ours: paths of the parameters it joins.
      inputs: leading axes of ours that are inputs; 0 for a tensor that is stored as it is.
      axis: the axis of ours along which they are joined.
    """

    published: str
    ours: tuple[str, ...]
    inputs: int = 1
    axis: int = -1


_TOP = (
    _Entry('model.embed_tokens.weight', ('embedding_VD',), inputs=0),
    _Entry('model.norm.weight', ('final_norm_D',), inputs=0),
    _Entry('lm_head.weight', ('head_DV',)),
)
_NORMS = (
    _Entry('input_layernorm.weight', ('attention_norm_D',), inputs=0),
    _Entry('post_attention_layernorm.weight', ('ffn_norm_D',), inputs=0),
)
_QUERIES = (_Entry('self_attn.q_proj.weight', ('attention/w_q_DHN', 'attention/w_qr_DHR')),)
_RANKED_QUERIES = (
    _Entry('self_attn.q_a_proj.weight', ('attention/w_dq_DQ',)),
    _Entry('self_attn.q_a_layernorm.weight', ('attention/query_norm_Q',), inputs=0),
    _Entry('self_attn.q_b_proj.weight', ('attention/w_uq_QHN', 'attention/w_qr_QHR')),
)
_LATENT = (
    _Entry('self_attn.kv_a_proj_with_mqa.weight', ('attention/w_dkv_DC', 'attention/w_kr_DR')),
    _Entry('self_attn.kv_a_layernorm.weight', ('attention/latent_norm_C',), inputs=0),
    _Entry('self_attn.kv_b_proj.weight', ('attention/w_uk_CHN', 'attention/w_uv_CHU')),
    _Entry('self_attn.o_proj.weight', ('attention/w_o_HUD',), inputs=2),
)
_MTP = (
    _Entry('hnorm.weight', ('hidden_norm_D',), inputs=0),
    _Entry('enorm.weight', ('embedding_norm_D',), inputs=0),
    _Entry('eh_proj.weight', ('w_embedding_DD', 'w_hidden_DD'), axis=0),
    _Entry('shared_head.norm.weight', ('final_norm_D',), inputs=0),
)


def _ffn(published: str, ours: str, suffix: str = '') -> tuple[_Entry, ...]:
    return (
        _Entry(f'{published}.gate_proj.weight', (f'{ours}/w_gate_{suffix}DF',)),
        _Entry(f'{published}.up_proj.weight', (f'{ours}/w_up_{suffix}DF',)),
        _Entry(f'{published}.down_proj.weight', (f'{ours}/w_down_{suffix}FD',)),
    )


_MOE = (
    _Entry('mlp.gate.weight', ('moe/router/w_router_DE',)),
    _Entry('mlp.gate.e_score_correction_bias', ('moe/router/router_bias_E',), inputs=0),
    *_ffn('mlp.experts.{e}', 'moe/experts', 'E'),
)


class _Layer(NamedTuple):
    """One published layer: where it stands in our tree and what it holds."""

    prefix: str
    scope: str
    index: int
    entries: tuple[_Entry, ...]


def _layers(config: ModelConfig) -> Iterator[_Layer]:
    attention = _NORMS + (_RANKED_QUERIES if config.mla.query_rank is not None else _QUERIES) + _LATENT
    moe = _MOE
    if config.moe is not None and config.moe.num_shared_experts:
        moe += _ffn('mlp.shared_experts', 'moe/shared')
    for layer in range(config.num_layers):
        dense = layer < config.num_dense_layers
        scope, index = ('dense_layers', layer) if dense else ('moe_layers', layer - config.num_dense_layers)
        yield _Layer(f'model.layers.{layer}.', scope, index, attention + (_ffn('mlp', 'ffn') if dense else moe))
    in_block = tuple(
        entry._replace(ours=tuple(f'block/{path}' for path in entry.ours)) for entry in attention + moe
    )  # fmt: skip
    for depth in range(config.mtp_depth):
        yield _Layer(f'model.layers.{config.num_layers + depth}.', 'mtp', depth, _MTP + in_block)


def load_hf(
    directory: str | os.PathLike, dtype: Any = jnp.float32, recipe: Literal['fp32', 'bf16', 'fp8'] = 'bf16'
) -> tuple[ModelConfig, dict[str, Any]]:
    """The configuration and parameters of a checkpoint in the published layout (bf16, fp16 or fp32 safetensors).

    Args:
      directory: holds `config.json` and `*.safetensors`, with an index if there are several.
      dtype: of the parameters; the routers' biases are always float32.
      recipe: the precision recipe of the returned configuration.

    Raises:
      FileNotFoundError: the directory, its configuration or a shard is missing.
      ValueError: another architecture, block-quantised weights, a missing tensor or one of another shape.
    """
    directory = pathlib.Path(directory)
    config = config_from_published(_read_json(directory / 'config.json'))
    config = dataclasses.replace(config, precision=dataclasses.replace(config.precision, recipe=recipe))
    read = _TensorReader(directory)
    shapes = jax.eval_shape(lambda key: model.init(key, config), jax.random.key(0))

    def allocate(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return np.empty(leaf.shape, np.float32 if names.is_router_bias(path) else dtype)

    if config.mtp_depth and (missing := f'model.layers.{config.num_layers}.eh_proj.weight') not in read:
        raise ValueError(
            f'config.json has num_nextn_predict_layers={config.mtp_depth} and the checkpoint no tensor {missing!r}: '
            'if it was saved without its MTP layer, set the field to 0'
        )
    params = names.map_with_names(allocate, shapes)
    for entry in _TOP:
        _load(read, entry, '', lambda path: params[path])
    for layer in _layers(config):
        _load_layer(read, layer, params)
    return config, jax.tree.map(jnp.asarray, params)


def _load_layer(read: '_TensorReader', layer: _Layer, params: Mapping[str, Any]) -> None:
    for entry in layer.entries:
        if '{e}' not in entry.published:
            _load(read, entry, layer.prefix, lambda path: _leaf(params, layer.scope, path)[layer.index])
            continue
        for expert in range(_leaf(params, layer.scope, entry.ours[0]).shape[1]):
            one = entry._replace(published=entry.published.format(e=expert))
            _load(
                read,
                one,
                layer.prefix,
                lambda path, expert=expert: _leaf(params, layer.scope, path)[layer.index, expert],
            )


def save_hf(
    directory: str | os.PathLike,
    config: ModelConfig,
    params: Mapping[str, Any],
    dtype: Literal['bfloat16', 'float32'] = 'bfloat16',
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a checkpoint in the published layout; the directory appears only when it is whole.

    MTP layers carry copies of the embedding and the head, as published. Routers' biases are float32.

    Args:
      directory: must not exist, or be empty.
      config: the model.
      params: its parameters.
      dtype: of the weights.
      max_shard_bytes: a new shard is begun before this size is passed.

    Raises:
      FileExistsError: the directory holds something.
    """
    directory = pathlib.Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f'{directory} is not empty: a checkpoint is written to a new directory')
    partial = directory.with_name(directory.name + '.partial')
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards: list[dict[str, Callable[[], np.ndarray]]] = [{}]
    sizes = [0]
    for name, size, make in _published_tensors(config, params, np.dtype(jnp.dtype(dtype))):
        if shards[-1] and sizes[-1] + size > max_shard_bytes:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = make
        sizes[-1] += size
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f'model-{number:05d}-of-{len(shards):05d}.safetensors' if len(shards) > 1 else 'model.safetensors'
        tensors = {name: make() for name, make in shard.items()}
        safetensors.numpy.save_file(tensors, partial / file, metadata={'format': 'pt'})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        _write_json(partial / INDEX, {'metadata': {'total_size': sum(sizes)}, 'weight_map': weight_map})
    _write_json(partial / 'config.json', config_to_published(config) | {'torch_dtype': dtype})
    if directory.exists():
        directory.rmdir()
    partial.rename(directory)


def _published_tensors(
    config: ModelConfig, params: Mapping[str, Any], dtype: np.dtype
) -> Iterator[tuple[str, int, Callable[[], np.ndarray]]]:
    """Name, bytes and maker of each tensor, in the order of layers."""

    def tensor(name: str, entry: _Entry, *leaves: Any) -> tuple[str, int, Callable[[], np.ndarray]]:
        kind = np.dtype(np.float32) if entry.published.endswith('e_score_correction_bias') else dtype
        size = sum(math.prod(leaf.shape) for leaf in leaves) * kind.itemsize
        return name, size, lambda: _join(entry, [np.asarray(leaf) for leaf in leaves]).astype(kind)

    for entry in _TOP:
        yield tensor(entry.published, entry, params[entry.ours[0]])
    for layer in _layers(config):
        for entry in layer.entries:
            leaves = [_leaf(params, layer.scope, path) for path in entry.ours]
            if '{e}' not in entry.published:
                yield tensor(layer.prefix + entry.published, entry, *(leaf[layer.index] for leaf in leaves))
                continue
            for expert in range(leaves[0].shape[1]):
                name = layer.prefix + entry.published.format(e=expert)
                yield tensor(name, entry, *(leaf[layer.index, expert] for leaf in leaves))
        if layer.scope == 'mtp':
            yield tensor(layer.prefix + 'embed_tokens.weight', _TOP[0], params['embedding_VD'])
            yield tensor(layer.prefix + 'shared_head.head.weight', _TOP[2], params['head_DV'])


def _load(read: '_TensorReader', entry: _Entry, prefix: str, destination: Callable[[str], np.ndarray]) -> None:
    """Reads one published tensor into the parameters it joins."""
    parts = [destination(path) for path in entry.ours]
    joined = list(parts[0].shape)
    joined[entry.axis] = sum(part.shape[entry.axis] for part in parts)
    rows = math.prod(joined[: entry.inputs])
    published = (math.prod(joined) // rows, rows) if entry.inputs else tuple(joined)
    values = read(prefix + entry.published, published)
    values = values.T.reshape(joined) if entry.inputs else values
    start = 0
    for part in parts:
        stop = start + part.shape[entry.axis]
        part[...] = values[start:stop] if entry.axis == 0 else values[..., start:stop]
        start = stop


def _join(entry: _Entry, leaves: list[np.ndarray]) -> np.ndarray:
    """The published tensor made of our parameters."""
    joined = np.concatenate(leaves, entry.axis) if len(leaves) > 1 else leaves[0]
    if not entry.inputs:
        return joined
    return np.ascontiguousarray(joined.reshape(math.prod(joined.shape[: entry.inputs]), -1).T)


def _leaf(params: Mapping[str, Any], scope: str, path: str) -> Any:
    leaf = params[scope]
    for key in path.split('/'):
        leaf = leaf[key]
    return leaf


class _TensorReader:
    """Reads tensors by name from one or many safetensors files; where stored formats are decoded."""

    def __init__(self, directory: pathlib.Path):
        if (directory / INDEX).exists():
            self._files = {
                name: directory / file for name, file in _read_json(directory / INDEX)['weight_map'].items()
            }  # fmt: skip
        else:
            self._files = dict(self._scan(sorted(directory.glob('*.safetensors'))))
        for file in sorted(set(self._files.values())):
            if not file.exists():
                raise FileNotFoundError(f'{file} is named in {INDEX} and missing')
        if not self._files:
            raise FileNotFoundError(f'{directory} holds no *.safetensors')
        self._open: dict[pathlib.Path, Any] = {}

    @staticmethod
    def _scan(files: Iterable[pathlib.Path]) -> Iterator[tuple[str, pathlib.Path]]:
        for file in files:
            with safetensors.safe_open(file, framework='numpy') as handle:
                for name in handle.keys():  # noqa: SIM118 - the handle is not a mapping
                    yield name, file

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __call__(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in self._files:
            raise ValueError(f'the checkpoint has no tensor {name!r} of shape {shape}, which its config.json implies')
        if name + '_scale_inv' in self._files:
            raise ValueError(f'tensor {name!r} is block-scaled FP8: convert the checkpoint to bf16 first')
        file = self._files[name]
        if file not in self._open:
            self._open[file] = safetensors.safe_open(file, framework='numpy')
        values = self._open[file].get_tensor(name)
        if values.shape != shape:
            raise ValueError(f'tensor {name!r} has shape {values.shape}, config.json implies {shape}')
        return values


_REQUIRED_VALUES = {
    'scoring_func': 'sigmoid',
    'topk_method': 'noaux_tc',
    'norm_topk_prob': True,
    'hidden_act': 'silu',
    'tie_word_embeddings': False,
    'attention_bias': False,
    'moe_layer_freq': 1,
    'rope_interleave': True,
}


def config_from_published(published: Mapping[str, Any]) -> ModelConfig:
    """The model that a published `config.json` describes.

    Raises `ValueError` for a field that is missing or that asks for another architecture.
    """
    for name, wanted in _REQUIRED_VALUES.items():
        if published.get(name, wanted) != wanted:
            raise ValueError(f'config.json has {name}={published[name]!r}; this model needs {wanted!r}')
    if 'quantization_config' in published:
        method = published['quantization_config'].get('quant_method')
        raise ValueError(f'config.json has quantization_config {method!r}: convert the checkpoint to bf16 first')
    try:
        return ModelConfig(
            vocab_size=published['vocab_size'],
            num_layers=published['num_hidden_layers'],
            num_dense_layers=published['first_k_dense_replace'],
            model_dim=published['hidden_size'],
            dense_ffn_dim=published['intermediate_size'],
            norm_eps=float(published['rms_norm_eps']),
            init_std=float(published.get('initializer_range', 0.006)),
            mtp_depth=published.get('num_nextn_predict_layers', 0),
            rope=_rope_from_published(published),
            mla=MLAConfig(
                num_heads=published['num_attention_heads'],
                nope_head_dim=published['qk_nope_head_dim'],
                rope_head_dim=published['qk_rope_head_dim'],
                value_head_dim=published['v_head_dim'],
                kv_rank=published['kv_lora_rank'],
                query_rank=published['q_lora_rank'],
            ),
            moe=MoEConfig(
                num_experts=published['n_routed_experts'],
                num_shared_experts=published['n_shared_experts'] or 0,
                top_k=published['num_experts_per_tok'],
                num_groups=published['n_group'],
                top_groups=published['topk_group'],
                ffn_dim=published['moe_intermediate_size'],
                gate_scale=float(published['routed_scaling_factor']),
            ),
        )
    except KeyError as error:
        raise ValueError(f'config.json has no field {error}: this is not a DeepSeek-V3 checkpoint') from None


def _rope_from_published(published: Mapping[str, Any]) -> RopeConfig:
    """Reads both spellings: `rope_theta` with `rope_scaling`, and `rope_parameters` that holds both."""
    scaling = published.get('rope_parameters') or published.get('rope_scaling') or {}
    theta = float(scaling.get('rope_theta', published.get('rope_theta', 10_000.0)))
    kind = scaling.get('rope_type', scaling.get('type', 'default'))
    if kind == 'default':
        return RopeConfig(theta=theta)
    if kind != 'yarn':
        raise ValueError(f"config.json has rope scaling {kind!r}; this model knows 'yarn'")
    yarn = YarnConfig(
        scale=float(scaling['factor']),
        original_length=scaling['original_max_position_embeddings'],
        beta_fast=float(scaling.get('beta_fast', 32)),
        beta_slow=float(scaling.get('beta_slow', 1)),
        mscale=float(scaling.get('mscale', 1.0)),
        mscale_all_dim=float(scaling.get('mscale_all_dim', 0.0)),
    )
    return RopeConfig(theta=theta, yarn=yarn)


def config_to_published(config: ModelConfig) -> dict[str, Any]:
    """The published `config.json` of a model. Raises `ValueError` for one without expert layers."""
    moe, mla, yarn = config.moe, config.mla, config.rope.yarn
    if moe is None:
        raise ValueError('ModelConfig.moe=None cannot be written: the published layout needs expert layers')
    length = 4096 if yarn is None else int(yarn.original_length * yarn.scale)
    published = {
        'architectures': ['DeepseekV3ForCausalLM'],
        'model_type': 'deepseek_v3',
        'vocab_size': config.vocab_size,
        'hidden_size': config.model_dim,
        'intermediate_size': config.dense_ffn_dim,
        'moe_intermediate_size': moe.ffn_dim,
        'num_hidden_layers': config.num_layers,
        'num_nextn_predict_layers': config.mtp_depth,
        'first_k_dense_replace': config.num_dense_layers,
        'num_attention_heads': mla.num_heads,
        'num_key_value_heads': mla.num_heads,
        'q_lora_rank': mla.query_rank,
        'kv_lora_rank': mla.kv_rank,
        'qk_nope_head_dim': mla.nope_head_dim,
        'qk_rope_head_dim': mla.rope_head_dim,
        'v_head_dim': mla.value_head_dim,
        'n_routed_experts': moe.num_experts,
        'n_shared_experts': moe.num_shared_experts,
        'num_experts_per_tok': moe.top_k,
        'n_group': moe.num_groups,
        'topk_group': moe.top_groups,
        'routed_scaling_factor': moe.gate_scale,
        'rms_norm_eps': config.norm_eps,
        'initializer_range': config.init_std,
        'max_position_embeddings': length,
        'rope_theta': config.rope.theta,
        'rope_scaling': None,
        'use_cache': True,
    } | {name: value for name, value in _REQUIRED_VALUES.items() if name != 'rope_interleave'}
    if yarn is not None:
        published['rope_scaling'] = {
            'type': 'yarn',
            'factor': yarn.scale,
            'original_max_position_embeddings': yarn.original_length,
            'beta_fast': yarn.beta_fast,
            'beta_slow': yarn.beta_slow,
            'mscale': yarn.mscale,
            'mscale_all_dim': yarn.mscale_all_dim,
        }
    return published


def _read_json(path: pathlib.Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f'{path} is missing: a published checkpoint holds config.json and *.safetensors')
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is not JSON: {error}') from None


def _write_json(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')
