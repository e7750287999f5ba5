"""The model as data: frozen dataclasses, checked when they are made.

Every number of the published models is a field here; nothing else in the package reads configuration from
anywhere. A wrong value raises `ValueError` naming the value and the rule, a value of the wrong type `TypeError`.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Literal


def check_types(config: object) -> None:
    """Checks that every field of a dataclass instance holds a value of its annotated type; ints pass as floats.

    gin checks no types, so configuration dataclasses call this from `__post_init__`. Raises `TypeError`.
    """
    fields = dataclasses.fields(config)  # pyright: ignore[reportArgumentType]
    values = {field.name: getattr(config, field.name) for field in fields}
    check_values(type(config).__name__, typing.get_type_hints(type(config)), values)


def check_values(owner: str, hints: Mapping[str, typing.Any], values: Mapping[str, typing.Any]) -> None:
    """Checks named values against type hints. Raises `TypeError` naming the owner, the value and the type."""
    for name, value in values.items():
        hint = hints[name]
        if not _is_instance(value, hint):
            wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace('typing.', '')
            raise TypeError(f'{owner}.{name}={value!r} must be of type {wanted}')


def _is_instance(value: object, hint: object) -> bool:
    origin = typing.get_origin(hint)
    if hint is typing.Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_is_instance(value, option) for option in typing.get_args(hint))
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        items = typing.get_args(hint)
        if len(items) == 2 and items[1] is Ellipsis:
            return all(_is_instance(item, items[0]) for item in value)
        return len(items) == len(value) and all(map(_is_instance, value, items))
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)  # pyright: ignore[reportArgumentType]


def require_positive(config: object, *names: str) -> None:
    """Checks that the named fields of `config` are above zero (`None` passes). Raises `ValueError`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f'{type(config).__name__}.{name}={value} must be positive')


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN extension of the rotary part to longer contexts [4.3; arXiv 2309.00071].

    Attributes:
      scale: `s`, the factor by which the context grows.
      original_length: context length of the pretraining, in tokens.
      beta_fast: rotations over `original_length` above which a frequency is left alone (the report's beta).
      beta_slow: rotations below which a frequency is divided by `scale` (the report's alpha).
      mscale: coefficient in `sqrt(t) = 0.1 * mscale * ln(s) + 1` applied to cosines and sines.
      mscale_all_dim: the same coefficient for the softmax scale, which is multiplied by the square; cosines and
        sines are divided by it, so equal coefficients leave them at 1.
    """

    scale: float = 40.0
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, 'original_length', 'beta_fast', 'beta_slow')
        if self.scale < 1:
            raise ValueError(f'YarnConfig.scale={self.scale} must be at least 1')
        if self.beta_slow > self.beta_fast:
            raise ValueError(f'YarnConfig.beta_slow={self.beta_slow} exceeds beta_fast={self.beta_fast}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: base frequency `theta` and, for extended contexts, YaRN."""

    theta: float = 10_000.0
    yarn: YarnConfig | None = None

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, 'theta')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention [2.1.1].

    Attributes:
      num_heads: H.
      nope_head_dim: N, query/key width without position, per head.
      rope_head_dim: R, rotary query/key width; one rotary key serves all heads.
      value_head_dim: U.
      kv_rank: C, width of the compressed key/value latent that is cached.
      query_rank: Q, width of the compressed query latent; None projects queries straight from the model width.
      latent_norm_eps: RMSNorm epsilon of both latents; 1e-6 in published models whatever their `norm_eps`.
    """

    num_heads: int
    nope_head_dim: int
    rope_head_dim: int
    value_head_dim: int
    kv_rank: int
    query_rank: int | None = None
    latent_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, *(field.name for field in dataclasses.fields(self)))
        if self.rope_head_dim % 2:
            raise ValueError(f'MLAConfig.rope_head_dim={self.rope_head_dim} must be even: it rotates pairs')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """DeepSeekMoE with auxiliary-loss-free balancing [2.1.2].

    Attributes:
      num_experts: E, routed experts a layer.
      num_shared_experts: shared experts a layer; they are computed as one SwiGLU of that many widths.
      top_k: K, routed experts a token.
      num_groups: G, groups the experts are split into (nodes, in the published training).
      top_groups: groups a token may choose its experts from.
      ffn_dim: F, hidden width of one expert.
      gate_scale: factor on the normalised gates (2.5 in the 671B model).
    """

    num_experts: int
    num_shared_experts: int
    top_k: int
    num_groups: int
    top_groups: int
    ffn_dim: int
    gate_scale: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, 'num_experts', 'top_k', 'num_groups', 'top_groups', 'ffn_dim', 'gate_scale')
        if self.num_shared_experts < 0:
            raise ValueError(f'MoEConfig.num_shared_experts={self.num_shared_experts} must not be negative')
        if self.num_experts % self.num_groups:
            raise ValueError(
                f'MoEConfig.num_experts={self.num_experts} must be a multiple of num_groups={self.num_groups}'
            )
        if self.top_groups > self.num_groups:
            raise ValueError(f'MoEConfig.top_groups={self.top_groups} exceeds num_groups={self.num_groups}')
        limit = self.top_groups * (self.num_experts // self.num_groups)
        if self.top_k > limit:
            raise ValueError(
                f'MoEConfig.top_k={self.top_k} exceeds the {limit} experts in the allowed groups '
                f'(top_groups={self.top_groups} of {self.num_experts // self.num_groups} experts each)'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Which number format computes what.

    Attributes:
      recipe: 'fp32' computes everything in float32; 'bf16' computes linear layers in bfloat16 with float32
        accumulation and keeps router, norms, softmax and logits in float32; 'fp8' is 'bf16' with the attention
        projections, dense FFNs and shared experts in block-scaled float8, forward and backward [3.3]. Master weights
        and their optimizer are the same in all.
      power_of_two_scales: round the scales of float8 operands up to powers of two.
    """

    recipe: Literal['fp32', 'bf16', 'fp8'] = 'bf16'
    power_of_two_scales: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        if self.power_of_two_scales and self.recipe != 'fp8':
            raise ValueError(f"PrecisionConfig.power_of_two_scales=True needs recipe='fp8', not {self.recipe!r}")


RematPolicy = Literal['none', 'paper', 'dots', 'full']


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A DeepSeek-V3 model.

    Attributes:
      vocab_size: V, rows of the embedding and of the head.
      num_layers: main-model blocks, dense ones included.
      num_dense_layers: leading blocks with a dense FFN instead of experts.
      model_dim: D.
      dense_ffn_dim: hidden width of the dense FFN.
      mla, moe, rope, precision: the parts; `moe` may be None only if every layer is dense.
      mtp_depth: multi-token prediction modules [2.2]; module k predicts the token k + 1 places ahead.
      norm_eps: RMSNorm epsilon of all norms but those of the latents.
      init_std: standard deviation of the initial weights.
      remat: what the backward pass recomputes, per block: 'none', 'paper' (norms, the up-projections of MLA, SwiGLU
        [3.2.3]), 'dots' (all but matrix products and attention), 'full'.
      scan_unroll: blocks per iteration of the scan over layers (changes compile time and speed, not values).
    """

    vocab_size: int
    num_layers: int
    num_dense_layers: int
    model_dim: int
    dense_ffn_dim: int
    mla: MLAConfig
    moe: MoEConfig | None
    rope: RopeConfig = RopeConfig()
    mtp_depth: int = 0
    norm_eps: float = 1e-6
    init_std: float = 0.006
    precision: PrecisionConfig = PrecisionConfig()
    remat: RematPolicy = 'none'
    scan_unroll: int = 1

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(
            self,
            'vocab_size',
            'num_layers',
            'model_dim',
            'dense_ffn_dim',
            'norm_eps',
            'init_std',
            'scan_unroll',
        )
        if not 0 <= self.num_dense_layers <= self.num_layers:
            raise ValueError(
                f'ModelConfig.num_dense_layers={self.num_dense_layers} must lie in 0..num_layers={self.num_layers}'
            )
        if self.mtp_depth < 0:
            raise ValueError(f'ModelConfig.mtp_depth={self.mtp_depth} must not be negative')
        if self.moe is None and (self.num_moe_layers or self.mtp_depth):
            raise ValueError(
                f'ModelConfig.moe=None needs every layer dense and no MTP module: '
                f'num_dense_layers={self.num_dense_layers}, num_layers={self.num_layers}, mtp_depth={self.mtp_depth}'
            )

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    @property
    def softmax_scale(self) -> float:
        """`1 / sqrt(N + R)`, times the square of YaRN's mscale when the context is extended."""
        scale = 1.0 / math.sqrt(self.mla.nope_head_dim + self.mla.rope_head_dim)
        if self.rope.yarn is not None:
            scale *= yarn_mscale(self.rope.yarn.scale, self.rope.yarn.mscale_all_dim) ** 2
        return scale


def yarn_mscale(scale: float, mscale: float) -> float:
    """`0.1 * mscale * ln(scale) + 1`, YaRN's attention temperature `sqrt(t)` [4.3]."""
    return 0.1 * mscale * math.log(scale) + 1.0 if scale > 1.0 else 1.0


def to_dict(config: ModelConfig) -> dict[str, typing.Any]:
    """The configuration as nested plain dictionaries that JSON can hold."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, typing.Any]) -> ModelConfig:
    """The inverse of `to_dict`. Raises `ValueError` for an unknown or missing field."""
    return _build(ModelConfig, values)


def _build(cls: type, values: dict[str, typing.Any]) -> typing.Any:
    hints = typing.get_type_hints(cls)
    if unknown := sorted(set(values) - set(hints)):
        raise ValueError(f'{cls.__name__} has no field {unknown[0]!r}; it has {sorted(hints)}')
    built = {}
    for name, value in values.items():
        options = [hints[name], *typing.get_args(hints[name])]
        part = next((option for option in options if dataclasses.is_dataclass(option)), None)
        built[name] = _build(part, value) if part and isinstance(value, dict) else value  # pyright: ignore
    required = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
    if missing := sorted(required - set(built)):
        raise ValueError(f'{cls.__name__} needs {missing}')
    return cls(**built)
