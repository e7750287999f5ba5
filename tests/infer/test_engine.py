import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_jax as ds
from deepseek_jax.tokenizer import ByteTokenizer
from infer.engine import Engine
from infer.request import Completion, Request, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
# More prompts than rows, of all lengths up to the smallest bucket; then some of the next bucket and its border.
SHORT = ['d', 'def f(x):\n', 'x' * 14, '\u6f22\u5b57 \U0001f600', 'y' * 15]
PROMPTS = [*SHORT, 'z' * 16, 'hello, world ' * 2, 'w' * 31]


def ask(text, params=GREEDY, **changes) -> Request:
    return Request([256, *text.encode()], SamplingParams(**vars(params) | changes))


def complete(engine, requests) -> list[Completion]:
    """The completions in the order of the requests, after a check that the events add up to them."""
    completions, text, token_ids = {}, [''] * len(requests), [[] for _ in requests]
    for event in engine.generate(requests):
        assert event.index not in completions
        assert event.id == requests[event.index].id
        text[event.index] += event.text
        token_ids[event.index] += event.token_ids
        if event.completion is not None:
            completions[event.index] = event.completion
    for index, completion in completions.items():
        assert completion.text == text[index]
        assert completion.token_ids == tuple(token_ids[index])
        assert completion.logprobs is not None
        assert len(completion.logprobs) == len(completion.token_ids)
    return [completions[index] for index in range(len(requests))]


def assert_argmax_of_full_recomputation(engine, params, prompts):
    config, requests = engine.config, [ask(prompt) for prompt in prompts]
    allowed_V = np.arange(config.vocab_size) < engine.tokenizer.vocab_size
    allowed_V[[256, 258]] = False
    for request, completion in zip(requests, complete(engine, requests), strict=True):
        ids = list(request.prompt_ids)
        for token_id, logprob in zip(completion.token_ids, completion.logprobs or (), strict=True):
            tokens_BT = jnp.asarray([ids + [0] * (engine.max_length - len(ids))])
            logits_V = np.asarray(ds.forward(params, tokens_BT, config).logits_BTV[0, len(ids) - 1])
            assert token_id == np.argmax(np.where(allowed_V, logits_V, -np.inf))
            assert logprob == pytest.approx(logits_V[token_id] - np.log(np.exp(logits_V).sum()), abs=1e-4)
            ids.append(token_id)
        assert len(completion.token_ids) == GREEDY.max_tokens
        assert completion.finish_reason == 'length'


def test_engine_greedy_is_the_argmax_of_a_full_recomputation(engine, params):
    assert_argmax_of_full_recomputation(engine, params, SHORT)


def test_engine_greedy_is_right_in_every_bucket(small_engine, small_model):
    assert_argmax_of_full_recomputation(small_engine, small_model[1], PROMPTS)


@pytest.mark.parametrize('rules', [{}, {'temperature': 1.0, 'top_p': 0.9, 'repetition_penalty': 1.2}])
def test_engine_batch_equals_single_runs(engine, rules):
    requests = [ask(prompt, seed=7, **rules) for prompt in SHORT]
    together = complete(engine, requests)
    backwards = complete(engine, requests[::-1])[::-1]
    alone = [complete(engine, [request])[0] for request in requests]
    ids = [[completion.token_ids for completion in run] for run in (together, backwards, alone)]
    assert ids[0] == ids[1] == ids[2]


def test_engine_mixes_rules_in_a_batch(engine):
    greedy = complete(engine, [ask('abc')])[0]
    hot = ask('abc', temperature=2.0, seed=1)
    mixed = complete(engine, [hot, ask('abc'), ask('abc', temperature=1.0, top_k=1)])
    assert mixed[1].token_ids == mixed[2].token_ids == greedy.token_ids
    assert mixed[0].token_ids == complete(engine, [hot])[0].token_ids != greedy.token_ids


def test_engine_refills_a_row_as_soon_as_it_is_free(small_engine):
    lengths = [12, 2, 3, 4, 1, 2]
    requests = [ask(f'prompt {i}', max_tokens=length) for i, length in enumerate(lengths)]
    steps = [event.index for event in small_engine.generate(requests)]
    assert [steps.count(index) for index in range(len(requests))] == lengths
    # Rows 1 and 2 serve requests 1 to 5, twelve tokens in all, while row 0 works on request 0: nobody waits for it.
    last = {index: len(steps) - 1 - steps[::-1].index(index) for index in range(len(requests))}
    assert max(last, key=lambda index: last[index]) == 0
    assert small_engine.stats.generated_tokens == sum(lengths)
    assert small_engine.stats.prompt_tokens == sum(len(request.prompt_ids) for request in requests)
    assert small_engine.stats.tokens_per_second > 0


def test_engine_seeds_decide_random_choices(small_engine):
    rules = {'temperature': 1.0, 'max_tokens': 16}
    drawn = complete(small_engine, [ask('seed', seed=seed, **rules) for seed in (1, 1, 2, None, None)])
    ids = [completion.token_ids for completion in drawn]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 4
    assert complete(small_engine, [ask('seed', seed=1, **rules)])[0].token_ids == ids[0]


def test_engine_never_draws_what_the_tokenizer_does_not_define(small_engine):
    requests = [ask('noise', temperature=1e4, max_tokens=40, seed=seed) for seed in range(12)]
    drawn = {token_id for completion in complete(small_engine, requests) for token_id in completion.token_ids}
    assert drawn <= set(range(264)) - {256, 258}
    assert len(drawn) > 180


def test_engine_penalises_tokens_of_prompt_and_output(small_engine):
    completion = complete(small_engine, [ask('abcdefgh', repetition_penalty=1e6, max_tokens=24)])[0]
    assert len(set(completion.token_ids)) == 24
    assert not set(completion.token_ids) & set(b'abcdefgh')


def test_engine_stops_at_a_string_across_tokens(small_engine):
    """Stop strings taken from the middle of what the model says: nothing of them is ever shown."""
    whole = complete(small_engine, [ask('stop', temperature=1.0, seed=5, max_tokens=30)])[0]
    assert len(whole.text) > 12
    for start, length in ((0, 1), (3, 2), (6, 4), (len(whole.text) - 2, 2)):
        stop = whole.text[start : start + length]
        request = ask('stop', temperature=1.0, seed=5, max_tokens=30, stop=(stop, 'never said'))
        completion = complete(small_engine, [request])[0]
        assert completion.text == whole.text[: whole.text.index(stop)]
        assert completion.finish_reason == 'stop'
        assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]


def test_engine_text_is_the_decoded_tokens(small_engine):
    for completion in complete(small_engine, [ask(prompt, temperature=1.0, max_tokens=17) for prompt in PROMPTS]):
        assert completion.text == small_engine.tokenizer.decode(completion.token_ids)


def test_engine_ends_at_end_tokens_unless_told_otherwise(small_model, small_engine):
    free = complete(small_engine, [ask('end')])[0]
    last = free.token_ids[4]
    tokenizer = ByteTokenizer()
    tokenizer.stop_ids = (tokenizer.eos_id, last)
    config, params = small_model
    engine = Engine(params, config, tokenizer, small_engine.max_length, small_engine.max_batch)
    first = free.token_ids.index(last)
    stopped, ignored = complete(engine, [ask('end', ignore_eos=False), ask('end')])
    assert stopped.finish_reason == 'stop'
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.text == tokenizer.decode(free.token_ids[:first])
    assert ignored.token_ids == free.token_ids
    assert ignored.finish_reason == 'length'


def test_engine_ends_when_the_cache_is_full(small_engine):
    # Prompt and answer fill the 48 places of the cache; a neighbour and a later request are not touched.
    requests = [ask('z' * 30, max_tokens=100), ask('n', max_tokens=40), ask('m'), ask('l')]
    full, *others = complete(small_engine, requests)
    assert (len(full.token_ids), full.finish_reason) == (48 - 31, 'length')
    assert others == [complete(small_engine, [request])[0] for request in requests[1:]]


def test_engine_refuses_a_call_before_any_work(small_engine):
    longest = Request(tuple(range(47)))
    small_engine.check(longest)
    for bad, message in (
        (Request(tuple(range(48))), 'a prompt of 48 tokens and one to generate exceed max_length=48'),
        (Request((5, 272)), 'prompt token 272 must lie in 0..271'),
        (Request((-1,)), 'prompt token -1 must lie in 0..271'),
    ):
        with pytest.raises(ValueError, match=message):
            small_engine.generate([ask('fine'), bad])


def test_engine_refuses_sizes_and_tokenizers_that_cannot_work(small_model, tokenizer):
    config, params = small_model
    with pytest.raises(ValueError, match='max_length=1 must be at least 2'):
        Engine(params, config, tokenizer, max_length=1, max_batch=1)
    with pytest.raises(ValueError, match='max_batch=0 must be at least 1'):
        Engine(params, config, tokenizer, max_length=8, max_batch=0)
    larger = ByteTokenizer()
    larger.vocab_size = 273
    with pytest.raises(ValueError, match='tokenizer.vocab_size=273 exceeds config.vocab_size=272'):
        Engine(params, config, larger, max_length=8, max_batch=1)


def test_engine_state_is_bound_to_its_devices_from_the_start(small_engine):
    # As the results of programs are; otherwise each program compiles again on its second call.
    assert all(leaf.committed for leaf in jax.tree.leaves(small_engine._empty()))


def test_engine_survives_a_caller_that_leaves_early(small_engine):
    expected = complete(small_engine, [ask('early')])
    events = small_engine.generate([ask('early'), ask('other')])
    next(events)
    events.close()
    assert complete(small_engine, [ask('early')]) == expected
    assert list(small_engine.generate([])) == []
