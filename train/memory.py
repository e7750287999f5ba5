"""Memory of the step's program: how much it needs, and what to change when that is more than there is."""

import bisect
import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Sequence
from typing import Any

import jax

from deepseek_jax.config import RematPolicy
from train.errors import TrainingError

REMAT: tuple[RematPolicy, ...] = typing.get_args(RematPolicy)
"""From the policy that keeps most for the backward pass to the one that keeps least."""


class OutOfMemoryError(TrainingError):
    """The training step does not fit on the device."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the step's memory can be changed by without changing what is computed.

    Attributes:
      microbatch_size: sequences whose activations exist at a time.
      remat: what of them the backward pass recomputes.
    """

    microbatch_size: int
    remat: RematPolicy


Need = Callable[[Setting], int | float | None]
"""Bytes a device that a setting's program needs: None if that is not known, infinity if it does not even compile."""


def is_exhausted(error: BaseException) -> bool:
    """Whether JAX ran out of memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' in str(error)


def needed_bytes(program: jax.stages.Compiled) -> int | None:
    """Bytes a device that a program occupies, arguments included; None if the compiler does not say."""
    stats: Any = program.memory_analysis()
    if stats is None:
        return None
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return held + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes


def fits_twice(program: jax.stages.Compiled, limit: int | None) -> bool:
    """Whether the temporaries of two executions fit beside one's arguments; so where there is no limit or no count."""
    needed = needed_bytes(program)
    if limit is None or needed is None:
        return True
    return needed + program.memory_analysis().temp_size_in_bytes <= limit  # pyright: ignore[reportOptionalMemberAccess]


def available_bytes() -> int | None:
    """Bytes that JAX may use on the smallest device of this process; None where there is no limit, as on CPUs."""
    limits = [(device.memory_stats() or {}).get('bytes_limit') for device in jax.local_devices()]
    return None if None in limits else min(limit for limit in limits if limit is not None)


def divisors(batch_sizes: Sequence[int], multiple_of: int = 1) -> list[int]:
    """The microbatch sizes that divide every batch, ascending, of those that so many devices can share."""
    common = math.gcd(*batch_sizes)
    return [size for size in range(multiple_of, common + 1, multiple_of) if common % size == 0]


def fitting(present: Setting, microbatch_sizes: Sequence[int], need: Need, limit: int | None) -> Setting | None:
    """The first setting after `present` that fits, None if none does.

    First come smaller microbatches with the same policy, the largest of them that fits, for they repeat no work; then
    the other policies, each again with the largest microbatch that fits. Without a limit, or where the need is not
    known, the next setting is the answer. `need` is asked as few times as a search by halves needs: the answer costs
    a compilation.
    """

    def fits(setting: Setting) -> bool:
        needed = need(setting)
        return needed is None or needed < (math.inf if limit is None else limit)

    for remat in REMAT[REMAT.index(present.remat) :]:
        below = present.microbatch_size + (remat != present.remat)
        settings = [Setting(size, remat) for size in microbatch_sizes if size < below]
        if settings and fits(settings[0]):
            # What needs more memory comes later: those that fit end where the first one does not.
            return settings[bisect.bisect_left(settings, True, key=lambda setting: not fits(setting)) - 1]
    return None


def explain(present: Setting, microbatch_sizes: Sequence[int], need: Need, limit: int | None) -> str:
    """One line: what the step needs, what there is, and what would fit of these microbatch sizes, ascending."""
    need = functools.cache(need)
    proposed = fitting(present, microbatch_sizes, need, limit)
    has = '' if limit is None else f'a device has {_gib(limit)}; '
    text = f'out of memory: the training step with {_words(present)} needs {_gib(need(present))}; {has}'
    if proposed is None:
        return text + 'no smaller microbatch and no other remat fits: take more devices or shorter sequences'
    return text + f'{"try" if limit is None else "what fits is"} {_words(proposed)}: {_gib(need(proposed))}'


def _words(setting: Setting) -> str:
    return f'train.microbatch_size={setting.microbatch_size} and ModelConfig.remat={setting.remat!r}'


def _gib(size: int | float | None) -> str:
    if size is None:
        return 'an unknown amount'
    return 'more than there is' if math.isinf(size) else f'{size / 2**30:.3g} GiB'
