"""Text generation with the models of `deepseek_jax`.

`request` (what is asked for and what comes back), `sampling` (logits to tokens), `text` (tokens to text),
`engine` (the loop that runs a batch of requests), `checkpoint` (what a directory holds); `python -m infer` is the
command line. The names below need no accelerator library; the others are imported from their modules:

    from infer import Request, SamplingParams
    from infer.checkpoint import load
    from infer.engine import Engine

    config, params, tokenizer = load(directory)
    engine = Engine(params, config, tokenizer, max_length=512, max_batch=4)
    prompt_ids = (tokenizer.bos_id, *tokenizer.encode('def fibonacci(n):'))
    for event in engine.generate([Request(prompt_ids, SamplingParams(temperature=0.7))]):
        print(event.text, end='', flush=True)
"""

from infer.request import Completion, Event, FinishReason, Request, SamplingParams

__all__ = ['Completion', 'Event', 'FinishReason', 'Request', 'SamplingParams']
