"""A training step of a slice of DeepSeek-V3: ours in float8, ours in bf16, and PyTorch's.

`python benchmarks/train_step.py [--rows 2] [--sides torch bf16 fp8] [--output FILE.json]`, on one GPU of 80 GB.

Every side trains `configs/model/v3_slice.gin` (1 dense layer, 2 of experts, true widths) on rows of 4,096 random tokens,
without the prediction module, which the peer does not have: forward, backward, clipping and AdamW. The peer is
`DeepseekV3ForCausalLM` of transformers under `torch.compile`: SDPA attention, grouped products of experts, fused AdamW. It
keeps weights and moments in bf16 and recomputes nothing, which is the fastest of it that fits; ours keeps float32 masters.
Each side runs in a process of its own, one after the other, and the last two columns are ratios within the run.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = ROOT / 'configs' / 'train' / 'v3_slice_h100.gin'
LENGTH = 4096
SIDES = ('torch', 'bf16', 'fp8')
WARM_UP = 3


def measure(step: Callable[[], object], wait: Callable[[], object], steps: int) -> list[float]:
    """Seconds of each step, by the clock."""
    seconds = []
    for number in range(WARM_UP + steps):
        began = time.perf_counter()
        step()
        wait()
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - began)
    return seconds


def ours(recipe: str, rows: int, steps: int) -> dict[str, Any]:
    """Our step, of the recipe."""
    import jax  # the peer's process must not take the GPU's memory for JAX
    import numpy as np

    from configs import loader
    from deepseek_jax import flops
    from deepseek_jax.config import ModelConfig
    from train.guard import DEFAULT
    from train.loss import ObjectiveConfig
    from train.optimizer import OptimizerConfig
    from train.step import Hyperparameters, as_batch, init_state, train_step

    loader.parse(CONFIG, [f"PRECISION = '{recipe}'"])
    configured = {
        'model': dataclasses.replace(loader.call(ModelConfig), mtp_depth=0),
        'optimizer': loader.call(OptimizerConfig),
        'config': loader.call(ObjectiveConfig),
        'guard': DEFAULT,
    }
    model = configured['model']
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (rows, LENGTH + 1)).astype(np.int32)
    batch = {'segments': np.ones_like(tokens), 'weights': np.ones((rows, LENGTH), np.float32), 'tokens': tokens}
    batch, values = as_batch(batch), Hyperparameters(1e-4, 0.0, 1e-3)
    state = init_state(jax.random.key(0), model, configured['optimizer'])
    began = time.perf_counter()
    program = train_step.lower(state, batch, values, **configured).compile()
    compile_seconds = time.perf_counter() - began
    held: list[Any] = [state, None]
    del state

    def step() -> None:
        held[:] = program(held[0], batch, values)

    seconds = measure(step, lambda: jax.block_until_ready(held[1]), steps)
    return {
        'device': jax.devices()[0].device_kind,
        'versions': {'jax': jax.__version__},
        'seconds': seconds,
        'compile_seconds': compile_seconds,
        'loss': float(held[1].losses.loss),
        'peak_bytes': jax.devices()[0].memory_stats()['peak_bytes_in_use'],
        'flops_per_token': flops.train_flops_per_token(model, LENGTH, mtp=False),
    }


def peer(rows: int, steps: int) -> dict[str, Any]:
    """PyTorch's step."""
    import torch
    import transformers

    from configs import loader
    from deepseek_jax.config import ModelConfig

    loader.parse(CONFIG)
    ours = loader.call(ModelConfig)
    moe, mla = ours.moe, ours.mla
    config = transformers.DeepseekV3Config(
        vocab_size=ours.vocab_size,
        hidden_size=ours.model_dim,
        intermediate_size=ours.dense_ffn_dim,
        moe_intermediate_size=moe.ffn_dim,
        num_hidden_layers=ours.num_layers,
        num_attention_heads=mla.num_heads,
        num_key_value_heads=mla.num_heads,
        n_shared_experts=moe.num_shared_experts,
        n_routed_experts=moe.num_experts,
        routed_scaling_factor=moe.gate_scale,
        kv_lora_rank=mla.kv_rank,
        q_lora_rank=mla.query_rank,
        qk_rope_head_dim=mla.rope_head_dim,
        v_head_dim=mla.value_head_dim,
        qk_nope_head_dim=mla.nope_head_dim,
        n_group=moe.num_groups,
        topk_group=moe.top_groups,
        num_experts_per_tok=moe.top_k,
        first_k_dense_replace=ours.num_dense_layers,
        initializer_range=ours.init_std,
        rms_norm_eps=ours.norm_eps,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    torch.manual_seed(0)
    torch.set_float32_matmul_precision('high')
    # Initialised on the device, which is faster by minutes.
    with torch.device('cuda'):
        model = transformers.DeepseekV3ForCausalLM._from_config(
            config, attn_implementation='sdpa', dtype=torch.bfloat16, experts_implementation='grouped_mm'
        )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    compiled = torch.compile(model)
    tokens = torch.randint(0, config.vocab_size, (rows, LENGTH), device='cuda')
    held = {}

    def step() -> None:
        loss = compiled(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        held['loss'] = loss.detach()

    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    compile_seconds = time.perf_counter() - began
    seconds = measure(step, torch.cuda.synchronize, steps)
    return {
        'device': torch.cuda.get_device_name(),
        'versions': {'torch': torch.__version__, 'transformers': transformers.__version__},
        'seconds': seconds,
        'compile_seconds': compile_seconds,
        'loss': float(held['loss']),
        'peak_bytes': torch.cuda.max_memory_allocated(),
        'parameters': sum(p.numel() for p in model.parameters()),
    }


def run(side: str, rows: int, steps: int) -> dict[str, Any] | None:
    """What a process of its own measured; None, with what it said, if it failed."""
    environment = os.environ | {'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}
    environment |= {'XLA_CLIENT_MEM_FRACTION': '0.95', 'PYTORCH_CUDA_ALLOC_CONF': 'expandable_segments:True'}
    environment['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_gpu_memory_limit_slop_factor=115'
    if side == 'torch':
        environment['JAX_PLATFORMS'] = 'cpu'  # the configuration's reader imports JAX, which is to leave the GPU alone
    command = [sys.executable, str(pathlib.Path(__file__)), '--side', side, '--rows', str(rows), '--steps', str(steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f'{side}: failed\n{done.stderr[-2000:]}', file=sys.stderr, flush=True)
        return None
    found = json.loads(done.stdout.splitlines()[-1])
    found['step_ms'] = 1e3 * statistics.median(found.pop('seconds'))
    found['tokens_per_second'] = 1e3 * rows * LENGTH / found['step_ms']
    return {'side': side, **found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=int, default=2, help='of 4,096 tokens, in a step')
    parser.add_argument('--steps', type=int, default=10, help='that are timed')
    parser.add_argument('--sides', nargs='+', choices=SIDES, default=SIDES)
    parser.add_argument('--side', choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument('--output', type=pathlib.Path, help='where to write the figures as JSON')
    options = parser.parse_args()
    if options.side:
        measured = peer if options.side == 'torch' else lambda *sizes: ours(options.side, *sizes)
        print(json.dumps(measured(options.rows, options.steps)))
        return 0
    found = {}
    print(f'{"side":8}{"ms":>9}{"tokens/s":>11}{"GiB":>8}{"compiled in":>13}{"to torch":>10}{"to bf16":>9}', flush=True)
    for side in options.sides:
        one = run(side, options.rows, options.steps)
        if one is None:
            continue
        found[side] = one
        for name in ('torch', 'bf16'):
            if name in found and name != side:
                one[f'times_{name}'] = one['tokens_per_second'] / found[name]['tokens_per_second']
        ratios = ''.join(
            f'{one.get(f"times_{name}", math.nan):{width}.2f}' for name, width in (('torch', 10), ('bf16', 9))
        )
        print(
            f'{side:8}{one["step_ms"]:9.1f}{one["tokens_per_second"]:11,.0f}{one["peak_bytes"] / 2**30:8.1f}'
            f'{one["compile_seconds"]:11.0f} s{ratios}',
            flush=True,
        )
    if options.output:
        command = f'python benchmarks/train_step.py --rows {options.rows} --steps {options.steps}'
        header = {'command': command, 'rows': options.rows, 'length': LENGTH, 'date': time.strftime('%Y-%m-%d')}
        options.output.write_text(
            json.dumps(header | {'sides': list(found.values())}, indent=1) + '\n', encoding='utf-8'
        )
    return 0 if len(found) == len(options.sides) else 1


if __name__ == '__main__':
    sys.exit(main())
