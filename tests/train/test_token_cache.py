import json
from pathlib import Path

import numpy as np
import pytest

from train import token_cache

ARRAYS = {
    'tokens': np.arange(5000, dtype=np.uint32),
    'offsets': np.array([0, 3, 5000], np.int64),
    'names': np.frombuffer(b'["a"]', np.uint8),
    'count': np.array(7, np.int64),
}


def assert_same(found, expected=ARRAYS):
    assert found is not None
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)


def test_what_was_written_is_read_back_mapped_and_read_only(tmp_path):
    folder = tmp_path / 'of' / 'caches' / 'key'
    assert token_cache.read(folder) is None
    token_cache.write(folder, ARRAYS)
    assert_same(found := token_cache.read(folder))
    assert [path.name for path in folder.parent.iterdir()] == ['key']
    assert isinstance(found['tokens'].base, np.memmap)
    with pytest.raises(ValueError, match='read-only'):
        found['tokens'][0] = 1


def flip_a_bit(folder):
    data = bytearray((folder / 'tokens.npy').read_bytes())
    data[-1000] ^= 1
    (folder / 'tokens.npy').write_bytes(data)


def cut_short(folder):
    data = (folder / 'tokens.npy').read_bytes()
    (folder / 'tokens.npy').write_bytes(data[:-4])


DAMAGES = {
    'a flipped bit': flip_a_bit,
    'a file cut short': cut_short,
    'a missing file': lambda folder: (folder / 'offsets.npy').unlink(),
    'no digests': lambda folder: (folder / 'digests.json').unlink(),
    'digests cut short': lambda folder: (folder / 'digests.json').write_text('{"tokens.npy":'),
    'digests of another kind': lambda folder: (folder / 'digests.json').write_text('[]'),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_damage_is_found_with_a_warning_and_written_over(tmp_path, caplog, damage):
    folder = tmp_path / 'key'
    token_cache.write(folder, ARRAYS)
    DAMAGES[damage](folder)
    assert token_cache.read(folder) is None
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f'{folder} is damaged and not used: ')
    other = {'tokens': np.ones(3, np.uint32)}
    token_cache.write(folder, other)
    assert_same(token_cache.read(folder), other)


def test_a_writer_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError('no space left')

    monkeypatch.setattr(token_cache.json, 'dumps', fail)
    with pytest.raises(OSError, match='no space left'):
        token_cache.write(tmp_path / 'key', ARRAYS)
    assert list(tmp_path.iterdir()) == []


def test_digests_are_of_every_file(tmp_path):
    token_cache.write(tmp_path / 'key', ARRAYS)
    digests = json.loads((tmp_path / 'key' / 'digests.json').read_text())
    assert set(digests) == {f'{name}.npy' for name in ARRAYS}


def test_of_two_processes_that_write_at_once_one_is_enough(tmp_path, monkeypatch):
    folder, rename = tmp_path / 'key', Path.rename

    def come_second(self, target):
        """The other process puts its folder in place first."""
        monkeypatch.setattr(Path, 'rename', rename)
        token_cache.write(folder, ARRAYS)
        return rename(self, target)

    monkeypatch.setattr(Path, 'rename', come_second)
    token_cache.write(folder, ARRAYS)
    assert_same(token_cache.read(folder))
    assert [path.name for path in tmp_path.iterdir()] == ['key']
