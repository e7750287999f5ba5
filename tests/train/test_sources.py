import json
import logging
import os
from collections.abc import Iterator

import pytest

from train import sources
from train.sources import Document, InstalledPython, JsonLines, Several, StandardLibrary, TextDirectory, identity_of


def test_standard_library_is_python_files_in_path_order():
    documents = list(StandardLibrary().documents())
    names = [document.name for document in documents]
    assert names == sorted(set(names))
    assert {'json/decoder.py', 'os.py'} < set(names)
    assert all(name.endswith('.py') for name in names)
    assert not [name for name in names if {'site-packages', 'dist-packages', '__pycache__'} & set(name.split('/'))]
    assert next(document for document in documents if document.name == 'os.py').text.startswith('r"""OS routines')


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A standard library and two folders of packages, in that order."""
    files = {
        'lib/os.py': 'os',
        'lib/site-packages/hidden.py': 'not the library',
        'lib/json/decoder.py': 'decoder',
        'one/b/__init__.py': 'b',
        'one/a.py': 'a',
        'one/a.pyi': 'stub',
        'one/README.md': 'read me',
        'one/copy.py': 'os',
        'one/empty.py': '',
        'one/table.py': 'x' * 101,
        'one/limit.py': 'y' * 100,
        'two/a.py': 'another a',
        'two/copy.py': 'b',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / 'two' / 'latin.py').write_bytes(b'caf\xe9')
    monkeypatch.setattr(sources.sysconfig, 'get_path', lambda name: str(tmp_path / 'lib'))
    roots = [str(tmp_path / 'one'), str(tmp_path / 'two'), str(tmp_path / 'gone')]
    monkeypatch.setattr(sources.site, 'getsitepackages', lambda: roots)
    return tmp_path


def test_installed_python_is_library_and_packages_without_copies_and_tables(environment, caplog):
    with caplog.at_level(logging.INFO):
        documents = list(InstalledPython(max_bytes=100).documents())
    assert [(document.name, document.text[:9]) for document in documents] == [
        ('json/decoder.py', 'decoder'),
        ('os.py', 'os'),
        ('a.py', 'a'),
        ('b/__init__.py', 'b'),
        ('limit.py', 'yyyyyyyyy'),
        ('a.py', 'another a'),
    ]
    reasons = [message.partition(str(environment / 'gone'))[2] or message for message in caplog.messages]
    assert reasons == [
        ': 1 of 11 files left out because they are larger than 100 bytes',
        ': 1 of 11 files left out because they are not UTF-8',
        '2 documents left out because another one has the same text',
    ]


def test_installed_python_takes_documentation_when_asked(environment):
    names = [document.name for document in InstalledPython(suffixes=('.md', '.pyi')).documents()]
    assert names == ['README.md', 'a.pyi']


def test_installed_python_of_this_environment_holds_its_library_and_its_packages():
    names = [document.name for document in InstalledPython().documents()]
    assert names.index('json/decoder.py') < names.index('os.py') < names.index('numpy/__init__.py')


def test_several_sources_follow_each_other_and_a_text_counts_once(tmp_path, caplog):
    for name, text in {'a/1.txt': 'one', 'a/2.txt': 'two', 'b/1.txt': 'three', 'b/3.txt': 'one'}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    parts = tuple(TextDirectory(path=str(tmp_path / folder)) for folder in 'ba')
    with caplog.at_level(logging.INFO):
        documents = list(Several(sources=parts).documents())
    assert documents == [Document('1.txt', 'three'), Document('3.txt', 'one'), Document('2.txt', 'two')]
    assert caplog.messages == ['1 documents left out because another one has the same text']


def changes(folder) -> Iterator[str]:
    """Changes the files of a folder in one way after the other."""
    (folder / 'new.txt').write_text('new')
    yield 'a file comes'
    (folder / 'new.txt').write_text('now')
    os.utime(folder / 'new.txt', ns=(1, 1))
    yield 'it is written again, in the same length'
    (folder / 'new.txt').rename(folder / 'other.txt')
    yield 'it gets another name'
    (folder / 'other.txt').unlink()
    yield 'it goes'


def test_identity_changes_with_the_files_and_the_settings(tmp_path):
    (tmp_path / 'a.txt').write_text('A')
    (tmp_path / 'ignored.bin').write_text('1')
    source = Several(sources=(TextDirectory(path=str(tmp_path)), StandardLibrary()))
    first = identity_of(source)
    (tmp_path / 'ignored.bin').write_text('22')
    assert identity_of(source) == first
    seen = [first]
    for change in changes(tmp_path):
        seen.append(identity_of(source))
        assert seen[-1] != seen[-2], change
    assert seen[-1] == first
    different = [
        TextDirectory(path=str(tmp_path)),
        TextDirectory(path=str(tmp_path), suffixes=('.txt',)),
        JsonLines(path=str(tmp_path / 'a.txt')),
        JsonLines(path=str(tmp_path / 'a.txt'), field='body'),
        StandardLibrary(),
        InstalledPython(),
        InstalledPython(max_bytes=10),
    ]
    assert len({identity_of(source) for source in different}) == len(different)


def test_a_source_without_dates_has_no_identity():
    class Listed:
        def documents(self) -> Iterator[Document]:
            return iter([Document('a', 'A')])

    for source in (Listed(), Several(sources=(StandardLibrary(), Listed()))):
        with pytest.raises(ValueError, match='Listed.* has no method identity'):
            identity_of(source)


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
    with pytest.raises(ValueError, match=r'InstalledPython\.suffixes'):
        InstalledPython(suffixes=('.py', ''))
    with pytest.raises(ValueError, match=r'InstalledPython\.max_bytes=0'):
        InstalledPython(max_bytes=0)
    for wrong in ((), (StandardLibrary,)):
        with pytest.raises(ValueError, match=r'Several\.sources'):
            Several(sources=wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match='sources'):
        Several(sources=('text',))  # pyright: ignore[reportArgumentType]
