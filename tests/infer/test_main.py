"""The command line, run in this process on a tiny model; `infer.checkpoint.load` is what the tests replace."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import infer.checkpoint
from infer.__main__ import _in_order, _Screen, main
from infer.request import Completion, Event

ROOT = Path(__file__).resolve().parents[2]
# The shapes of the shared engines, so that nothing compiles twice.
SHAPE = ['--max-length', '48']


@pytest.fixture(autouse=True)
def checkpoint(monkeypatch, small_model, tokenizer):
    config, params = small_model
    monkeypatch.setattr(infer.checkpoint, 'load', lambda directory: (config, params, tokenizer))


def run(command, *options):
    return main([command, '--checkpoint', 'tiny', *map(str, options)])


def is_error(capsys, code, *parts):
    """Exit code 2, nothing on standard output and one line with `parts` on standard error."""
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ''
    assert err.startswith('error: ')
    assert err.endswith('\n')
    assert err.count('\n') == 1
    for part in parts:
        assert part in err
    return True


def sample(capsys, *options):
    assert run('sample', '--prompt', 'def', '--max-tokens', 8, *SHAPE, *options) == 0
    return capsys.readouterr()


def test_sample_writes_text_to_stdout_and_figures_to_stderr(capsys):
    out, err = sample(capsys, '--seed', 1, '--num-samples', 3)
    texts = out.split('--- ')[1:]
    assert [text.split(' ---\n')[0] for text in texts] == ['1 of 3', '2 of 3', '3 of 3']
    assert err.count('\n') == 1
    assert '24 tokens in ' in err
    assert 'tokens/s' in err
    first, second = (text.split(' ---\n')[1] for text in texts[:2])
    assert first != second
    # Sample i uses seed + i, whatever runs beside it.
    again, _ = sample(capsys, '--seed', 2, '--num-samples', 3)
    assert again.split('--- ')[1].split(' ---\n')[1] == second


def test_sample_raw_is_the_text_alone(capsys):
    options = ('--seed', 3, '--max-tokens', 30)
    plain = sample(capsys, *options)
    raw = sample(capsys, *options, '--raw')
    assert plain.out == raw.out + '\n'
    stop = raw.out[5:7]
    assert sample(capsys, *options, '--raw', '--stop', 'never', '--stop', stop).out == raw.out[: raw.out.index(stop)]


def test_sample_reads_its_prompt_from_a_file_or_standard_input(capsys, tmp_path, monkeypatch):
    expected = sample(capsys, '--temperature', 0).out
    (tmp_path / 'prompt').write_text('def')
    options = ('--max-tokens', 8, '--temperature', 0, *SHAPE)
    assert run('sample', '--prompt-file', tmp_path / 'prompt', *options) == 0
    assert capsys.readouterr().out == expected
    monkeypatch.setattr(sys, 'stdin', io.StringIO('def'))
    assert run('sample', '--prompt-file', '-', *options) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--prompt', 'a', '--temperature', '-1'], 'temperature=-1.0 must not be negative'),
        (['--prompt', 'a', '--top-p', '0'], 'top_p=0.0'),
        (['--prompt', 'a', '--top-k', 'many'], "Invalid value for '--top-k'"),
        (['--prompt', 'a', '--max-tokens', '0'], 'max_tokens=0'),
        (['--prompt', 'a', '--stop', ''], 'stop='),
        (['--prompt', 'a', '--seed', '-1'], 'seed=-1'),
        (['--prompt', 'a', '--num-samples', '0'], 'num_samples=0'),
        (['--prompt', 'a', '--num-samples', '2', '--raw'], 'num_samples=2'),
        (['--prompt', 'a', '--nonsense'], 'No such option'),
        (
            ['--prompt', 'a' * 60, '--max-length', '48'],
            'a prompt of 61 tokens and one to generate exceed max_length=48',
        ),
        (['--prompt', 'a', '--max-length', '1'], 'max_length=1'),
        (['--prompt', 'a\udcff'], 'surrogate'),
        (['--prompt', 'a', '--prompt-file', 'b'], 'either --prompt or --prompt-file'),
        ([], 'either --prompt or --prompt-file'),
        (['--prompt-file', '/absent/prompt'], '/absent/prompt'),
    ],
)
def test_sample_refuses_bad_input_in_one_line(capsys, options, message):
    assert is_error(capsys, run('sample', *options), message)


def test_prompt_files_must_be_utf8(capsys, tmp_path):
    (tmp_path / 'prompt').write_bytes(b'\xff\xfe')
    assert is_error(capsys, run('sample', '--prompt-file', tmp_path / 'prompt'), 'utf-8')


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_terminal_shows_the_prompt_dim_and_control_characters_as_marks(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, 'stdout', terminal)
    screen = _Screen()
    screen.echo('prompt')
    screen.write('a\x1b[31mb\r\x9b\n\t\u6f22')
    assert terminal.getvalue() == '\x1b[2mprompt\x1b[0ma\ufffd[31mb\ufffd\ufffd\n\t\u6f22'


def test_missing_commands_and_options_are_errors(capsys):
    assert is_error(capsys, main([]), 'Missing command')
    assert is_error(capsys, main(['sing']), 'sing')
    assert is_error(capsys, main(['sample', '--prompt', 'a']), '--checkpoint')


def test_the_program_exits_with_code_2(tmp_path):
    """As a process, where annotations are not checked: absent checkpoint, and JSON values of wrong types."""

    def program(*arguments):
        done = subprocess.run([sys.executable, '-m', 'infer', *arguments], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr.count('\n')) == (2, '', 1)
        return done.stderr

    missing = program('sample', '--checkpoint', str(tmp_path / 'absent'), '--prompt', 'a')
    assert missing == f"error: checkpoint '{tmp_path}/absent' is not a directory\n"
    (tmp_path / 'in').write_text('{"prompt": "a"}\n{"prompt": "a", "temperature": "hot"}\n')
    files = ('--input', str(tmp_path / 'in'), '--output', str(tmp_path / 'out'))
    wrong = program('batch', '--checkpoint', str(tmp_path), *files)
    assert wrong == f"error: {tmp_path}/in:2: temperature='hot' must be a finite number\n"
    assert not (tmp_path / 'out').exists()


def batch(tmp_path, lines, *options):
    (tmp_path / 'in').write_text(''.join(line + '\n' for line in lines))
    return run('batch', '--input', tmp_path / 'in', '--output', tmp_path / 'out', '--max-batch', 3, *SHAPE, *options)


def test_batch_answers_in_the_order_of_the_input(capsys, tmp_path):
    (tmp_path / 'out').write_text('old')
    lines = [
        {'prompt': 'first', 'max_tokens': 20, 'id': 'a'},
        {'prompt': 'second', 'max_tokens': 1},
        {'messages': [{'role': 'user', 'content': 'hello'}], 'temperature': 1.0, 'seed': 3, 'id': 17},
        {'prompt': '', 'stop': 'x'},
        {'prompt': 'first', 'max_tokens': 20, 'stop': ['y', 'z']},
    ]
    assert (
        batch(
            tmp_path,
            [*map(json.dumps, lines[:2]), '', *map(json.dumps, lines[2:])],
            '--temperature',
            0,
            '--max-tokens',
            5,
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert out == ''
    assert 'tokens/s' in err
    answers = [json.loads(line) for line in (tmp_path / 'out').read_text().splitlines()]
    assert [answer['id'] for answer in answers] == ['a', 2, 17, 5, 6]
    assert [answer['prompt_tokens'] for answer in answers] == [6, 7, 8, 1, 6]
    assert [answer['generated_tokens'] for answer in answers[:3]] == [20, 1, 5]
    assert all(answer['finish_reason'] in ('stop', 'length') for answer in answers)
    assert answers[0]['text'].startswith(answers[4]['text'])
    assert sorted(path.name for path in tmp_path.iterdir()) == ['in', 'out']


def test_batch_of_nothing_writes_nothing(capsys, tmp_path):
    assert batch(tmp_path, []) == 0
    assert (tmp_path / 'out').read_text() == ''


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('{"prompt": ', 'Expecting value'),
        ('[]', 'must be a JSON object'),
        ('{}', 'either "prompt" or "messages"'),
        ('{"prompt": "a", "messages": []}', 'either "prompt" or "messages"'),
        ('{"prompt": 3}', 'prompt=3 must be a string'),
        ('{"messages": "hello"}', 'messages must be a list of objects'),
        ('{"messages": [3]}', 'messages must be a list of objects'),
        ('{"messages": []}', 'at least one message'),
        ('{"messages": [{"role": "poet", "content": "a"}]}', 'poet'),
        ('{"messages": [{"role": "user"}]}', 'content'),
        ('{"prompt": "a", "heat": 1}', "unknown key 'heat'"),
        ('{"prompt": "a", "top_k": -3}', 'top_k=-3'),
        ('{"prompt": "a", "temperature": NaN}', 'temperature=nan'),
        ('{"prompt": "a", "id": [1]}', 'id=[1]'),
        ('{"prompt": "' + 'a' * 47 + '"}', 'a prompt of 48 tokens'),
        ('{"prompt": "\\ud800"}', 'surrogate'),
    ],
)
def test_batch_names_the_bad_line_and_writes_nothing(capsys, tmp_path, line, message):
    (tmp_path / 'out').write_text('old')
    code = batch(tmp_path, ['{"prompt": "fine"}', '', line])
    assert is_error(capsys, code, f'{tmp_path}/in:3: ', message)
    assert (tmp_path / 'out').read_text() == 'old'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['in', 'out']


def test_batch_refuses_files_it_cannot_use(capsys, tmp_path):
    (tmp_path / 'in').write_text('{"prompt": "a"}')
    for name, message in (('absent/out', 'does not exist'), ('.', 'must be a regular file')):
        assert is_error(capsys, run('batch', '--input', tmp_path / 'in', '--output', tmp_path / name), message)
    assert is_error(capsys, run('batch', '--input', tmp_path / 'absent', '--output', tmp_path / 'out'), 'absent')
    options = ('--input', tmp_path / 'in', '--output', tmp_path / 'out')
    assert is_error(capsys, run('batch', *options, '--max-batch', 0), 'max_batch=0')


def test_batch_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    (tmp_path / 'out').write_text('old')
    monkeypatch.setattr(os, 'fsync', lambda descriptor: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError, match='disk full'):
        batch(tmp_path, ['{"prompt": "fine", "max_tokens": 1}'] * 3)
    assert (tmp_path / 'out').read_text() == 'old'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['in', 'out']


def chat(monkeypatch, capsys, text, *options):
    monkeypatch.setattr(sys, 'stdin', io.StringIO(text))
    code = run('chat', '--temperature', 0, '--max-tokens', 4, *SHAPE, *options)
    return code, capsys.readouterr()


def test_chat_answers_lines_from_a_pipe_and_remembers(monkeypatch, capsys):
    _, once = chat(monkeypatch, capsys, 'hello\n')
    code, twice = chat(monkeypatch, capsys, 'hello\n\n/reset\nhello\nhello\n/exit\nnever\n')
    assert code == 0
    assert twice.out.startswith(once.out * 2)
    assert len(twice.out) > len(once.out * 2)
    # The third message follows a conversation and the second does not.
    assert twice.out[len(once.out * 2) :] != once.out
    assert 'Traceback' not in twice.err
    _, unknown = chat(monkeypatch, capsys, '/dance\n')
    assert unknown.out == ''
    assert unknown.err == 'unknown command /dance; there are /reset and /exit\n'


def test_chat_refuses_a_message_that_is_too_long(monkeypatch, capsys):
    code, (out, err) = chat(monkeypatch, capsys, 'x' * 60 + '\n')
    assert (code, out) == (2, '')
    assert err.startswith('error: a prompt of 63 tokens')
    code, (out, err) = chat(monkeypatch, capsys, 'hello\n', '--system', 'x' * 60)
    assert (code, out) == (2, '')
    assert err.startswith('error: a prompt of 63 tokens')


def test_events_come_in_order_and_as_early_as_possible():
    done = Completion('', (), 'stop')
    events = [
        Event(i, None, text, (), done if last else None)
        for i, text, last in [
            (1, 'b', False),
            (0, 'a', False),
            (1, 'c', True),
            (2, 'd', False),
            (0, 'e', True),
            (2, 'f', True),
        ]
    ]
    seen, given = [], []

    def source():
        for event in events:
            given.append(event.text)
            yield event

    for event in _in_order(source()):
        seen.append((event.text, ''.join(given)))
    assert ''.join(text for text, _ in seen) == 'aebcdf'
    assert seen[0] == ('a', 'ba')
    assert seen[3:5] == [('c', 'bacde'), ('d', 'bacde')]
