"""One whole DeepSeekMoE layer of DeepSeek-V3's width on one Hopper GPU, forward and backward, and where its time goes.

`python benchmarks/moe_layer.py` times router, 32 routed experts of which each of 8192 tokens takes 8, and a shared expert,
with the gradients of the input and of every parameter: in the recipes fp8 and bf16, and in bf16 with the routed experts
written with `jax.lax.ragged_dot`. Parameters are float32 masters; every call quantises or casts them itself.

Times are spans of many queued calls, the contenders in turn in one run. XLA turns `ragged_dot` into products over all
groups, 32 times the work in the memory of a whole GPU, hence a second, smaller size for that one. The table of parts sums the times that CUPTI
gives each kernel; "idle" is what is left of the span: gaps, copies and fills. All work of the shared expert counts as its
own, but for the weights, whose part holds the routed ones' and the shared ones' quantisation or casts.

The router of a layer whose experts lie on several GPUs chooses among all of them: `--router-experts 256` times its choice
in 4 of 8 groups, the balance statistics and the sort by expert apart, forward and backward.
"""

import argparse
import datetime
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

import pallas_kernels
from deepseek_jax import moe, router
from deepseek_jax.config import MoEConfig, PrecisionConfig
from pallas_kernels.bench import checks, expert_ffn, parts, report, timing
from pallas_kernels.bench.cases import first_line
from pallas_kernels.bench.parts import Rule
from pallas_kernels.implementation import hopper_cores

SEQUENCE = 4096
BALANCE_WEIGHT = 1e-4
GATE_SCALE = 2.5
GROUPS, TOP_GROUPS = 8, 4
BASELINE, RAGGED = 'bf16', 'ragged_dot'
RECIPES = ('fp8', 'bf16')

PRODUCTS, WEIGHT_GRADIENTS = 'products and input gradients (routed)', 'weight gradients (routed)'
PREPARED, QUANTISED = 'weights prepared', 'activations quantised (routed)'
SWIGLU, PERMUTE, COMBINE = 'SwiGLU (routed)', 'permute', 'combine'
ROUTER, SHARED, IDLE = 'router and sort', 'shared expert', 'idle'
PARTS = (
    PRODUCTS, WEIGHT_GRADIENTS, PREPARED, QUANTISED, SWIGLU, PERMUTE, COMBINE, ROUTER, SHARED, parts.OTHER, IDLE,
)  # fmt: skip


class Size(NamedTuple):
    """A layer: T tokens of width D, E routed experts of width F of which a token takes K, and one shared expert."""

    T: int
    E: int
    K: int = 8
    D: int = 7168
    F: int = 2048

    @property
    def config(self) -> MoEConfig:
        return MoEConfig(
            num_experts=self.E,
            num_shared_experts=1,
            top_k=self.K,
            num_groups=1,
            top_groups=1,
            ffn_dim=self.F,
            gate_scale=GATE_SCALE,
        )

    @property
    def flops(self) -> int:
        """Operations of the routed and the shared experts, forward and backward."""
        return 3 * 6 * self.T * (self.K + 1) * self.D * self.F

    def __str__(self) -> str:
        return ' '.join(f'{letter}{size}' for letter, size in self._asdict().items())


FULL, SMALL = Size(T=8192, E=32), Size(T=2048, E=8)


def _within(*scopes: str) -> str:
    """Matches an `op_name` with one of these scopes on its path, bare or as in `transpose(jvp(permute))`."""
    return rf'(^|[/(])({"|".join(scopes)})([/)]|$)'


RULES = (
    Rule(PRODUCTS, kernel='^grouped_gemm_'),
    Rule(WEIGHT_GRADIENTS, kernel='^grouped_wgrad_'),
    Rule(PREPARED, kernel='^quantize_blocks_'),
    # A sort is the last component of its own path.
    Rule(ROUTER, scope=_within('route', 'sort')),
    Rule(ROUTER, kernel='radix_sort'),
    # Gradients are cast in the other direction.
    Rule(PREPARED, kernel='convert', scope=r'^(?!.*transpose\().*\bshared\b.*convert_element_type$'),
    Rule(SHARED, scope=_within('shared')),
    Rule(SHARED, kernel='^(gemm|wgrad)_fp8_|nvjet|cutlass|xmma|splitK'),
    Rule(SWIGLU, kernel='^swiglu_quantize'),
    Rule(QUANTISED, kernel='^(re)?quantize_'),
    Rule(SWIGLU, scope=_within('swiglu')),
    # Each is the other's gradient: the scope inside the other counts.
    Rule(PERMUTE, scope=rf'{_within("permute")}(?!.*\bcombine\b)'),
    Rule(COMBINE, scope=_within('combine')),
    # Gradients of weights that stood side by side are cut apart.
    Rule(WEIGHT_GRADIENTS, scope=r'transpose\(.*\bweights\b'),
    Rule(WEIGHT_GRADIENTS, kernel='slice', scope=r'transpose\(.*/(slice|split)$'),
    Rule(PREPARED, scope=_within('weights')),
)


def inputs(size: Size, key: jax.Array) -> tuple[dict[str, Any], jax.Array, jax.Array]:
    """Parameters as the model has them, the input of the layer and the gradient of its output."""
    T, E, _, D, F = size
    keys = iter(jax.random.split(key, 9))

    def weight(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) * shape[-2] ** -0.5

    params = {
        'router': {'w_router_DE': weight(D, E), 'router_bias_E': jnp.zeros(E)},
        'experts': {name: weight(E, F, D) if name.endswith('FD') else weight(E, D, F) for name in moe.EXPERT_NAMES},
        'shared': {name: weight(F, D) if name.endswith('FD') else weight(D, F) for name in moe.FFN_NAMES},
    }
    sequence = min(T, SEQUENCE)
    x_BTD, d_BTD = (jax.random.normal(next(keys), (T // sequence, sequence, D), jnp.bfloat16) for _ in 'xd')
    return params, x_BTD, d_BTD


def layers(size: Size) -> dict[str, Callable[..., Any]]:
    """The contenders by name."""
    bf16 = PrecisionConfig(recipe='bf16')
    return {
        'fp8': functools.partial(moe.moe, config=size.config, precision=PrecisionConfig(recipe='fp8')),
        BASELINE: functools.partial(moe.moe, config=size.config, precision=bf16),
        RAGGED: functools.partial(ragged_moe, config=size.config, precision=bf16),
    }


def ragged_moe(
    params: Mapping[str, Any], x_BTD: jax.Array, config: MoEConfig, precision: PrecisionConfig
) -> tuple[jax.Array, moe.Balance]:
    """`moe.moe` with the routed experts in plain JAX."""
    routing, balance, routes = _route(params['router'], x_BTD, config)
    weights = tuple(params['experts'][name] for name in moe.EXPERT_NAMES)
    y_MD = expert_ffn._ragged_dot(x_BTD.reshape(-1, x_BTD.shape[-1]), routing.gates_MK, routes, weights)
    return y_MD.reshape(x_BTD.shape) + moe.swiglu(params['shared'], x_BTD, precision), balance


def _route(
    params: Mapping[str, Any], x_BTD: jax.Array, config: MoEConfig
) -> tuple[router.Routing, moe.Balance, pallas_kernels.Routes]:
    routing = router.route(params, x_BTD.reshape(-1, x_BTD.shape[-1]), config)
    balance = moe.balance(routing, jnp.int32(0), x_BTD.shape[:-1], config)
    return routing, balance, pallas_kernels.routes(routing.experts_MK, config.num_experts)


def step(layer: Callable[..., Any], params: Mapping[str, Any], x_BTD: jax.Array, d_BTD: jax.Array) -> dict[str, Any]:
    """Output and balance of a layer, and the gradients of its input and of every parameter."""

    def forward(params, x_BTD):
        y_BTD, balance = layer(params, x_BTD)
        return (y_BTD, balance.loss), balance.load_E

    (y_BTD, loss), pull, load_E = jax.vjp(forward, params, x_BTD, has_aux=True)
    d_params, d_x_BTD = pull((d_BTD, jnp.full_like(loss, BALANCE_WEIGHT)))
    gradients = {f'd_{name}': d for name, d in d_params.items()}
    return {'output': y_BTD, 'balance_loss': loss, 'load': load_E, 'd_x': d_x_BTD, **gradients}


def router_config(experts: int) -> MoEConfig:
    """A router of that many experts in V3's groups. Raises `ValueError` where they do not fit."""
    return MoEConfig(
        num_experts=experts,
        num_shared_experts=0,
        top_k=FULL.K,
        num_groups=GROUPS,
        top_groups=TOP_GROUPS,
        ffn_dim=FULL.F,
        gate_scale=GATE_SCALE,
    )


def router_step(config: MoEConfig, params: Mapping[str, Any], x_BTD: jax.Array, d_gates_MK: jax.Array) -> Any:
    """Gates, balance and routes of all tokens, and the gradients of the input and of the router's weight."""

    def forward(params, x_BTD):
        routing, balance, routes = _route(params, x_BTD, config)
        return (routing.gates_MK, balance.loss), (balance.load_E, routes)

    outputs, pull, rest = jax.vjp(forward, params, x_BTD, has_aux=True)
    return outputs, rest, pull((d_gates_MK, jnp.full_like(outputs[1], BALANCE_WEIGHT)))


def measure(size: Size, clock: timing.Clock, names: Sequence[str], with_parts: bool = False) -> dict[str, Any]:
    """Times contenders at one size, bf16 among them, and compares their results with its.

    Returns:
      The shape; for each contender milliseconds, TFLOP/s and errors, or why there are none; ratios; with parts, those of
      the recipes, or why there are none.
    """
    sets = [jax.jit(functools.partial(inputs, size))(jax.random.key(0))]
    works: dict[str, timing.JaxWork] = {}
    contenders: dict[str, dict[str, Any]] = {name: {} for name in names}
    expected = None
    for name in (BASELINE, *(name for name in contenders if name != BASELINE)):
        try:
            work = timing.JaxWork(functools.partial(step, layers(size)[name]), sets)
            (results,) = work.run_once()
            if expected is None:  # on the host: beside it, ragged_dot would not fit
                expected = jax.device_get(results)
            else:
                contenders[name]['errors'] = {
                    part: checks.difference(results[part], expected[part]) for part in expected
                }
            del results
            work.span(2)  # as many results at once as later
            works[name] = work
        except jax.errors.JaxRuntimeError as error:
            if name != RAGGED or 'RESOURCE_EXHAUSTED' not in str(error):
                raise
            contenders[name] = {'failure': f'out of memory: {first_line(error)}'}
    us, _ = clock.microseconds(list(works.values()), 'span')
    for name, one in zip(works, us, strict=True):
        contenders[name] |= {'ms': 1e-3 * one, 'tflops': size.flops / one * 1e-6}
    result = {'shape': size._asdict(), 'contenders': contenders, 'ratios': _ratios(contenders)}
    if with_parts:
        result |= _parts({name: works[name] for name in RECIPES}, contenders, clock)
    return result


def _ratios(contenders: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    pairs = ((BASELINE, 'fp8'), (RAGGED, BASELINE))
    ms = {name: contender['ms'] for name, contender in contenders.items() if 'ms' in contender}
    return {f'{slow} / {fast}': ms[slow] / ms[fast] for slow, fast in pairs if slow in ms and fast in ms}


def _parts(
    works: Mapping[str, timing.JaxWork], contenders: Mapping[str, Mapping[str, Any]], clock: timing.Clock
) -> dict[str, Any]:
    """Milliseconds of each part of the recipes, and every kernel."""
    if clock.method != 'kernels':
        return {'parts_failure': 'CUPTI does not serve'}
    table, longest, kernels = {}, {}, {}
    for name, work in works.items():
        try:
            timings = parts.kernel_milliseconds(clock, work)
        except timing.LostKernelsError as error:
            return {'parts_failure': str(error)}
        seen = parts.located(timings, parts.instructions(work.compiled_text()))
        table[name] = parts.sums(seen, RULES)
        table[name][IDLE] = contenders[name]['ms'] - sum(table[name].values())
        longest[name] = [_plain(kernel) for kernel in parts.longest(seen, RULES)]
        kernels[name] = [{'part': parts.part_of(kernel, RULES), **_plain(kernel)} for kernel in seen]
    return {'parts_ms': table, 'longest_of_other': longest, 'kernels': kernels}


def _plain(kernel: parts.Kernel) -> dict[str, Any]:
    return {'ms': kernel.milliseconds, 'name': kernel.name, 'op_name': kernel.op_name}


def measure_router(config: MoEConfig, size: Size, clock: timing.Clock, layer_ms: Mapping[str, float]) -> dict[str, Any]:
    """Times router, balance statistics and sort of as many tokens, and their shares of the layers' times."""
    T, D, E = size.T, size.D, config.num_experts

    def make(key):
        sequence = min(T, SEQUENCE)
        keys = jax.random.split(key, 3)
        params = {'w_router_DE': jax.random.normal(keys[0], (D, E)) * D**-0.5, 'router_bias_E': jnp.zeros(E)}
        x_BTD = jax.random.normal(keys[1], (T // sequence, sequence, D), jnp.bfloat16)
        return params, x_BTD, jax.random.normal(keys[2], (T, config.top_k))

    sets = [jax.jit(make)(jax.random.key(0))]
    work = timing.JaxWork(functools.partial(router_step, config), sets)
    (us,), _ = clock.microseconds([work], 'span')
    shares = {name: 1e-3 * us / ms for name, ms in layer_ms.items()}
    groups = {'groups': config.num_groups, 'top_groups': config.top_groups}
    return {'experts': E, **groups, 'ms': 1e-3 * us, 'share_of_layer': shares}


def lines(result: Mapping[str, Any]) -> list[str]:
    """What is printed of a size."""
    shown = [f'layer {Size(**result["shape"])}, forward and backward']
    for name, contender in result['contenders'].items():
        if failure := contender.get('failure'):
            shown.append(f'  {name:12} not measured, {failure}')
            continue
        errors = contender.get('errors', {})
        error = ', '.join(
            f'{part} {value:.1e}' for part, value in errors.items() if part not in ('balance_loss', 'load')
        )
        against = f'   error against {BASELINE}: {error}' if error else ''
        shown.append(f'  {name:12}{contender["ms"]:9.2f} ms{contender["tflops"]:7.0f} TFLOP/s{against}')
    shown += [f'  {pair}: {ratio:.2f}' for pair, ratio in result['ratios'].items()]
    if failure := result.get('parts_failure'):
        shown.append(f'no table of parts: {failure}')
    if table := result.get('parts_ms'):
        shown += _table(table, {name: sum(values.values()) for name, values in table.items()})
        for name, kernels in result['longest_of_other'].items():
            shown.append(f'  longest of {parts.OTHER}, {name}:')
            shown += [f'    {kernel["ms"]:8.3f} ms  {kernel["name"][:50]:52}{kernel["op_name"]}' for kernel in kernels]
    return shown


def _table(table: Mapping[str, Mapping[str, float]], whole: Mapping[str, float]) -> list[str]:
    def row(title: str, values: Mapping[str, float]) -> str:
        return f'  {title:40}' + ''.join(f'{ms:9.2f}{ms / whole[name]:8.1%}' for name, ms in values.items())

    without = {name: whole[name] - values[PREPARED] for name, values in table.items()}
    ratio = f'   {BASELINE} / fp8: {without[BASELINE] / without["fp8"]:.2f}'
    return [
        f'  {"milliseconds and share":40}' + ''.join(f'{name:>9}{"":8}' for name in table).rstrip(),
        *(row(part, {name: values[part] for name, values in table.items()}) for part in PARTS),
        row('layer', whole),
        row('layer without weights prepared', without) + ratio,
    ]


def draw(table: Mapping[str, Mapping[str, float]], path: pathlib.Path, title: str) -> None:
    """The parts of each recipe side by side in one bar."""
    figure = Figure(figsize=(10, 3.6), layout='constrained')
    axes = figure.subplots()
    names = list(table)[::-1]
    left = dict.fromkeys(names, 0.0)
    for index, part in enumerate(PARTS):
        widths = [max(0.0, table[name][part]) for name in names]
        color = f'C{index}' if index < 10 else 'lightgray'
        axes.barh(names, widths, left=list(left.values()), label=part, color=color, edgecolor='white', linewidth=0.5)
        left = {name: left[name] + width for name, width in zip(names, widths, strict=True)}
    for height, end in enumerate(left.values()):
        axes.text(end, height, f' {end:.1f} ms', va='center')
    axes.set(xlabel='milliseconds', title=title, xlim=(0, 1.1 * max(left.values())))
    figure.legend(loc='outside lower center', ncols=4, fontsize=8)
    figure.savefig(path, dpi=120)


def write(path: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Replaces the file in one go."""
    temporary = path.with_name(path.name + '.partial')
    temporary.write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')
    temporary.replace(path)


def main(arguments: list[str]) -> int:
    """Runs the command line. Returns 0; 2 for bad input or without a Hopper GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='a quarter of tokens and experts')
    parser.add_argument('--ragged-dot', action='store_true', help='ragged_dot at the full size too: some minutes')
    parser.add_argument('--router-experts', type=int, metavar='E', help='time a router of so many experts apart: 256')
    parser.add_argument('--output', type=pathlib.Path, metavar='FILE.json', help='write what was measured')
    parser.add_argument('--plot', type=pathlib.Path, metavar='FILE.png', help='draw the parts')
    options = parser.parse_args(arguments)
    for path in (options.output, options.plot):
        if path is not None and not path.parent.is_dir():
            parser.error(f'{path.parent} is no folder')
    config = None
    if options.router_experts is not None:
        try:
            config = router_config(options.router_experts)
        except ValueError as error:
            parser.error(str(error))
    if not os.environ.keys() & {'XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION'}:
        os.environ['XLA_CLIENT_MEM_FRACTION'] = '0.95'  # before jax starts: ragged_dot takes all that there is
    if hopper_cores() is None:
        print('error: the kernels need a Hopper GPU (compute capability 9.0), jax sees none here', file=sys.stderr)
        return 2

    clock = timing.Clock.detect()
    machine = report.machine()
    result = {
        **machine,
        'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        'command': ' '.join(['python benchmarks/moe_layer.py', *arguments]),
        'sizes': [],
    }
    print(f'{machine["device"]}, jax {machine["jax"]}, driver {machine["driver"]}', flush=True)
    for size in (SMALL,) if options.quick else (FULL, SMALL):
        first = not result['sizes']
        names = [*RECIPES, RAGGED] if size == SMALL or options.ragged_dot else RECIPES
        result['sizes'].append(measure(size, clock, names, with_parts=first))
        print('\n'.join(lines(result['sizes'][-1])), flush=True)
        if first and config is not None:
            layer_ms = {name: result['sizes'][0]['contenders'][name]['ms'] for name in RECIPES}
            result['router'] = routed = measure_router(config, size, clock, layer_ms)
            shares = ', '.join(f'{share:.1%} of the {name} layer' for name, share in routed['share_of_layer'].items())
            print(f'router of {routed["experts"]} experts, with balance and sort: {routed["ms"]:.3f} ms, {shares}')
        if options.output:  # after every size: a run that is cut short keeps what it measured
            write(options.output, result)
    if options.plot:
        if table := result['sizes'][0].get('parts_ms'):
            size = Size(**result['sizes'][0]['shape'])
            draw(table, options.plot, f'DeepSeekMoE layer, forward and backward: {size}, {machine["device"]}')
        else:
            print(f'nothing to draw: {result["sizes"][0]["parts_failure"]}', file=sys.stderr)
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
