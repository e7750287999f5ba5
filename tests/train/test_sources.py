import json
import logging

import pytest

from train.sources import Document, JsonLines, StandardLibrary, TextDirectory


def test_standard_library_is_python_files_in_path_order():
    documents = list(StandardLibrary().documents())
    names = [document.name for document in documents]
    assert names == sorted(set(names))
    assert {'json/decoder.py', 'os.py'} < set(names)
    assert all(name.endswith('.py') for name in names)
    assert not [name for name in names if {'site-packages', 'dist-packages', '__pycache__'} & set(name.split('/'))]
    assert next(document for document in documents if document.name == 'os.py').text.startswith('r"""OS routines')


def test_text_directory_reads_what_is_there_and_counts_what_is_not_utf8(tmp_path, caplog):
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b' / 'one.md').write_bytes('é\r\n'.encode())
    (tmp_path / 'a.txt').write_text('A')
    (tmp_path / 'c.txt').write_bytes(b'caf\xe9')
    (tmp_path / 'd.txt').write_text('')
    (tmp_path / 'e.bin').write_text('E')
    (tmp_path / 'gone.txt').symlink_to(tmp_path / 'nowhere')
    with caplog.at_level(logging.WARNING):
        documents = list(TextDirectory(path=str(tmp_path)).documents())
    assert documents == [Document('a.txt', 'A'), Document('b/one.md', 'é\r\n')]
    assert [record.getMessage() for record in caplog.records] == [
        f'{tmp_path}: 1 of 5 files left out because they are not UTF-8'
    ]
    assert list(TextDirectory(path=str(tmp_path), suffixes=('.bin',)).documents()) == [Document('e.bin', 'E')]


def test_json_lines_reports_each_bad_line_and_keeps_the_rest(tmp_path, caplog):
    file = tmp_path / 'part.jsonl'
    lines = [
        b'\xef\xbb\xbf{"text": "first", "other": 1}',
        b'{"text": "caf\xe9"}',
        b'',
        b'{"text": ',
        b'{"body": "x"}',
        b'[1]',
        b'{"text": 5}',
        b'{"text": "\\ud800"}',
        b'{"text": ""}',
        b'[' * 100_000,
        '{"text": "é\\n"}'.encode(),
    ]
    file.write_bytes(b'\n'.join(lines))
    with caplog.at_level(logging.WARNING):
        documents = list(JsonLines(path=str(file)).documents())
    assert [document.text for document in documents] == ['first', 'é\n']
    messages = [record.getMessage() for record in caplog.records]
    reported = [int(message.removeprefix(f'{file}:').split(':')[0]) for message in messages[:-1]]
    assert reported == [2, 4, 5, 6, 7, 8, 10]
    assert 'utf-8' in messages[0]
    assert all('\n' not in message for message in messages)
    assert messages[-1] == f'{file}: 7 lines left out, 2 kept'


def test_json_lines_caps_its_reports(tmp_path, caplog):
    file = tmp_path / 'part.jsonl'
    file.write_text('\n'.join(['bad'] * 50 + ['{"body": "x"}']))
    with caplog.at_level(logging.WARNING):
        assert [document.text for document in JsonLines(path=str(file), field='body').documents()] == ['x']
    assert len(caplog.records) == 21
    assert caplog.messages[-1] == f'{file}: 50 lines left out, 1 kept'


def test_json_lines_names_do_not_depend_on_order_or_file(tmp_path):
    records = [json.dumps({'text': f'text {number}'}) for number in range(6)]
    (tmp_path / 'all.jsonl').write_text('\n'.join(records))
    parts = tmp_path / 'parts'
    parts.mkdir()
    (parts / 'b.jsonl').write_text('\n'.join(records[:3]) + '\n')
    (parts / 'a.jsonl').write_text('\n'.join(records[3:][::-1]))
    (parts / 'ignored.txt').write_text('x')
    whole = list(JsonLines(path=str(tmp_path / 'all.jsonl')).documents())
    split = list(JsonLines(path=str(parts)).documents())
    assert [document.text for document in split] == [f'text {number}' for number in (5, 4, 3, 0, 1, 2)]
    assert set(split) == set(whole)
    assert len({document.name for document in whole}) == 6


@pytest.mark.parametrize('make', [TextDirectory, JsonLines])
def test_a_source_without_documents_says_what_it_expects(tmp_path, make):
    (tmp_path / 'empty.txt').write_text('')
    (tmp_path / 'empty.jsonl').write_text('\n{"text": ""}\n')
    with pytest.raises(ValueError, match=f'{tmp_path} holds no documents: expected .*jsonl|txt'):
        list(make(path=str(tmp_path)).documents())


def test_paths_that_do_not_exist_are_named(tmp_path):
    with pytest.raises(NotADirectoryError, match=f'{tmp_path}/x is not a directory'):
        TextDirectory(path=str(tmp_path / 'x')).documents()
    with pytest.raises(FileNotFoundError, match=f'{tmp_path}/x does not exist'):
        list(JsonLines(path=str(tmp_path / 'x')).documents())


def test_wrong_values_are_refused():
    with pytest.raises(TypeError, match='path'):
        TextDirectory(path=5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match='suffixes'):
        TextDirectory(path='x', suffixes=())
    with pytest.raises(ValueError, match='field'):
        JsonLines(path='x', field='')
