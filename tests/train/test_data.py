import dataclasses
import functools
import itertools
import math
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deepseek_jax.tokenizer import ByteTokenizer
from train.data import (
    Corpus,
    DataConfig,
    HeldoutRows,
    PackedRows,
    Row,
    TokenizedDocuments,
    batch,
    bits_per_byte,
    cut_rows,
    heldout_batches,
    is_heldout,
    load_corpus,
    target_bytes,
    training_rows,
)
from train.sources import Document, StandardLibrary, TextDirectory

BOS, EOS, PAD = 256, 257, 258
FIM_BEGIN, FIM_HOLE, FIM_END = 259, 260, 261


@dataclasses.dataclass(frozen=True)
class Listed:
    """A source that is a list."""

    items: tuple[tuple[str, str], ...]

    def documents(self) -> Iterator[Document]:
        return itertools.starmap(Document, self.items)


@functools.cache
def words(number: int) -> str:
    """A text of its own for each number, of 5 to 60 letters."""
    draw = random.Random(number)
    return f'{number}:' + ''.join(draw.choice('abcdefgh é') for _ in range(draw.randint(3, 56)))


def make_corpus(count: int = 60, **options) -> Corpus:
    items = tuple((f'doc/{number}', words(number)) for number in range(count))
    return load_corpus(DataConfig(source=Listed(items), heldout_fraction=0.25, **options))


def documents_of(part: TokenizedDocuments) -> list[list[int]]:
    return [part.tokens[start:stop].tolist() for start, stop in itertools.pairwise(part.offsets)]


def stream_of_epoch(rows: PackedRows, epoch: int, length: int) -> list[int]:
    """The token stream that an epoch's rows were cut from, put together by the texts of the rows alone."""
    count = rows.rows_per_epoch
    pieces = [rows[epoch * count + k]['tokens'].tolist() for k in range(count)]
    order = rows._epoch(epoch).rows
    placed = dict(zip(order.tolist(), pieces, strict=True))
    for k in range(1, count):
        assert placed[k][0] == placed[k - 1][length]
    return [token for k in range(count) for token in placed[k][:length]] + placed[count - 1][length:]


def split_documents(tokens: list[int]) -> list[list[int]]:
    """Whole documents `bos ... eos` of a stream, the cut one at its end left out."""
    documents, current = [], []
    for token in tokens:
        current.append(token)
        if token == EOS:
            documents.append(current)
            current = []
    return documents


def assert_rows_equal(left: Row, right: Row) -> None:
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])
        assert left[name].dtype == right[name].dtype


def test_corpus_holds_every_document_once_between_bos_and_eos():
    corpus = make_corpus()
    texts = {f'doc/{number}': words(number) for number in range(60)}
    assert set(corpus.train.names) | set(corpus.heldout.names) == set(texts)
    assert not set(corpus.train.names) & set(corpus.heldout.names)
    for part in (corpus.train, corpus.heldout):
        assert part.tokens.dtype == np.uint32
        for name, ids in zip(part.names, documents_of(part), strict=True):
            assert ids == [BOS, *texts[name].encode(), EOS]
        assert part.num_bytes == sum(len(texts[name].encode()) for name in part.names)


def test_split_does_not_change_when_documents_are_added():
    few, many = make_corpus(40), make_corpus(200)
    assert set(few.heldout.names) == set(many.heldout.names) & {f'doc/{number}' for number in range(40)}
    assert 0.15 < len(many.heldout.names) / 200 < 0.35
    assert {name for name in many.train.names if is_heldout(name, 0.25)} == set()
    larger = {name for name in many.train.names + many.heldout.names if is_heldout(name, 0.5)}
    assert set(many.heldout.names) < larger


def test_corpus_reports_progress():
    seen = []
    items = tuple((f'{number}', words(number) * 20_000) for number in range(8))
    load_corpus(DataConfig(source=Listed(items), heldout_fraction=0.5), lambda *counts: seen.append(counts))
    assert len(seen) > 1
    assert seen == sorted(seen)
    assert seen[-1] == (8, sum(len(text.encode()) for _, text in items))


@pytest.mark.parametrize(('fraction', 'part', 'remedy'), [(1e-9, 'held-out', 'raise'), (1 - 1e-9, 'training', 'lower')])
def test_an_empty_part_says_what_to_do(fraction, part, remedy):
    with pytest.raises(ValueError, match=f'3 documents and none falls into the {part} part: {remedy} config.heldout'):
        load_corpus(DataConfig(source=Listed((('a', 'x'), ('b', 'y'), ('c', 'z'))), heldout_fraction=fraction))


@pytest.fixture
def text(tmp_path):
    """A directory of texts, and a configuration that keeps their tokens."""
    folder = tmp_path / 'text'
    folder.mkdir()
    for number in range(60):
        (folder / f'{number}.txt').write_text(words(number))
    source = TextDirectory(path=str(folder))
    return folder, DataConfig(source=source, heldout_fraction=0.25, cache_dir=str(tmp_path / 'cache'))


def assert_documents_equal(left: TokenizedDocuments, right: TokenizedDocuments) -> None:
    for name in ('tokens', 'offsets'):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
        assert getattr(left, name).dtype == getattr(right, name).dtype
    assert (left.names, left.num_bytes) == (right.names, right.num_bytes)


def kept(config: DataConfig) -> list[str]:
    assert config.cache_dir is not None
    return sorted(path.name for path in Path(config.cache_dir).iterdir())


def test_cached_corpus_is_the_same_and_needs_no_tokenizing(text, monkeypatch):
    _, config = text
    plain = load_corpus(dataclasses.replace(config, cache_dir=None))
    first = load_corpus(config)
    monkeypatch.setattr(ByteTokenizer, 'encode_batch', None)
    again = load_corpus(config)
    for corpus in (first, again):
        assert_documents_equal(corpus.train, plain.train)
        assert_documents_equal(corpus.heldout, plain.heldout)
    assert isinstance(again.train.tokens.base, np.memmap)
    rows, expected = PackedRows(again, 16, seed=0), PackedRows(plain, 16, seed=0)
    for index in range(2 * expected.rows_per_epoch):
        assert_rows_equal(rows[index], expected[index])
    for left, right in zip(HeldoutRows(again, 16), HeldoutRows(plain, 16), strict=True):
        assert_rows_equal(left, right)


def test_cache_is_of_one_text_split_tokenizer_and_code(text, monkeypatch):
    folder, config = text
    load_corpus(config)
    load_corpus(dataclasses.replace(config, fim_rate=0.5, mask_documents=True))
    assert len(kept(config)) == 1, 'what is done to rows later does not count'
    load_corpus(dataclasses.replace(config, heldout_fraction=0.5))
    assert len(kept(config)) == 2
    load_corpus(dataclasses.replace(config, tokenizer='deepseek'))
    assert len(kept(config)) == 3
    (folder / '0.txt').write_text('another text')
    changed = load_corpus(config)
    assert [*b'another text'] in [ids[1:-1] for part in (changed.train, changed.heldout) for ids in documents_of(part)]
    assert len(kept(config)) == 4
    monkeypatch.setattr('train.data.inspect.getsource', lambda module: 'other code')
    load_corpus(config)
    assert len(kept(config)) == 5


def test_damaged_cache_is_made_again(text, caplog):
    _, config = text
    expected = load_corpus(config)
    (name,) = kept(config)
    assert config.cache_dir is not None
    file = Path(config.cache_dir) / name / 'train_tokens.npy'
    file.write_bytes(file.read_bytes()[:-8])
    assert_documents_equal(load_corpus(config).train, expected.train)
    assert len(caplog.messages) == 1
    assert 'train_tokens.npy has changed' in caplog.messages[0]
    assert_documents_equal(load_corpus(config).train, expected.train)
    assert len(caplog.messages) == 1, 'what was made again is whole'
    assert kept(config) == [name]


def test_cache_needs_a_source_that_tells_when_it_changes(tmp_path):
    source = Listed((('a', 'x'), ('b', 'y')))
    with pytest.raises(ValueError, match='Listed.* has no method identity'):
        load_corpus(DataConfig(source=source, heldout_fraction=0.5, cache_dir=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_an_empty_source_says_so(tmp_path):
    with pytest.raises(ValueError, match=f'{tmp_path} holds no documents'):
        load_corpus(DataConfig(source=TextDirectory(path=str(tmp_path))))


def test_config_refuses_wrong_values():
    for option in ({'heldout_fraction': 0.0}, {'heldout_fraction': 1.0}, {'fim_rate': -0.1}, {'fim_rate': 1.1}):
        with pytest.raises(ValueError, match=next(iter(option))):
            DataConfig(source=StandardLibrary(), **option)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match='mask_documents'):
        DataConfig(source=StandardLibrary(), mask_documents=1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r'@StandardLibrary\(\)'):
        DataConfig(source=StandardLibrary)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match='source'):
        DataConfig(source='text')  # pyright: ignore[reportArgumentType]


def test_rows_are_a_pure_function_of_seed_and_index():
    corpus = make_corpus(fim_rate=0.5)
    one, other = PackedRows(corpus, 32, seed=3), PackedRows(make_corpus(fim_rate=0.5), 32, seed=3)
    indices = [*range(3 * one.rows_per_epoch), 10**12]
    random.Random(0).shuffle(indices)
    for index in indices:
        assert_rows_equal(one[index], other[index])
    for index in sorted(indices):
        assert_rows_equal(one[index], other[index])
    changed = PackedRows(corpus, 32, seed=4)
    assert any((one[k]['tokens'] != changed[k]['tokens']).any() for k in range(4))


def test_rows_read_by_many_threads_are_the_same():
    corpus = make_corpus(fim_rate=0.5)
    rows = PackedRows(corpus, 32, seed=3)
    expected = [PackedRows(corpus, 32, seed=3)[k]['tokens'] for k in range(4 * rows.rows_per_epoch)]
    wrong = []

    def read(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(100):
            index = draw.randrange(len(expected))
            if (rows[index]['tokens'] != expected[index]).any():
                wrong.append(index)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_epoch_reads_every_document_once_and_epochs_differ():
    length = 32
    corpus = make_corpus()
    rows = PackedRows(corpus, length, seed=0)
    known = {tuple(ids) for ids in documents_of(corpus.train)}
    streams = [stream_of_epoch(rows, epoch, length) for epoch in range(2)]
    for stream in streams:
        documents = [tuple(ids) for ids in split_documents(stream)]
        assert len(set(documents)) == len(documents)
        assert set(documents) <= known
        assert len(corpus.train.tokens) - len(stream) < length
    assert streams[0] != streams[1]


def test_training_rows_have_no_padding_and_one_segment_without_mask():
    rows = PackedRows(make_corpus(), 32, seed=0)
    for index in range(rows.rows_per_epoch):
        row = rows[index]
        assert {name: (array.shape, array.dtype) for name, array in row.items()} == {
            'tokens': ((33,), np.int32),
            'segments': ((33,), np.int32),
            'weights': ((32,), np.float32),
        }
        assert (row['segments'] == 1).all()
        assert (row['weights'] == 1).all()
        assert PAD not in row['tokens']


def test_masked_documents_number_the_row_and_weigh_no_target_across_them():
    plain, masked = (PackedRows(make_corpus(mask_documents=mask), 48, seed=0) for mask in (False, True))
    for index in range(plain.rows_per_epoch):
        row = masked[index]
        np.testing.assert_array_equal(row['tokens'], plain[index]['tokens'])
        segments = 1 + np.cumsum(row['tokens'] == BOS) - (row['tokens'][0] == BOS)
        np.testing.assert_array_equal(row['segments'], segments)
        np.testing.assert_array_equal(row['weights'], row['tokens'][1:] != BOS)


def test_fill_in_the_middle_holds_the_document_and_comes_at_its_rate():
    length, epochs = 32, 3
    corpus = make_corpus(200, fim_rate=0.3)
    known = {tuple(ids[1:-1]) for ids in documents_of(corpus.train)}
    rows = PackedRows(corpus, length, seed=0)
    rearranged, total, cuts = 0, 0, set()
    for epoch in range(epochs):
        for document in split_documents(stream_of_epoch(rows, epoch, length)):
            total += 1
            text = document[1:-1]
            if FIM_BEGIN in text:
                rearranged += 1
                hole, end = text.index(FIM_HOLE), text.index(FIM_END)
                assert text[0] == FIM_BEGIN
                prefix, suffix, middle = text[1:hole], text[hole + 1 : end], text[end + 1 :]
                text = [*prefix, *middle, *suffix]
                cuts.add((tuple(text), len(prefix), len(middle)))
            assert tuple(text) in known
    assert 0.23 < rearranged / total < 0.37
    assert len(cuts) > 0.9 * rearranged
    plain = PackedRows(make_corpus(), length, seed=0)
    assert all(plain[k]['tokens'].max() < FIM_BEGIN for k in range(50))


def test_fill_in_the_middle_needs_its_tokens(monkeypatch):
    class Without(ByteTokenizer):
        def __init__(self) -> None:
            super().__init__()
            self.fim_ids = None

    monkeypatch.setattr('train.data.load_tokenizer', lambda spec: Without())
    with pytest.raises(ValueError, match=r'fim_rate=0\.1 needs'):
        make_corpus(fim_rate=0.1)


def test_a_corpus_shorter_than_a_row_is_an_error():
    corpus = make_corpus(8)
    size = len(corpus.train.tokens)
    assert PackedRows(corpus, size - 1, seed=0).rows_per_epoch == 1
    np.testing.assert_array_equal(
        np.sort(PackedRows(corpus, size - 1, seed=0)[5]['tokens']), np.sort(corpus.train.tokens)
    )
    with pytest.raises(ValueError, match=f'holds {size} training tokens, less than one row'):
        PackedRows(corpus, size, seed=0)
    for arguments in ((0, 0), (8, -1)):
        with pytest.raises(ValueError, match=r'sequence_length=.*seed='):
            PackedRows(corpus, *arguments)
    with pytest.raises(IndexError):
        PackedRows(corpus, 8, 0)[-1]


def test_training_rows_go_on_from_any_row():
    corpus = make_corpus(fim_rate=0.2, mask_documents=True)
    count = PackedRows(corpus, 32, 1).rows_per_epoch
    whole = training_rows(corpus, 32, seed=1)
    sizes = [3, 5, count, 2]
    for size in sizes:
        batch(whole, size)
    resumed = training_rows(corpus, 32, seed=1, first_row=sum(sizes))
    rows = PackedRows(corpus, 32, 1)
    for size in (4, count, 7):
        assert_rows_equal(batch(resumed, size), batch(whole, size))
    again = batch(training_rows(corpus, 32, seed=1, first_row=sum(sizes)), 4)
    for offset, tokens in enumerate(again['tokens']):
        np.testing.assert_array_equal(rows[sum(sizes) + offset]['tokens'], tokens)


@pytest.mark.parametrize('shares', [2, 3])
@pytest.mark.parametrize('first', [0, 7])
def test_shares_together_are_the_global_order(shares, first):
    corpus = make_corpus()
    steps = 40
    alone = batch(training_rows(corpus, 32, seed=1, first_row=first), steps * shares)
    parts = [batch(training_rows(corpus, 32, 1, share, shares, first), steps) for share in range(shares)]
    for name, values in alone.items():
        together = np.stack([part[name] for part in parts], axis=1).reshape(values.shape)
        np.testing.assert_array_equal(together, values)


def test_bad_shares_are_refused():
    for share, first, match in ((2, 0, 'share=2'), (0, -1, 'first_row=-1')):
        with pytest.raises(ValueError, match=match):
            training_rows(make_corpus(8), 8, 0, share, 2, first)


def test_rows_are_cut_into_sequences_that_have_all_their_targets():
    rows = batch(training_rows(make_corpus(mask_documents=True), 32, seed=1), 3)
    cut = cut_rows(rows, 8)
    assert {name: values.shape for name, values in cut.items()} == {
        'tokens': (12, 9),
        'segments': (12, 9),
        'weights': (12, 8),
    }
    for name in ('tokens', 'segments'):
        np.testing.assert_array_equal(cut[name][:, 1:].reshape(3, 32), rows[name][:, 1:])
        np.testing.assert_array_equal(cut[name][:, :-1].reshape(3, 32), rows[name][:, :-1])
    np.testing.assert_array_equal(cut['weights'].reshape(3, 32), rows['weights'])
    assert_rows_equal(cut_rows(rows, 32), rows)
    with pytest.raises(ValueError, match='length=5 must divide the 32 targets'):
        cut_rows(rows, 5)


def test_heldout_rows_cover_the_part_in_order_and_pad_the_last():
    corpus = make_corpus()
    rows = HeldoutRows(corpus, 32)
    total = len(corpus.heldout.tokens)
    assert len(rows) == math.ceil((total - 1) / 32)
    targets = np.concatenate([row['tokens'][1:][row['weights'] > 0] for row in rows])
    np.testing.assert_array_equal(targets, corpus.heldout.tokens[1:])
    last = rows[len(rows) - 1]
    padded = last['segments'] == 0
    assert padded.sum() == len(rows) * 32 + 1 - total
    assert (last['tokens'][padded] == PAD).all()
    assert (last['weights'] == ~padded[1:]).all()
    for row in rows:
        assert [row[name].shape for name in ('tokens', 'segments', 'weights')] == [(33,), (33,), (32,)]


def test_heldout_rows_mask_documents():
    for row in HeldoutRows(make_corpus(mask_documents=True), 32):
        real = row['segments'] > 0
        segments = 1 + np.cumsum(row['tokens'] == BOS) - (row['tokens'][0] == BOS)
        np.testing.assert_array_equal(row['segments'], segments * real)
        np.testing.assert_array_equal(row['weights'], (row['tokens'][1:] != BOS) & real[1:])


def test_heldout_rows_are_plain_text_and_spread_evenly_when_limited():
    corpus = make_corpus(200, fim_rate=1.0)
    rows, some = HeldoutRows(corpus, 16), HeldoutRows(corpus, 16, max_rows=7)
    assert not any((row['tokens'] >= FIM_BEGIN).any() for row in rows)
    assert len(some) == 7
    for k in range(7):
        assert_rows_equal(some[k], rows[k * len(rows) // 7])
    assert len(HeldoutRows(corpus, 16, max_rows=10**6)) == len(rows)
    with pytest.raises(ValueError, match='max_rows=0'):
        HeldoutRows(corpus, 16, max_rows=0)


@pytest.mark.parametrize('process_count', [1, 2, 3])
def test_heldout_batches_hold_every_row_once_in_equal_numbers(process_count):
    corpus = make_corpus()
    rows = HeldoutRows(corpus, 16)
    parts = [list(heldout_batches(corpus, 16, 4, None, index, process_count)) for index in range(process_count)]
    assert len({len(part) for part in parts}) == 1
    assert all(values['tokens'].shape == (4, 17) for part in parts for values in part)
    count = sum((values['weights'].sum(1) > 0).sum() for part in parts for values in part)
    assert count == len(rows)
    lengths = corpus.tokenizer.byte_lengths()
    assert sum(target_bytes(values, lengths) for part in parts for values in part) == corpus.heldout.num_bytes
    found = sorted(tuple(t) for part in parts for values in part for t in values['tokens'] if (t != PAD).any())
    assert found == sorted(tuple(row['tokens']) for row in rows)


def test_target_bytes_counts_the_text_of_weighted_targets():
    lengths = make_corpus(8).tokenizer.byte_lengths()
    row = {
        'tokens': np.array([97, 98, EOS, BOS, 99, 100], np.int32),
        'segments': np.array([1, 1, 1, 2, 2, 0], np.int32),
        'weights': np.array([1, 1, 0, 1, 0], np.float32),
    }
    assert target_bytes(row, lengths) == 2
    assert target_bytes({name: np.stack([array, array]) for name, array in row.items()}, lengths) == 4


def test_bits_per_byte_of_a_uniform_guess():
    assert bits_per_byte(10 * math.log(256), 10) == pytest.approx(8)
    with pytest.raises(ValueError, match='num_bytes=0'):
        bits_per_byte(1.0, 0)


def test_the_standard_library_loads_as_bytes():
    corpus = load_corpus(DataConfig(source=StandardLibrary()))
    assert corpus.train.num_bytes > 5_000_000
    assert 0.005 < len(corpus.heldout.names) / len(corpus.train.names) < 0.05
    iterator = training_rows(corpus, 256, seed=0)
    values = batch(iterator, 8)
    assert values['tokens'].shape == (8, 257)
    assert target_bytes(values, corpus.tokenizer.byte_lengths()) > 0.95 * 8 * 256
