"""Writes `transformers/<name>/`: tiny random checkpoints in the published layout, with the logits of transformers.

Run it in an environment of its own, with torch, transformers and safetensors (the files here were made with Python
3.11, torch 2.13.0 on the CPU, transformers 5.23.0); the test suite needs none of them:

    python tests/oracles/make_transformers_files.py

Each directory holds `config.json`, `model.safetensors` (float32) and `reference.npz` with `tokens` (B, T) and `logits`
(B, T, V). The logits come from a model that transformers loaded from the very files, so their names and their layout
have been read by an implementation that is not ours. `config.json` has the fields and the spelling of the published
DeepSeek-V3 one, except in `v2_mscale`, which keeps what transformers itself writes (`rope_parameters`).

Norm weights are random around 1 and the router bias is random, so that none can be dropped or swapped unnoticed. The
weights are scaled to keep activations near 1. In every case but `mtp` the selection scores `s + b` are positive: older
transformers masked the experts outside the allowed groups with 0 instead of -inf, and agrees only there. Case `mtp` has
negative scores, where the two differ, and a multi-token prediction module (`mtp_logits` (B, T - 1, V) in its
`reference.npz`: at position i the logits of token i + 2), computed by transformers' own `MtpModel` from the file.

transformers gives the norms of the two compressed latents an epsilon of 1e-6 whatever `rms_norm_eps` says; the latents
are made large (`LATENT_SCALE`), so that this stays far below the tolerance of the tests.
"""

import json
import pathlib
import shutil

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

ROOT = pathlib.Path(__file__).parent / 'transformers'
BATCH, LENGTH = 2, 24

COMMON = {
    'architectures': ['DeepseekV3ForCausalLM'],
    'model_type': 'deepseek_v3',
    'vocab_size': 64,
    'hidden_size': 32,
    'intermediate_size': 40,
    'moe_intermediate_size': 12,
    'num_hidden_layers': 3,
    'num_attention_heads': 2,
    'num_key_value_heads': 2,
    'q_lora_rank': 20,
    'kv_lora_rank': 16,
    'qk_nope_head_dim': 12,
    'qk_rope_head_dim': 8,
    'v_head_dim': 10,
    'first_k_dense_replace': 1,
    'moe_layer_freq': 1,
    'n_routed_experts': 8,
    'n_shared_experts': 1,
    'num_experts_per_tok': 3,
    'n_group': 4,
    'topk_group': 2,
    'routed_scaling_factor': 2.5,
    'norm_topk_prob': True,
    'scoring_func': 'sigmoid',
    'topk_method': 'noaux_tc',
    'seq_aux': True,
    'hidden_act': 'silu',
    'rms_norm_eps': 1e-6,
    'rope_theta': 10000,
    'rope_scaling': None,
    'max_position_embeddings': 4096,
    'initializer_range': 0.02,
    'attention_bias': False,
    'attention_dropout': 0.0,
    'num_nextn_predict_layers': 0,
    'tie_word_embeddings': False,
    'bos_token_id': 0,
    'eos_token_id': 1,
    'torch_dtype': 'float32',
    'use_cache': True,
}

YARN = {
    'type': 'yarn',
    'factor': 40,
    'original_max_position_embeddings': 4096,
    'beta_fast': 32,
    'beta_slow': 1,
    'mscale': 1.0,
    'mscale_all_dim': 1.0,
}

CASES = {
    'v3_groups': {},
    'v3_yarn': {
        'first_k_dense_replace': 2,
        'rope_scaling': YARN,
        'max_position_embeddings': 163840,
        'num_experts_per_tok': 4,
        'n_group': 2,
        'topk_group': 1,
        'n_routed_experts': 16,
        'moe_intermediate_size': 8,
    },
    'v2_mscale': {
        'q_lora_rank': None,
        'n_shared_experts': 3,
        'num_experts_per_tok': 2,
        'n_routed_experts': 6,
        'n_group': 3,
        'topk_group': 2,
        'rope_theta': 5000,
        'rope_scaling': {
            'rope_type': 'yarn',
            'factor': 8,
            'original_max_position_embeddings': 4096,
            'beta_fast': 16,
            'beta_slow': 1,
            'mscale': 0.707,
            'mscale_all_dim': 1.3,
        },
        'max_position_embeddings': 32768,
        'routed_scaling_factor': 1.0,
    },
    'yarn_defaults': {
        'n_group': 1,
        'topk_group': 1,
        'num_experts_per_tok': 1,
        'n_routed_experts': 4,
        'rope_scaling': {'type': 'yarn', 'factor': 4, 'original_max_position_embeddings': 64},
        'max_position_embeddings': 256,
    },
    'moonlight': {
        'vocab_size': 96,
        'q_lora_rank': None,
        'n_group': 1,
        'topk_group': 1,
        'n_shared_experts': 2,
        'num_experts_per_tok': 4,
        'routed_scaling_factor': 2.446,
        'rope_theta': 50000.0,
        'rms_norm_eps': 1e-5,
        'max_position_embeddings': 8192,
    },
    'kimi_k2': {
        'num_attention_heads': 3,
        'num_key_value_heads': 3,
        'n_group': 1,
        'topk_group': 1,
        'num_experts_per_tok': 2,
        'n_routed_experts': 10,
        'routed_scaling_factor': 2.827,
        'rope_theta': 50000.0,
        'rope_scaling': YARN | {'factor': 32.0, 'beta_fast': 1.0, 'beta_slow': 1.0},
        'max_position_embeddings': 131072,
    },
    'mtp': {'num_hidden_layers': 2, 'num_nextn_predict_layers': 1},
}

KEEPS_TRANSFORMERS_SPELLING = 'v2_mscale'
SMALL_EMBEDDING = 'moonlight'
"""Activations this small make `rms_norm_eps` matter."""
NEGATIVE_SCORES = 'mtp'
LATENT_SCALE = 4.0
SEEDS = {'moonlight': 1, 'kimi_k2': 1, 'yarn_defaults': 1}
"""Other than 0 where 0 brought a selection so close that float32 rounding might turn it."""


def published_shapes(values: dict) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors of a published checkpoint of this configuration."""
    model, latent = values['hidden_size'], values['kv_lora_rank']
    heads, rotary, nope = values['num_attention_heads'], values['qk_rope_head_dim'], values['qk_nope_head_dim']
    query_rank, expert = values['q_lora_rank'], values['moe_intermediate_size']
    embedding = (values['vocab_size'], model)
    shapes = {'model.embed_tokens.weight': embedding, 'lm_head.weight': embedding, 'model.norm.weight': (model,)}

    def add_ffn(prefix: str, width: int) -> None:
        shapes[f'{prefix}.gate_proj.weight'] = shapes[f'{prefix}.up_proj.weight'] = (width, model)
        shapes[f'{prefix}.down_proj.weight'] = (model, width)

    for layer in range(values['num_hidden_layers'] + values['num_nextn_predict_layers']):
        prefix = f'model.layers.{layer}'
        shapes[f'{prefix}.input_layernorm.weight'] = (model,)
        shapes[f'{prefix}.post_attention_layernorm.weight'] = (model,)
        attention = f'{prefix}.self_attn'
        if query_rank is None:
            shapes[f'{attention}.q_proj.weight'] = (heads * (nope + rotary), model)
        else:
            shapes[f'{attention}.q_a_proj.weight'] = (query_rank, model)
            shapes[f'{attention}.q_a_layernorm.weight'] = (query_rank,)
            shapes[f'{attention}.q_b_proj.weight'] = (heads * (nope + rotary), query_rank)
        shapes[f'{attention}.kv_a_proj_with_mqa.weight'] = (latent + rotary, model)
        shapes[f'{attention}.kv_a_layernorm.weight'] = (latent,)
        shapes[f'{attention}.kv_b_proj.weight'] = (heads * (nope + values['v_head_dim']), latent)
        shapes[f'{attention}.o_proj.weight'] = (model, heads * values['v_head_dim'])
        if layer < values['first_k_dense_replace']:
            add_ffn(f'{prefix}.mlp', values['intermediate_size'])
            continue
        shapes[f'{prefix}.mlp.gate.weight'] = (values['n_routed_experts'], model)
        shapes[f'{prefix}.mlp.gate.e_score_correction_bias'] = (values['n_routed_experts'],)
        for index in range(values['n_routed_experts']):
            add_ffn(f'{prefix}.mlp.experts.{index}', expert)
        add_ffn(f'{prefix}.mlp.shared_experts', expert * values['n_shared_experts'])
        if layer >= values['num_hidden_layers']:
            shapes[f'{prefix}.enorm.weight'] = shapes[f'{prefix}.hnorm.weight'] = (model,)
            shapes[f'{prefix}.eh_proj.weight'] = (model, 2 * model)
            shapes[f'{prefix}.shared_head.norm.weight'] = (model,)
            shapes[f'{prefix}.embed_tokens.weight'] = shapes[f'{prefix}.shared_head.head.weight'] = embedding
    return shapes


def random_tensors(name: str, values: dict, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random float32 tensors for one case; a prediction module's embedding and head copy the main model's."""
    tensors = {}
    for tensor, shape in sorted(published_shapes(values).items()):
        normal = torch.randn(shape, generator=generator)
        if 'norm' in tensor:
            tensors[tensor] = 1 + 0.3 * normal
        elif tensor.endswith('e_score_correction_bias'):
            bias = 0.4 * torch.rand(shape, generator=generator)
            tensors[tensor] = bias - 1.2 if name == NEGATIVE_SCORES else bias
        elif tensor.endswith('embed_tokens.weight'):
            tensors[tensor] = normal * (0.01 if name == SMALL_EMBEDDING else 1.0)
        else:
            tensors[tensor] = normal * (LATENT_SCALE if '_a_proj' in tensor else 1.0) / shape[1] ** 0.5
    for layer in range(values['num_hidden_layers'], values['num_hidden_layers'] + values['num_nextn_predict_layers']):
        tensors[f'model.layers.{layer}.embed_tokens.weight'] = tensors['model.embed_tokens.weight'].clone()
        tensors[f'model.layers.{layer}.shared_head.head.weight'] = tensors['lm_head.weight'].clone()
    return tensors


def load(directory: pathlib.Path, values: dict) -> DeepseekV3ForCausalLM:
    """The main model as transformers loads it from a directory. Raises `ValueError` if it misses or drops a tensor."""
    # Where the prediction modules start; transformers knows it only for the published number of layers.
    DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected = [rf'model\.layers\.{values["num_hidden_layers"]}\..*']
    model, report = DeepseekV3ForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation='eager', output_loading_info=True
    )
    if any(report.values()):
        raise ValueError(f'{directory}: transformers reports {report}')
    return model.eval()


def check_saved_by_transformers(model: DeepseekV3ForCausalLM, tensors: dict[str, torch.Tensor]) -> None:
    """Raises `ValueError` unless `save_pretrained` writes the main model's tensors under the same names, unchanged."""
    directory = ROOT / 'scratch'
    model.save_pretrained(directory)
    saved = load_file(directory / 'model.safetensors')
    shutil.rmtree(directory)
    main = {name for name in tensors if f'layers.{model.config.num_hidden_layers}.' not in name}
    if set(saved) != main or not all(torch.equal(saved[name], tensors[name]) for name in main):
        raise ValueError(f'transformers saves other tensors: {sorted(set(saved) ^ main)}')


@torch.no_grad()
def mtp_logits(model: DeepseekV3ForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """(B, T - 1, V) logits of the first prediction module, loaded by transformers from the model's directory."""
    model.config.dtype = torch.float32
    module = MtpModel.from_pretrained(model).eval()
    state = model.model(tokens).last_hidden_state[:, :-1]
    positions = torch.arange(1, tokens.shape[1])[None]
    cache = MtpCache(config=model.config.get_mtp_config())
    return model.lm_head(module.forward_layer(0, state, positions, cache, input_ids=tokens[:, 1:]))


def make(name: str, seed: int) -> None:
    """Writes one directory."""
    values = COMMON | CASES[name]
    directory = ROOT / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = random_tensors(name, values, generator)
    save_file(tensors, directory / 'model.safetensors', metadata={'format': 'pt'})
    (directory / 'model.safetensors').chmod(0o644)
    (directory / 'config.json').write_text(json.dumps(values, indent=2) + '\n')
    if name == KEEPS_TRANSFORMERS_SPELLING:
        DeepseekV3Config.from_pretrained(directory).save_pretrained(directory)
        written = json.loads((directory / 'config.json').read_text())
        if 'rope_scaling' in written or 'rope_parameters' not in written:
            raise ValueError('this transformers does not write rope_parameters')

    tokens = torch.randint(values['vocab_size'], (BATCH, LENGTH), generator=generator)
    model = load(directory, values)
    check_saved_by_transformers(model, tensors)
    with torch.no_grad():
        arrays = {'tokens': tokens, 'logits': model(tokens, use_cache=False).logits}
    if values['num_nextn_predict_layers']:
        arrays['mtp_logits'] = mtp_logits(model, tokens)
    np.savez(directory / 'reference.npz', **{key: value.numpy() for key, value in arrays.items()})
    size = sum(path.stat().st_size for path in directory.iterdir())
    print(f'{name:14s} {size / 1000:6.1f} kB  logits rms {arrays["logits"].square().mean().sqrt():.3f}')


if __name__ == '__main__':
    for case in CASES:
        make(case, SEEDS.get(case, 0))
