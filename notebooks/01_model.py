# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A first look at the model
#
# What `make train` has left behind, seen from the inside: the parameters, the loss, the experts, one attention head,
# the latent cache, and text. Sections and equations in brackets are those of the technical report,
# [arXiv 2412.19437](https://arxiv.org/abs/2412.19437).
#
# The notebook runs from any folder of the project, on a laptop. `jupytext --to ipynb notebooks/01_model.py` turns it
# into a file that Jupyter opens.

# %%
# %matplotlib inline
import dataclasses
import functools
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

# The project's root is the first folder upwards that has the model in it.
sys.path.insert(0, next(str(path) for path in (Path.cwd(), *Path.cwd().parents) if (path / 'deepseek_jax').is_dir()))

import deepseek_jax as ds
from configs import loader
from deepseek_jax import block, flops, mla, model, names, norm, ops
from infer import Request, SamplingParams
from infer.checkpoint import load
from infer.engine import Engine
from train import metrics, run

ROOT = Path(ds.__file__).parents[1]

# %% [markdown]
# ## 1. The run
#
# `DEEPSEEK_RUN` names the folder of a training run; without it the notebook takes the one that `make train` writes.
# Where there is none, it trains the same configuration for fewer steps, which takes some minutes and is enough to see
# everything below, though not to write good Python.

# %% tags=["parameters"]
SHORT_RUN = ('TOTAL_STEPS = 100', 'EVAL_EVERY = 20', 'CHECKPOINT_EVERY = 100')

# %%
RUN = Path(os.environ.get('DEEPSEEK_RUN', ROOT / 'runs/tiny_cpu'))
if 'DEEPSEEK_RUN' not in os.environ and not RUN.is_dir():
    RUN = ROOT / 'runs/notebook'
    loader.parse(ROOT / 'configs/train/tiny_cpu.gin', SHORT_RUN)
    loader.call(run.train, run_dir=str(RUN), config_text=loader.operative_config)

# ds.load_run(RUN) gives the first two.
config, params, tokenizer = load(RUN)
counts = flops.count_parameters(config)
print(f'{RUN.name}: {counts}')

# %% [markdown]
# ## 2. Configuration and parameters
#
# A model is a frozen dataclass and a nested dictionary of arrays. The letters that end a name are the array's
# dimensions, listed in the docstring of `deepseek_jax`: `w_uk_CHN` maps the latent (C) to the keys of each head (H) in
# their part without position (N), and bears the symbol of the paper, $W^{UK}$ [2.1.1, eq. 2]. Layers of one kind are
# stacked: their arrays have one more axis, L, in front.

# %%
for field in dataclasses.fields(config):
    print(f'{field.name:18}{getattr(config, field.name)}')

# %%
print(f'{"parameter":52}{"dimensions":12}{"shape":22}{"count":>9}')
for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    path = names.path_names(path)
    letters = 'L' * names.is_stacked(path) + names.letters(path[-1])
    print(f'{"/".join(path):52}{letters:12}{" x ".join(map(str, leaf.shape)):22}{leaf.size:9,}')

print(f'\n{counts.total:,} in the main model, {counts.mtp:,} in the module for multi-token prediction [2.2]')
print(f'{counts.active:,} of the main model multiply the state of one token: of the experts only the chosen ones')
print(f'{flops.train_flops_per_token(config, 128, mtp=True) / 1e6:.1f} MFLOP a token to train, at length 128')

# %% [markdown]
# ## 3. Loss
#
# `metrics.jsonl` has one line for every step and one for every evaluation. On the left what is minimised: the
# cross-entropy of the next token, and that of the token after it, which the prediction module guesses [2.2, eq. 24].
# The module is given the token in between, so both guess a token from all those before it; with a block of its own on
# top of the model, it may be ahead at first where the model has few. On the right the loss of the next token in bits a
# byte, a measure that does not depend on the tokenizer: 8 is to know nothing.

# %%
lines = metrics.read_jsonl(RUN / metrics.METRICS_FILE)
steps = [line for line in lines if 'loss' in line]
evaluations = [line for line in lines if 'heldout_bits_per_byte' in line]
x = [line['step'] for line in steps]

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout='constrained')
left.plot(x, [line['loss'] for line in steps], label='next token')
if config.mtp_depth:
    left.plot(x, [line['mtp_loss'] for line in steps], label='the token after it (MTP)')
left.set(title='Training loss', xlabel='step', ylabel='nats a token')
right.plot(x, [line['bits_per_byte'] for line in steps], alpha=0.35, label='training batch')
heldout = [line['heldout_bits_per_byte'] for line in evaluations]
right.plot([line['step'] for line in evaluations], heldout, 'o-', color='tab:green', label='held-out files')
right.set(title=f'Held-out text: {heldout[-1]:.3f} bits a byte', xlabel='step', ylabel='bits a byte')
for axes in (left, right):
    axes.grid(alpha=0.3)
    axes.legend()
plt.show()

# %% [markdown]
# ## 4. Experts
#
# Of the routed experts of a layer, each token goes to a few [2.1.2, eq. 12-16]. The left picture shows which share of
# the tokens of held-out text each one gets, in multiples of an even share: 1 is even, 0 an expert that nobody asks.
#
# It is hardly the loss that keeps them even: its balance term [eq. 17-20] has the weight 0.0001. The router adds a bias
# $b_i$ to the affinity where it *chooses* experts, not where it weighs them [eq. 16], and after every step the bias of
# an expert with more tokens than the mean goes down by $\gamma$ (0.001 in the report), that of one with fewer goes up.
# The right picture shows where that has led: a negative bias marks an expert that the affinities alone would prefer.

# %%
load_LE = np.array(evaluations[-1]['expert_load'])
routers = [params['moe_layers']['moe']['router']]
if config.mtp_depth:
    routers.append(params['mtp']['block']['moe']['router'])
bias_LE = np.concatenate([router['router_bias_E'] for router in routers])
rows = [f'layer {i}' for i in range(config.num_dense_layers, config.num_layers)]
rows += [f'MTP {k}' for k in range(1, config.mtp_depth + 1)]

figure, pictures = plt.subplots(1, 2, figsize=(11, 0.5 * len(rows) + 1.6), layout='constrained')
spread = np.abs(bias_LE).max()
for axes, values_LE, title, unit, limits in (
    (pictures[0], load_LE * load_LE.shape[1], 'Load on held-out text', 'even shares', (0, 2)),
    (pictures[1], bias_LE, 'Selection bias', '$b_i$', (-spread, spread)),
):
    image = axes.imshow(values_LE, cmap='coolwarm', vmin=limits[0], vmax=limits[1], aspect='auto')
    axes.set(title=title, xlabel='expert', yticks=range(len(rows)), yticklabels=rows)
    figure.colorbar(image, ax=axes, label=unit, extend='max' if values_LE.max() > limits[1] else 'neither')
    if values_LE.shape[1] <= 16:
        for (layer, expert), value in np.ndenumerate(values_LE):
            axes.text(expert, layer, f'{value:.2f}', ha='center', va='center', fontsize=8)
plt.show()

# %% [markdown]
# ## 5. One head, reading a line of Python
#
# A layer keeps of every token a latent $c^{KV}$ and a rotated key $k^R$ [eq. 1, 3]; keys of each head come out of the
# latent [eq. 2], and a query's products with them, through a softmax, say where the head looks [eq. 10]. The function
# below writes that out with the model's own parts and lets the block do the rest. Walking the layers with it must end
# where `ds.forward` ends.

# %%
LINE = '    return [name for name in self.names]\n'
tokens_BT = jnp.array([[tokenizer.bos_id, *tokenizer.encode(LINE)]])


@functools.partial(jax.jit, static_argnames='config')
def look(stack, i, x_BTD, attend, config):
    """Where each head of block `i` of a stack looks, (B, H, T, S), and the block's output."""
    layer = jax.tree.map(lambda leaf: leaf[i], stack)
    weights = layer['attention']
    normed_BTD = norm.rms_norm(x_BTD, layer['attention_norm_D'], config.norm_eps)
    q_BTHN, q_rope_BTHR, latent_BSC, k_rope_BSR = mla.project(weights, normed_BTD, attend.rotation, config)
    k_BSHN = ops.einsum('BSC,CHN->BSHN', latent_BSC, weights['w_uk_CHN'])
    scores_BHTS = ops.einsum_fp32('BTHN,BSHN->BHTS', q_BTHN, k_BSHN)
    scores_BHTS += ops.einsum_fp32('BTHR,BSR->BHTS', q_rope_BTHR, k_rope_BSR)
    seen_BTS = jnp.arange(scores_BHTS.shape[3]) <= attend.positions_BT[:, :, None]
    scores_BHTS = jnp.where(seen_BTS[:, None], scores_BHTS * config.softmax_scale, -jnp.inf)
    probabilities_BHTS = jax.nn.softmax(scores_BHTS, axis=-1)
    return probabilities_BHTS, block.block(layer, x_BTD, attend, None, config)[0]


# Two ways to the same numbers are compared here and in part 7: float32 keeps rounding out of it.
exact = dataclasses.replace(config, precision=ds.PrecisionConfig(recipe='fp32'))
attend = model.causal_attend(tokens_BT, None, exact)
x_BTD = params['embedding_VD'][tokens_BT].astype(jnp.float32)
probabilities = []
for name, length in (('dense_layers', config.num_dense_layers), ('moe_layers', config.num_moe_layers)):
    for i in range(length):
        probabilities_BHTS, x_BTD = look(params[name], i, x_BTD, attend, exact)
        probabilities.append(probabilities_BHTS[0])
probabilities_LHTS = np.stack(probabilities)

logits_BTV = ds.forward(params, tokens_BT, exact).logits_BTV
hidden_BTD = norm.rms_norm(x_BTD, params['final_norm_D'], config.norm_eps)
difference = jnp.abs(ds.logits(params, hidden_BTD, exact) - logits_BTV).max()
print(f'layer by layer against ds.forward: the logits differ by {difference:.1e} at most')
assert difference < 1e-3

# %% [markdown]
# Rows are the tokens that look, columns those that are looked at; nothing right of the diagonal, because the model is
# causal. Of all heads this is the one that is surest where to look: its rows have the lowest mean entropy. After some
# hundred steps it is usually a head that reads the token before, from which the layers above learn what follows what.

# %%
entropy_LH = -np.sum(probabilities_LHTS * np.log2(probabilities_LHTS + 1e-30), axis=-1).mean(axis=-1)
print('mean entropy of each head, bits')
for i, row in enumerate(entropy_LH):
    print(f'  layer {i}:', '  '.join(f'{entropy:.2f}' for entropy in row))
sharpest, head = np.unravel_index(entropy_LH.argmin(), entropy_LH.shape)

visible = {' ': '·', '\n': '⏎'}
texts = [tokenizer.decode([token]) for token in tokens_BT[0].tolist()[1:]]
labels = ['bos', *(visible.get(text, text) for text in texts)]
figure, axes = plt.subplots(figsize=(8.5, 7.5), layout='constrained')
image = axes.imshow(probabilities_LHTS[sharpest, head], cmap='magma', vmin=0)
axes.set_xticks(range(len(labels)), labels, family='monospace')
axes.set_yticks(range(len(labels)), labels, family='monospace')
axes.get_xticklabels()[0].set_rotation(90)
axes.set(title=f'Attention of head {head} in layer {sharpest}', xlabel='looked at', ylabel='looking')
figure.colorbar(image, ax=axes, label='probability', shrink=0.8)
plt.show()

# %% [markdown]
# ## 6. What the cache holds
#
# The latent and the rotated key are all that generation needs of the past: C + R numbers a token and layer, shared by
# all heads [2.1.1]. Caching what they expand to, keys and values of every head, would take H (N + R + U).


# %%
def readable(size):
    return f'{size / 2**10:.1f} KiB' if size < 2**20 else f'{size / 2**20:.2f} MiB'


print(f'{"bytes a token, bf16":22}{"latent":>12}{"expanded":>12}{"factor":>9}')
sizes = {}
for name in ('tiny', 'moonlight_16b', 'v3_671b'):
    loader.parse(ROOT / f'configs/model/{name}.gin', ["config.PrecisionConfig.recipe = 'bf16'"])
    shape = loader.call(ds.ModelConfig)
    cache = jax.eval_shape(lambda shape=shape: ds.init_cache(shape, batch_size=1, max_length=1))
    latent = sum(leaf.size * leaf.dtype.itemsize for leaf in cache)
    width = shape.mla.nope_head_dim + shape.mla.rope_head_dim + shape.mla.value_head_dim
    expanded = shape.num_layers * shape.mla.num_heads * width * cache.latent_LBSC.dtype.itemsize
    sizes[name] = (latent, expanded)
    print(f'{name:22}{readable(latent):>12}{readable(expanded):>12}{expanded / latent:8.1f}x')

figure, axes = plt.subplots(figsize=(7.5, 3.6), layout='constrained')
places = np.arange(len(sizes))
for i, label in enumerate(('latent (MLA)', 'expanded')):
    values = [pair[i] for pair in sizes.values()]
    bars = axes.bar(places + 0.4 * i - 0.2, values, width=0.4, label=label)
    axes.bar_label(bars, [readable(value) for value in values])
axes.set(title='Cache of one token, all layers', ylabel='bytes (logarithmic)', yscale='log', xticks=places)
axes.set_xticklabels(sizes)
axes.margins(y=0.15)
axes.legend(loc='upper left')
plt.show()

# %% [markdown]
# ## 7. Attending to the latent itself
#
# To decode, the cached latents need not be expanded at all: $q \cdot (W^{UK} c) = (W^{UK\top} q) \cdot c$, so each query
# goes to the latent's space instead, and $W^{UV}$ is applied to the weighted sum (arXiv 2405.04434, 2.1.2). `ds.extend`
# does so with `absorbed=True`. Fed one token at a time, it must give the logits that `ds.forward`, which expands, gives
# for the whole line.


# %%
@functools.partial(jax.jit, static_argnames='config')
def decode(params, tokens_T, config):
    """The logits (T, V) of a line that is read token by token."""

    def step(cache, inputs):
        token, position = inputs
        hidden_BTD, cache = ds.extend(params, token[None, None], position[None, None], cache, config, absorbed=True)
        return cache, ds.logits(params, hidden_BTD[0, 0], config)

    cache = ds.init_cache(config, batch_size=1, max_length=tokens_T.size)
    return jax.lax.scan(step, cache, (tokens_T, jnp.arange(tokens_T.size)))[1]


logits_TV = decode(params, tokens_BT[0], exact)
difference = jnp.abs(logits_TV - logits_BTV[0]).max()
print(f'{len(logits_TV)} absorbed steps against one expanded pass: the logits differ by {difference:.1e} at most')
assert difference < 1e-3

# %% [markdown]
# ## 8. Text
#
# The temperature divides the logits before a token is drawn: at 0 the most likely one is taken, again and again; at 1
# the model's own distribution is followed, mistakes included. All four answers are drawn in one batch.

# %%
PROMPT = 'def read('
TEMPERATURES = (0.0, 0.5, 0.8, 1.1)

engine = Engine(params, config, tokenizer, max_length=256, max_batch=len(TEMPERATURES))
prompt_ids = (tokenizer.bos_id, *tokenizer.encode(PROMPT))
requests = [Request(prompt_ids, SamplingParams(temperature=t, max_tokens=160, seed=0)) for t in TEMPERATURES]
texts = dict.fromkeys(range(len(requests)), PROMPT)
for event in engine.generate(requests):
    texts[event.index] += event.text
for temperature, text in zip(TEMPERATURES, texts.values(), strict=True):
    print(f'--- temperature {temperature}\n{text}\n')
