"""`python -m infer sample|chat|batch`: text from a checkpoint.

Standard output carries the generated text alone; figures, progress and errors go to standard error. Bad input ends
with exit code 2 and one line, before anything is written.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from infer.request import Completion, Event, Request, SamplingParams

if TYPE_CHECKING:
    # Imported where they are used: bad arguments are told before the seconds that an accelerator library takes.
    from deepseek_jax.tokenizer import Tokenizer
    from infer.engine import Engine, Stats

app = typer.Typer(help='Generate text with a DeepSeek-V3 model.', add_completion=False, rich_markup_mode=None)

Checkpoint = Annotated[Path, typer.Option(help='A run directory, or a directory in the Hugging Face layout.')]
Temperature = Annotated[float, typer.Option(help='Divides the logits; 0 takes the most likely token.')]
TopK = Annotated[int, typer.Option(help='Draw from the K most likely tokens; 0 sets no limit.')]
TopP = Annotated[float, typer.Option(help='Draw from the most likely tokens that reach this probability.')]
MinP = Annotated[float, typer.Option(help='Least probability, relative to the most likely token.')]
RepetitionPenalty = Annotated[float, typer.Option(help='Above 1 makes tokens that occurred before less likely.')]
MaxTokens = Annotated[int, typer.Option(help='Tokens to generate at most.')]
Stop = Annotated[
    list[str] | None, typer.Option(metavar='TEXT', help='End before this text; may be given more than once.')
]
Seed = Annotated[int | None, typer.Option(help='Makes random choices repeatable.')]
MaxLength = Annotated[
    int | None, typer.Option(help='Tokens of prompt and answer the cache holds; default: what is needed.')
]


@app.command()
def sample(
    checkpoint: Checkpoint,
    prompt: Annotated[str | None, typer.Option(help='Text to continue.')] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help='File with the text to continue; - reads standard input.')
    ] = None,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    seed: Seed = None,
    max_tokens: MaxTokens = 256,
    num_samples: Annotated[int, typer.Option(help='Answers to draw; sample i uses seed + i.')] = 1,
    max_length: MaxLength = None,
    raw: Annotated[
        bool, typer.Option('--raw', help='Write the generated text and nothing else, not even a newline.')
    ] = False,
) -> None:
    """Continue a prompt; the text appears as it is generated."""
    with _bad_input():
        params = SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            max_tokens=max_tokens,
            stop=tuple(stop or ()),
            seed=seed,
        )
        if num_samples < 1:
            raise ValueError(f'{num_samples=} must be at least 1')
        if raw and num_samples > 1:
            raise ValueError(f'--raw writes one text and no separators: {num_samples=} must be 1')
        text = _prompt_text(prompt, prompt_file)
        loaded = _load(checkpoint)
        tokenizer = loaded[2]
        prompt_ids = (tokenizer.bos_id, *tokenizer.encode(text))
        requests = [Request(prompt_ids, _with_seed(params, i)) for i in range(num_samples)]
        engine = _engine(loaded, requests, max_length, max_batch=num_samples)
        events = engine.generate(requests)

    screen = _Screen()
    ordered = _in_order(_first_awaited(events, 'compiling'))
    for index, texts in itertools.groupby(ordered, key=lambda event: event.index):
        if num_samples > 1:
            screen.write(f'--- {index + 1} of {num_samples} ---\n')
        if not raw:
            screen.echo(text)
        for event in texts:
            screen.write(event.text)
        if not raw:
            screen.write('\n')
    _report(engine.stats)


@app.command()
def chat(
    checkpoint: Checkpoint,
    system: Annotated[str | None, typer.Option(help='What the assistant is told before the conversation.')] = None,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    seed: Seed = None,
    max_tokens: MaxTokens = 512,
    max_length: Annotated[int, typer.Option(help='Tokens the conversation may hold.')] = 2048,
) -> None:
    """Talk to the model; a line is a message. /reset forgets the conversation, /exit leaves."""
    with _bad_input():
        params = SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            max_tokens=max_tokens,
            stop=tuple(stop or ()),
            seed=seed,
        )
        config, weights, tokenizer = _load(checkpoint)
        from infer.engine import Engine

        engine = Engine(weights, config, tokenizer, max_length, max_batch=1)
        opening = [] if system is None else [{'role': 'system', 'content': system}]
        engine.check(Request(tokenizer.encode_chat([*opening, {'role': 'user', 'content': ''}])))

    screen, interactive = _Screen(), sys.stdin.isatty() and sys.stdout.isatty()
    messages = list(opening)
    for turn, line in enumerate(_chat_lines(interactive)):
        if line == '/exit':
            break
        if line == '/reset':
            messages = list(opening)
            continue
        if line.startswith('/'):
            _note(f'unknown command {line.split()[0]}; there are /reset and /exit')
            continue
        asked = [*messages, {'role': 'user', 'content': line}]
        request = Request(tokenizer.encode_chat(asked), _with_seed(params, turn))
        try:
            events = engine.generate([request])
        except ValueError as error:
            if not interactive:
                _fail(error)
            _note(f'error: {error}; /reset starts over')
            continue
        answer = _stream_answer(events, screen, interactive)
        messages = [*asked, {'role': 'assistant', 'content': answer}]
        if interactive:
            _report(engine.stats)


@app.command()
def batch(
    checkpoint: Checkpoint,
    input_file: Annotated[
        Path, typer.Option('--input', help='JSON lines, each with "prompt" or "messages", and any sampling parameter.')
    ],
    output_file: Annotated[Path, typer.Option('--output', help='JSON lines, in the order of the input.')],
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    seed: Seed = None,
    max_tokens: MaxTokens = 256,
    max_length: MaxLength = None,
    max_batch: Annotated[int, typer.Option(help='Requests to run at a time.')] = 8,
) -> None:
    """Answer a file of requests. The options are what a line does not say; line i (from 0) uses seed + i."""
    with _bad_input():
        params = SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            max_tokens=max_tokens,
            stop=tuple(stop or ()),
            seed=seed,
        )
        if max_batch < 1:
            raise ValueError(f'{max_batch=} must be at least 1')
        target = _writable(output_file)
        lines = _read_lines(input_file, params)
        loaded = _load(checkpoint)
        requests = [_line_request(line, input_file, loaded[2]) for line in lines]
        engine = _engine(loaded, requests, max_length, max_batch=max(1, min(max_batch, len(requests))))
        for line, request in zip(lines, requests, strict=True):
            with _at_line(input_file, line.number):
                engine.check(request)

    completions = _run_with_progress(engine, requests)
    answers = [_answer_line(request, completion) for request, completion in zip(requests, completions, strict=True)]
    _write_atomically(target, ''.join(json.dumps(answer, ensure_ascii=False) + '\n' for answer in answers))
    _report(engine.stats)


@dataclasses.dataclass(frozen=True)
class _Line:
    """A line of a batch file: what to answer (`prompt` or `messages`), how, and the name to give the answer."""

    number: int
    prompt: str | None
    messages: list[dict[str, str]] | None
    params: SamplingParams
    id: str | int


def _read_lines(path: Path, defaults: SamplingParams) -> list[_Line]:
    """The requests of a batch file. Empty lines are skipped; raises `ValueError` with the number of a bad line."""
    lines = []
    with path.open(encoding='utf-8') as file:
        for number, text in enumerate(file, start=1):
            if text.strip():
                with _at_line(path, number):
                    lines.append(_parse_line(number, json.loads(text), _with_seed(defaults, len(lines))))
    return lines


def _parse_line(number: int, values: Any, defaults: SamplingParams) -> _Line:
    if not isinstance(values, dict):
        raise ValueError('must be a JSON object')
    values = dict(values)
    prompt, messages, name = values.pop('prompt', None), values.pop('messages', None), values.pop('id', number)
    if (prompt is None) == (messages is None):
        raise ValueError('must have either "prompt" or "messages"')
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f'prompt={prompt!r} must be a string')
    if messages is not None and not (isinstance(messages, list) and all(isinstance(item, dict) for item in messages)):
        raise ValueError('messages must be a list of objects')
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise ValueError(f'id={name!r} must be a string or an integer')
    known = {field.name for field in dataclasses.fields(SamplingParams)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f'unknown key {unknown[0]!r}; sampling parameters are {", ".join(sorted(known))}')
    if 'stop' in values:
        values['stop'] = tuple(values['stop']) if isinstance(values['stop'], list) else (values['stop'],)
    return _Line(number, prompt, messages, dataclasses.replace(defaults, **values), name)


def _line_request(line: _Line, path: Path, tokenizer: 'Tokenizer') -> Request:
    with _at_line(path, line.number):
        if line.messages is not None:
            return Request(tokenizer.encode_chat(line.messages), line.params, line.id)
        return Request((tokenizer.bos_id, *tokenizer.encode(line.prompt or '')), line.params, line.id)


def _answer_line(request: Request, completion: Completion) -> dict[str, Any]:
    return {
        'id': request.id,
        'text': completion.text,
        'finish_reason': completion.finish_reason,
        'prompt_tokens': len(request.prompt_ids),
        'generated_tokens': len(completion.token_ids),
    }


def _writable(path: Path) -> Path:
    """The file to replace, links followed. Raises `ValueError` if a file cannot be put there."""
    path = path.resolve()
    if not path.parent.is_dir():
        raise ValueError(f'output directory {str(path.parent)!r} does not exist')
    if path.exists() and not path.is_file():
        raise ValueError(f'output {str(path)!r} must be a regular file')
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f'output directory {str(path.parent)!r} is not writable')
    return path


def _write_atomically(path: Path, text: str) -> None:
    """Puts `text` in place of the file's content at once: a reader sees the old file or the whole new one."""
    part = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        with part.open('x', encoding='utf-8', errors='replace') as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _prompt_text(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise ValueError('give either --prompt or --prompt-file')
    if prompt_file is None:
        return prompt or ''
    return sys.stdin.read() if str(prompt_file) == '-' else prompt_file.read_text(encoding='utf-8')


def _with_seed(params: SamplingParams, offset: int) -> SamplingParams:
    """The same parameters with the seed `offset` further on, so that equal prompts get different answers."""
    if params.seed is None:
        return params
    return dataclasses.replace(params, seed=(params.seed + offset) % 2**64)


def _load(checkpoint: Path) -> tuple[Any, Any, 'Tokenizer']:
    # The backends log and warn while they look for devices; what a user should know comes as an exception.
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    for name in ('jax', 'absl', 'orbax'):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter('ignore')
    from infer.checkpoint import load

    with Console(stderr=True).status('loading'):
        return load(checkpoint)


def _engine(
    loaded: tuple[Any, Any, 'Tokenizer'], requests: Sequence[Request], max_length: int | None, max_batch: int
) -> 'Engine':
    """An engine whose cache, unless told otherwise, is as long as the longest request may grow."""
    from infer.engine import Engine

    config, params, tokenizer = loaded
    if max_length is None:
        max_length = max((len(request.prompt_ids) + request.params.max_tokens for request in requests), default=2)
    return Engine(params, config, tokenizer, max_length, max_batch)


def _in_order(events: Iterator[Event]) -> Iterator[Event]:
    """The same events sorted by request, each as early as the earlier requests allow."""
    held: dict[int, list[Event]] = collections.defaultdict(list)
    current = 0
    for event in events:
        held[event.index].append(event)
        while held[current]:
            ready = held.pop(current)
            yield from ready
            if ready[-1].completion is None:
                break
            current += 1


def _first_awaited(events: Iterator[Event], what: str) -> Iterator[Event]:
    """The same events, with a spinner on a terminal until the first one comes."""
    with Console(stderr=True).status(what):
        first = list(itertools.islice(events, 1))
    return itertools.chain(first, events)


def _run_with_progress(engine: 'Engine', requests: Sequence[Request]) -> list[Completion]:
    completions: dict[int, Completion] = {}
    columns = (
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn('{task.description}'),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task('', total=len(requests))
        for event in engine.generate(requests):
            if event.completion is not None:
                completions[event.index] = event.completion
            rate = f'{engine.stats.tokens_per_second:.1f} tokens/s'
            progress.update(task, completed=len(completions), description=rate)
    return [completions[index] for index in range(len(requests))]


def _chat_lines(interactive: bool) -> Iterator[str]:
    """Messages from the terminal, with editing and history, or lines from a pipe; empty ones are skipped."""
    if interactive:
        from prompt_toolkit import PromptSession

        session = PromptSession()
        read = functools.partial(session.prompt, '> ')
    else:
        read = functools.partial(next, iter(sys.stdin))
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt, StopIteration):
            return
        if line:
            yield line


def _stream_answer(events: Iterator[Event], screen: '_Screen', interactive: bool) -> str:
    """Shows an answer as it comes and returns it; an interrupt ends the answer, not the conversation."""
    answer, cut = '', False
    try:
        for event in _first_awaited(events, 'thinking'):
            screen.write(event.text)
            answer += event.text
            cut = event.completion is not None and event.completion.finish_reason == 'length'
    except KeyboardInterrupt:
        if not interactive:
            raise
    screen.write('\n')
    if cut:
        _note('the answer was cut: --max-tokens or --max-length is reached')
    return answer


class _Screen:
    """Standard output. On a terminal, control characters are made visible: a model may emit any byte."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()

    def write(self, text: str) -> None:
        if self._terminal:
            text = ''.join(
                char if char in '\n\t' or char.isprintable() else '\N{REPLACEMENT CHARACTER}' for char in text
            )
        encoding = sys.stdout.encoding or 'utf-8'
        sys.stdout.write(text.encode(encoding, 'replace').decode(encoding))
        sys.stdout.flush()

    def echo(self, text: str) -> None:
        """Shows what is not generated, on a terminal only."""
        if self._terminal:
            sys.stdout.write('\x1b[2m')
            self.write(text)
            sys.stdout.write('\x1b[0m')


def _report(stats: 'Stats') -> None:
    _note(
        f'{stats.generated_tokens} tokens in {stats.seconds:.2f} s ({stats.tokens_per_second:.1f} tokens/s), '
        f'first after {stats.first_token_seconds:.2f} s; {stats.prompt_tokens} prompt tokens; '
        f'compiling took {stats.compile_seconds:.1f} s'
    )


def _note(text: str) -> None:
    sys.stderr.write(f'{text}\n')
    sys.stderr.flush()


def _fail(error: Exception) -> None:
    """Ends the program as bad input does: one line, exit code 2."""
    _note(f'error: {" ".join(str(error).split())}')
    raise typer.Exit(2) from error


@contextlib.contextmanager
def _bad_input() -> Iterator[None]:
    """Around everything that reads what the user gave: what is wrong with it is the user's to know, in one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        _fail(error)


@contextlib.contextmanager
def _at_line(path: Path, number: int) -> Iterator[None]:
    """Puts file and line number in front of a complaint."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f'{path}:{number}: {error}') from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    try:
        return app(arguments, standalone_mode=False) or 0
    except typer.TyperException as error:
        _note(f'error: {" ".join(error.format_message().split())}')
        return error.exit_code
    except typer.Abort:
        return 1


if __name__ == '__main__':
    sys.exit(main())
