"""What a caller asks for and what comes back: plain Python, so that a scheduler or a client needs no accelerator."""

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Literal

FinishReason = Literal['stop', 'length']


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are drawn and when it ends.

    The filters apply in this order: repetition penalty, temperature, top-k, top-p, min-p (see `infer.sampling`).
    A wrong value raises `ValueError` in one line that names the value and the rule.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: only the `top_k` most likely tokens may be drawn; 0 sets no limit.
      top_p: only the smallest set of most likely tokens whose probability reaches `top_p` may be drawn.
      min_p: only tokens at least `min_p` times as likely as the most likely one may be drawn.
      repetition_penalty: divides the positive logits and multiplies the negative ones of the tokens that occur in
        the prompt or in the output so far; 1 changes nothing.
      max_tokens: tokens to generate at most.
      stop: strings that end the generation as soon as one is complete; the text ends before it.
      seed: what the random choices follow from, together with a token's place in the sequence; None takes a new
        seed each time.
      ignore_eos: generate past the tokenizer's end tokens.
    """

    temperature: int | float = 1.0
    top_k: int = 0
    top_p: int | float = 1.0
    min_p: int | float = 0.0
    repetition_penalty: int | float = 1.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name in ('temperature', 'top_p', 'min_p', 'repetition_penalty'):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f'{name}={value!r} must be a finite number')
        for name in ('top_k', 'max_tokens', 'seed'):
            value = getattr(self, name)
            if (isinstance(value, bool) or not isinstance(value, int)) and not (name == 'seed' and value is None):
                raise ValueError(f'{name}={value!r} must be an integer')
        if self.temperature < 0:
            raise ValueError(f'temperature={self.temperature} must not be negative')
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f'top_k={self.top_k} must lie in 0..2**31 - 1 (0 sets no limit)')
        if not 0 < self.top_p <= 1:
            raise ValueError(f'top_p={self.top_p} must lie above 0 and at most at 1')
        if not 0 <= self.min_p <= 1:
            raise ValueError(f'min_p={self.min_p} must lie in 0..1')
        if self.repetition_penalty <= 0:
            raise ValueError(f'repetition_penalty={self.repetition_penalty} must be positive')
        if self.max_tokens < 1:
            raise ValueError(f'max_tokens={self.max_tokens} must be at least 1')
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ValueError(f'seed={self.seed} must lie in 0..2**64 - 1')
        if not isinstance(self.stop, (tuple, list)) or not all(isinstance(stop, str) for stop in self.stop):
            raise ValueError(f'stop={self.stop!r} must be a sequence of strings')
        if '' in self.stop:
            raise ValueError(f'stop={self.stop!r} must not hold an empty string')
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f'ignore_eos={self.ignore_eos!r} must be true or false')
        object.__setattr__(self, 'stop', tuple(self.stop))


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
      prompt_ids: token ids, the beginning-of-sequence id included where the model expects one; not empty.
      params: how to continue it.
      id: the caller's name for it, handed back in events and not looked at.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams = SamplingParams()
    id: str | int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, 'prompt_ids', tuple(map(operator.index, self.prompt_ids)))
        if not self.prompt_ids:
            raise ValueError('prompt_ids=() must hold at least one token')


@dataclasses.dataclass(frozen=True)
class Completion:
    """The whole answer to a request.

    Attributes:
      text: what was generated, without stop strings and without the text of special tokens.
      token_ids: every token generated, the one that ended the generation included.
      finish_reason: 'stop' for an end token or a stop string, 'length' for `max_tokens` or a full cache.
      logprobs: for each of `token_ids` its log-probability in the model's own distribution (temperature 1, nothing
        filtered), or None where it was not kept.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Event:
    """One step of one request: the pieces of text of a request's events, joined, are its completion's text.

    Attributes:
      index: place of the request in the call.
      id: the request's `id`.
      text: text that is certain by now; '' inside a multi-byte character or a possible stop string.
      token_ids: the tokens that this step added.
      completion: the whole answer with the last event of a request, None before.
    """

    index: int
    id: str | int | None
    text: str
    token_ids: tuple[int, ...]
    completion: Completion | None = None
