import json

import pytest

from train.metrics import MetricsFile, ProgressDisplay, read_jsonl


def test_no_file_reads_as_no_lines(tmp_path):
    assert read_jsonl(tmp_path / 'metrics.jsonl') == []


def test_a_last_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo', encoding='utf-8')
    assert [line['step'] for line in read_jsonl(path)] == [1, 2]
    path.write_text('{"step": 1}\n{"step": 2}', encoding='utf-8')
    assert [line['step'] for line in read_jsonl(path)] == [1]


def test_lines_past_the_resumed_step_are_dropped_and_the_rest_keeps_its_bytes(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    values = [
        {'step': 1, 'loss': 0.1 + 0.2, 'bits_per_byte': None, 'load': [1.0, 3.3e-300]},
        {'step': 2, 'loss': float('nan'), 'grad_norm': 1e-45},
        {'step': 2, 'heldout_bits_per_byte': 5.0},
        {'step': 3, 'loss': 1},
        {'step': 4, 'loss': 2},
    ]
    file = MetricsFile(path, 0)
    for value in values:
        file.write(**value)
    file.close()
    with path.open('a', encoding='utf-8') as torn:
        torn.write('{"step": 5, ')
    text = path.read_text(encoding='utf-8')
    file = MetricsFile(path, 2)
    assert path.read_text(encoding='utf-8') == ''.join(text.splitlines(keepends=True)[:3])
    file.write(step=3, loss=7)
    assert read_jsonl(path)[3:] == [{'step': 3, 'loss': 7}], 'a line is readable as soon as it is written'
    file.close()
    assert [file.name for file in tmp_path.iterdir()] == ['metrics.jsonl']


def test_a_new_run_starts_an_empty_file(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 1}\n', encoding='utf-8')
    MetricsFile(path, 0).close()
    assert path.read_bytes() == b''


def test_a_line_is_one_json_object(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    file = MetricsFile(path, 0)
    file.write(step=1, text='two\nlines')
    file.close()
    assert json.loads(path.read_text(encoding='utf-8')) == {'step': 1, 'text': 'two\nlines'}
    assert path.read_text(encoding='utf-8').count('\n') == 1


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr('train.metrics.time.monotonic', lambda: now[0])
    return now


def test_without_a_terminal_a_line_every_ten_seconds_and_at_both_ends(clock, capsys):
    display = ProgressDisplay(total_steps=20, step=4)
    for step in range(5, 21):
        clock[0] += 3.0
        display.update(step, loss=2.5, bits_per_byte=1.25 if step < 20 else None, tokens_per_second=12345.6)
    display.message('hello')
    display.close()
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ''
    assert [int(line.split('/')[0].removeprefix('step ')) for line in lines[:-1]] == [5, 9, 13, 17, 20]
    assert lines[0] == 'step 5/20  loss 2.5000  1.250 bits/byte  12,346 tokens/s  45 s left'
    assert lines[-2:] == ['step 20/20  loss 2.5000  12,346 tokens/s  0 s left', 'hello']
