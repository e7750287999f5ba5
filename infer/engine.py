"""The loop that runs requests: prompts into rows of a latent cache, one token a row a step, rows refilled as they end.

The life of a request:

1. `generate` checks it, with all others of the call, before any work.
2. It takes a free row. Its prompt, padded on the right to a bucket, runs alone through the expanded form of attention
   into a fresh cache of the bucket's length, which is copied into the row. This leaves the row's next logits.
3. Each step draws one token for every row from its logits, then decodes: the tokens go through the absorbed form of
   attention and leave new logits. Rows without work are parked at a position past the cache, where nothing is written.
4. Drawn tokens become text while the device decodes; an end token, a stop string, `max_tokens` or the end of the cache
   finish the request.
5. The row is free for the next request; the others go on undisturbed.
"""

import collections
import dataclasses
import functools
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

import deepseek_jax as ds
from deepseek_jax.ops import PAGE
from deepseek_jax.tokenizer import Tokenizer
from infer.request import Completion, Event, FinishReason, Request
from infer.sampling import SamplingRows, greedy_rows, one_row, sample, token_keys
from infer.text import TextStream

_SMALLEST_BUCKET = 16


class _Rows(NamedTuple):
    """What the device keeps of each row beside the cache.

    Attributes:
      logits_BV: of the next token, float32.
      token_B: latest token; it enters the cache when it is decoded.
      position_B: the position of the next token that is drawn or, once drawn, decoded.
      seen_BV: tokens in the prompt or the output.
      sampling: parameters of the requests.
    """

    logits_BV: Float[Array, 'B V']
    token_B: Int[Array, ' B']
    position_B: Int[Array, ' B']
    seen_BV: Bool[Array, 'B V']
    sampling: SamplingRows


# The programs consume the cache and the rows they are given and return new ones in the same memory.
@functools.partial(jax.jit, static_argnames='config', donate_argnames=('cache', 'rows'))
def _prefill(
    params: Mapping[str, Any],
    cache: ds.Cache,
    rows: _Rows,
    row: Int[Array, ''],
    tokens_T: Int[Array, ' T'],
    length: Int[Array, ''],
    sampling: SamplingRows,
    config: ds.ModelConfig,
) -> tuple[ds.Cache, _Rows]:
    """Cache and rows with a new request in `row`, whose prompt is the first `length` tokens of `tokens_T`."""
    positions_T = jnp.arange(tokens_T.size)
    fresh = ds.init_cache(config, 1, tokens_T.size)
    hidden_1TD, fresh = ds.extend(params, tokens_T[None], positions_T[None], fresh, config, absorbed=False)
    cache = jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, row, 0, 0)), cache, fresh)
    logits_V = ds.logits(params, hidden_1TD[0, length - 1], config)
    # Padding is sent past the end of the vocabulary, where the scatter drops it.
    prompt_T = jnp.where(positions_T < length, tokens_T, logits_V.size)
    seen_V = jnp.zeros(logits_V.size, bool).at[prompt_T].set(True, mode='drop')
    new = _Rows(logits_V, jnp.int32(0), length, seen_V, sampling)
    return cache, jax.tree.map(lambda old, new: old.at[row].set(new), rows, new)


@functools.partial(jax.jit, donate_argnames='rows')
def _draw(
    rows: _Rows, active_B: Bool[Array, ' B'], allowed_V: Bool[Array, ' V']
) -> tuple[_Rows, Int[Array, ' B'], Float[Array, ' B']]:
    """The rows with their next tokens drawn, these tokens, and their log-probabilities."""
    # Parked rows ask for nothing, lest they keep the batch on the longer path of the sampler.
    temperature_B = jnp.where(active_B, rows.sampling.temperature_B, 0.0)
    sampling = rows.sampling._replace(temperature_B=temperature_B)
    keys_B = token_keys(sampling.seed_B2, rows.position_B)
    token_B, logprob_B = sample(rows.logits_BV, keys_B, sampling, rows.seen_BV, allowed_V)
    seen_BV = rows.seen_BV.at[jnp.arange(token_B.size), token_B].set(True)
    return rows._replace(token_B=token_B, seen_BV=seen_BV), token_B, logprob_B


@functools.partial(jax.jit, static_argnames='config', donate_argnames=('cache', 'rows'))
def _decode(
    params: Mapping[str, Any], cache: ds.Cache, rows: _Rows, active_B: Bool[Array, ' B'], config: ds.ModelConfig
) -> tuple[ds.Cache, _Rows]:
    """Cache and rows with the latest token of each active row decoded."""
    position_B = jnp.where(active_B, rows.position_B, cache.max_length)
    hidden_B1D, cache = ds.extend(params, rows.token_B[:, None], position_B[:, None], cache, config, absorbed=True)
    logits_BV = ds.logits(params, hidden_B1D[:, 0], config)
    return cache, rows._replace(logits_BV=logits_BV, position_B=position_B + 1)


@dataclasses.dataclass
class Stats:
    """What one call of `generate` did so far.

    Attributes:
      prompt_tokens, generated_tokens: over all requests.
      compile_seconds: time in calls that had to compile first.
      first_token_seconds: from the start to the first token, compiling left out.
      seconds: from the start to the latest token, compiling left out.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    compile_seconds: float = 0.0
    first_token_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens a second, prefill included; 0 before the first token."""
        return self.generated_tokens / self.seconds if self.seconds > 0 else 0.0


@dataclasses.dataclass
class _Answer:
    """A request in a row; `limit` is the most tokens it may get."""

    index: int
    request: Request
    stream: TextStream
    limit: int
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    text: str = ''


class Engine:
    """Generates from one model, at most `max_batch` requests at a time, prompt and answer up to `max_length` tokens.

    Attributes:
      stats: figures of the latest call of `generate`.
    """

    def __init__(
        self, params: Mapping[str, Any], config: ds.ModelConfig, tokenizer: Tokenizer, max_length: int, max_batch: int
    ) -> None:
        """Raises `ValueError` for sizes below 1 (`max_length`: 2) or a tokenizer with more ids than the model."""
        if max_length < 2:
            raise ValueError(f'{max_length=} must be at least 2: a token of prompt and one of answer')
        if max_batch < 1:
            raise ValueError(f'{max_batch=} must be at least 1')
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(f'{tokenizer.vocab_size=} exceeds {config.vocab_size=}')
        self.config = config
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_batch = max_batch
        self.stats = Stats()
        self._params = jax.tree.map(jnp.asarray, params)
        sharding = jax.tree.leaves(self._params)[0].sharding
        named = isinstance(sharding, NamedSharding)
        self._replicated = NamedSharding(sharding.mesh, PartitionSpec()) if named else sharding
        self._compiled: set[tuple[str, int]] = set()

        allowed_V = np.zeros(config.vocab_size, bool)
        allowed_V[: tokenizer.vocab_size] = tokenizer.defined_ids()
        never = {tokenizer.bos_id, tokenizer.pad_id} - set(tokenizer.stop_ids)
        allowed_V[list(never)] = False
        self._allowed_V = jnp.asarray(allowed_V)

    def check(self, request: Request) -> None:
        """Raises `ValueError` if the prompt leaves no room for an answer or holds an id outside the vocabulary."""
        length, max_length = len(request.prompt_ids), self.max_length
        if length + 1 > max_length:
            raise ValueError(f'a prompt of {length} tokens and one to generate exceed {max_length=}')
        if wrong := [token_id for token_id in request.prompt_ids if not 0 <= token_id < self.config.vocab_size]:
            raise ValueError(f'prompt token {wrong[0]} must lie in 0..{self.config.vocab_size - 1}')

    def generate(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Events of all requests as their tokens come; the events of one request are in order.

        More requests than rows wait for a free one. A request's answer follows from its prompt, parameters and seed,
        not from the other requests, up to the rounding of sums. Every request is checked before any work: raises
        `ValueError` as `check` does.
        """
        requests = list(requests)
        for request in requests:
            self.check(request)
        self.stats = Stats()
        return self._run(requests)

    def _run(self, requests: list[Request]) -> Iterator[Event]:
        stats, start = self.stats, time.perf_counter()
        cache, rows = self._timed('empty', 0, self._empty)
        waiting = collections.deque(enumerate(requests))
        answers: dict[int, _Answer] = {}
        while waiting or answers:
            for row in range(self.max_batch):
                if waiting and row not in answers:
                    answer = answers[row] = self._answer(*waiting.popleft())
                    cache, rows = self._start(cache, rows, row, answer.request)

            active_B = self._mask(answers)
            rows, token_B, logprob_B = self._timed('draw', 0, _draw, rows, active_B, self._allowed_V)
            going = [row for row, answer in answers.items() if len(answer.token_ids) + 1 < answer.limit]
            if going:
                call = functools.partial(_decode, config=self.config)
                cache, rows = self._timed('decode', 0, call, self._params, cache, rows, self._mask(going))

            tokens, logprobs = jax.device_get((token_B, logprob_B))
            stats.seconds = time.perf_counter() - start - stats.compile_seconds
            stats.first_token_seconds = stats.first_token_seconds or stats.seconds
            for row, answer in list(answers.items()):
                event = self._advance(answer, int(tokens[row]), float(logprobs[row]))
                if event.completion is not None:
                    del answers[row]
                stats.generated_tokens += 1
                yield event

    def _empty(self) -> tuple[ds.Cache, _Rows]:
        size, vocab_size = self.max_batch, self.config.vocab_size
        rows = _Rows(
            logits_BV=jnp.zeros((size, vocab_size)),
            token_B=jnp.zeros(size, jnp.int32),
            position_B=jnp.zeros(size, jnp.int32),
            seen_BV=jnp.zeros((size, vocab_size), bool),
            sampling=greedy_rows(size),
        )
        # On the devices of the parameters: arrays that only happen to be there would make a program compile twice,
        # once for them and once for the results of the first call.
        slots = -(-self.max_length // PAGE) * PAGE  # whole pages, which decoding reads in place
        return jax.device_put((ds.init_cache(self.config, size, slots), rows), self._replicated)

    def _mask(self, rows: Iterable[int]) -> np.ndarray:
        mask_B = np.zeros(self.max_batch, bool)
        mask_B[list(rows)] = True
        return mask_B

    def _answer(self, index: int, request: Request) -> _Answer:
        limit = min(request.params.max_tokens, self.max_length - len(request.prompt_ids))
        return _Answer(index, request, TextStream(self.tokenizer.stream(), request.params.stop), limit)

    def _start(self, cache: ds.Cache, rows: _Rows, row: int, request: Request) -> tuple[ds.Cache, _Rows]:
        length = len(request.prompt_ids)
        bucket = min(max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length()), self.max_length)
        tokens_T = np.zeros(bucket, np.int32)
        tokens_T[:length] = request.prompt_ids
        sampling = one_row(request.params, secrets.randbits(64))
        self.stats.prompt_tokens += length
        call = functools.partial(_prefill, config=self.config)
        state = (cache, rows, np.int32(row), tokens_T, np.int32(length), sampling)
        return self._timed('prefill', bucket, call, self._params, *state)

    def _timed(self, name: str, size: int, program: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a program; the first call for a size counts as compiling."""
        start = time.perf_counter()
        result = program(*arguments)
        if (name, size) not in self._compiled:
            self._compiled.add((name, size))
            self.stats.compile_seconds += time.perf_counter() - start
        return result

    def _advance(self, answer: _Answer, token_id: int, logprob: float) -> Event:
        """Adds one token to an answer."""
        request, stream = answer.request, answer.stream
        answer.token_ids.append(token_id)
        answer.logprobs.append(logprob)
        reason: FinishReason | None = None
        if token_id in self.tokenizer.stop_ids and not request.params.ignore_eos:
            text, reason = stream.flush(), 'stop'
        else:
            text = stream.step(token_id)
            if not stream.stopped and len(answer.token_ids) == answer.limit:
                text, reason = text + stream.flush(), 'length'
            if stream.stopped:
                reason = 'stop'
        answer.text += text
        completion = None
        if reason:
            completion = Completion(answer.text, tuple(answer.token_ids), reason, tuple(answer.logprobs))
        return Event(answer.index, request.id, text, (token_id,), completion)
