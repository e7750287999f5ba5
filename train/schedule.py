"""Values that change as training goes on, expressed in tokens [4.2]."""

import dataclasses
import itertools
import math
from typing import Literal

from deepseek_jax.config import check_types, require_positive

Shape = Literal['constant', 'linear', 'cosine']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """A value as pieces laid end to end over the tokens seen.

    Attributes:
      pieces: (shape, value, length) each: 'constant' holds the value, 'linear' and 'cosine' go to it from the value
        before. The last value stays after the end.
      start: the value before the first piece.
      unit: of the lengths: 'tokens', or 'run' for shares of the whole run's tokens.
    """

    pieces: tuple[tuple[Shape, float, float], ...]
    start: float = 0.0
    unit: Literal['tokens', 'run'] = 'tokens'

    def __post_init__(self) -> None:
        check_types(self)
        # Lists pass the check, but a configuration must be hashable.
        object.__setattr__(self, 'pieces', tuple(map(tuple, self.pieces)))
        if not self.pieces:
            raise ValueError('Schedule.pieces=() must hold at least one (shape, value, length)')
        for piece in self.pieces:
            if not piece[2] > 0:
                raise ValueError(f'Schedule.pieces has {piece}: the length must be positive')
        if self.unit == 'run' and sum(piece[2] for piece in self.pieces) > 1 + 1e-6:
            raise ValueError(f"Schedule.pieces={self.pieces}: lengths in unit 'run' must add up to at most 1")

    def __call__(self, tokens: int, total_tokens: int) -> float:
        """The value once `tokens` of the run's `total_tokens` have been seen."""
        scale = total_tokens if self.unit == 'run' else 1
        value, position = self.start, float(tokens)
        for shape, end, length in self.pieces:
            share = position / (length * scale)
            if share < 1:
                if shape == 'constant':
                    return end
                progress = share if shape == 'linear' else (1 - math.cos(math.pi * share)) / 2
                return value + (end - value) * progress
            value, position = end, position - length * scale
        return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchRamp:
    """A batch size that grows linearly at the beginning [4.2].

    Attributes:
      start: sequences a batch at first.
      tokens: tokens over which it grows to the final size.
      multiple_of: sizes in between are multiples of this; each size is compiled once.
    """

    start: int
    tokens: float
    multiple_of: int

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, 'start', 'tokens', 'multiple_of')

    def __call__(self, tokens: int, final: int) -> int:
        """Sequences of the next batch once `tokens` have been seen."""
        if tokens >= self.tokens:
            return final
        size = int(self.start + (final - self.start) * (tokens / self.tokens))
        return max(self.start, size // self.multiple_of * self.multiple_of)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthRamp:
    """Shorter sequences at the beginning: rows are cut into pieces, each a sequence of its own, so a batch has as many tokens.

    Attributes:
      pieces: (length, tokens) each: sequences are so long until so many tokens have been seen. After the last one they are
        whole rows.
    """

    pieces: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        check_types(self)
        # Lists pass the check, but a configuration must be hashable.
        object.__setattr__(self, 'pieces', tuple(map(tuple, self.pieces)))
        if not self.pieces:
            raise ValueError('LengthRamp.pieces=() must hold at least one (length, tokens)')
        lengths, ends = zip(*self.pieces, strict=True)
        for name, values in (('lengths', lengths), ('tokens', ends)):
            if not all(before < after for before, after in itertools.pairwise((0, *values))):
                raise ValueError(f'LengthRamp.pieces={self.pieces}: {name} must be positive and ascending')

    @property
    def lengths(self) -> tuple[int, ...]:
        """Those of all pieces."""
        return tuple(length for length, _ in self.pieces)

    def __call__(self, tokens: int, final: int) -> int:
        """Tokens of a sequence of the next batch once `tokens` have been seen."""
        return next((length for length, end in self.pieces if tokens < end), final)


def total_tokens(steps: int, batch_size: int, sequence_length: int, ramp: BatchRamp | None) -> int:
    """Tokens of a run of `steps` steps."""
    tokens, step = 0, 0
    while ramp is not None and step < steps and tokens < ramp.tokens:
        tokens += ramp(tokens, batch_size) * sequence_length
        step += 1
    return tokens + (steps - step) * batch_size * sequence_length
