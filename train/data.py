"""From a text source to batches: tokenise once, split by document, pack rows, read them by index.

A training row is a pure function of (corpus, seed, index), so resuming and the number of processes need one integer:

  index i, epoch e = i // rows_per_epoch
  documents, permuted by (seed, e), fill-in-the-middle applied:    bos a1 a2 eos | bos b1 eos | bos c1 c2 c3 eos | ...
  cut every T tokens into rows of T + 1, the last one shared:      [bos a1 a2 eos bos] [bos b1 eos bos c1] ...
  rows, permuted by (seed, e): a batch of neighbours holds rows from all over the corpus

A row is a dictionary of `tokens` int32 (T + 1,), `segments` int32 (T + 1,) and `weights` float32 (T,), the last for
the targets `tokens[1:]`. Tokens may attend to each other only where their segments are equal: 1, 2, ... for the row's
documents when documents are masked from each other, else 1 throughout; 0 is padding.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import math
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import grain
import numpy as np
import rich.console
import rich.progress
import tokenizers

from deepseek_jax import tokenizer as tokenizer_lib
from deepseek_jax.config import check_types
from deepseek_jax.tokenizer import Tokenizer, load_tokenizer
from train import sources, token_cache
from train.sources import Document, Source

Row = dict[str, np.ndarray]
Progress = Callable[[int, int], None]  # documents so far, bytes of text so far

CHUNK_CHARACTERS = 1 << 20
PARTS = ('train', 'heldout')
NUM_ENDLESS_ROWS = 1 << 48
READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=256)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on.

    Attributes:
      source: where documents come from.
      tokenizer: 'bytes', 'deepseek', or the path of a tokenizer.json or of its directory.
      heldout_fraction: share of the documents that is never trained on, chosen by a hash of their names.
      mask_documents: whether a row's documents are masked from each other [5.1: fine-tuning does, pretraining not].
      fim_rate: share of the training documents, drawn anew each epoch, that become fill-in-the-middle examples
        (0.1 in the published pretraining [4.1]).
      cache_dir: where tokenised text is kept for the next start, for sources that take minutes; None keeps none.
    """

    source: Source
    tokenizer: str = 'bytes'
    heldout_fraction: float = 0.02
    mask_documents: bool = False
    fim_rate: float = 0.0
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.source, type):
            raise TypeError(f'DataConfig.source={self.source!r} must be an instance: in gin, @{self.source.__name__}()')
        check_types(self)
        if not 0 < self.heldout_fraction < 1:
            raise ValueError(f'DataConfig.heldout_fraction={self.heldout_fraction} must lie between 0 and 1')
        if not 0 <= self.fim_rate <= 1:
            raise ValueError(f'DataConfig.fim_rate={self.fim_rate} must lie in 0..1')


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenizedDocuments:
    """Documents as one array: document d is `tokens[offsets[d] : offsets[d + 1]]`, `bos ... eos`.

    Attributes:
      tokens: uint32 (num_tokens,).
      offsets: int64 (num_documents + 1,).
      names: of the documents, in order.
      num_bytes: of UTF-8 text that all tokens stand for.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    names: tuple[str, ...]
    num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """A tokenised source, in two parts that share no document, with what made it."""

    config: DataConfig
    tokenizer: Tokenizer
    train: TokenizedDocuments
    heldout: TokenizedDocuments


def is_heldout(name: str, fraction: float) -> bool:
    """Whether the document of this name is held out; nothing but its name and the fraction matters."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'big') < fraction * 2**64


def load_corpus(config: DataConfig, progress: Progress | None = None) -> Corpus:
    """The configured source, tokenised and split.

    `progress` is called with documents and bytes so far; without it a terminal shows them when it takes more than
    two seconds. With `cache_dir` it is read from there if it was tokenised before: the same files, tokenizer, split
    and code. Raises `ValueError` for a source without documents, for a split that leaves a part empty, for
    fill-in-the-middle with a tokenizer that has no tokens for it, and for a cache of a source that is not dated.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    if config.fim_rate and tokenizer.fim_ids is None:
        raise ValueError(f'{config.fim_rate=} needs fill-in-the-middle tokens; {config.tokenizer!r} has none')
    if config.cache_dir is None:
        train, heldout = _tokenize(config, tokenizer, progress)
    else:
        folder = Path(config.cache_dir).expanduser() / _cache_key(config, tokenizer)
        if (arrays := token_cache.read(folder)) is not None:
            train, heldout = (_documents(arrays, part) for part in PARTS)
        else:
            train, heldout = _tokenize(config, tokenizer, progress)
            token_cache.write(folder, {**_arrays(train, PARTS[0]), **_arrays(heldout, PARTS[1])})
    return Corpus(config=config, tokenizer=tokenizer, train=train, heldout=heldout)


def _tokenize(
    config: DataConfig, tokenizer: Tokenizer, progress: Progress | None
) -> tuple[TokenizedDocuments, TokenizedDocuments]:
    """The training part and the held-out part."""
    byte_lengths = tokenizer.byte_lengths()
    bos, eos = np.array([[tokenizer.bos_id], [tokenizer.eos_id]], np.uint32)
    names: dict[bool, list[str]] = {False: [], True: []}
    arrays: dict[bool, list[np.ndarray]] = {False: [], True: []}
    num_bytes = {False: 0, True: 0}
    with contextlib.nullcontext(progress) if progress else _terminal_progress() as report:
        for chunk in _chunks(config.source.documents()):
            encoded = tokenizer.encode_batch([document.text for document in chunk])
            for document, ids in zip(chunk, encoded, strict=True):
                heldout = is_heldout(document.name, config.heldout_fraction)
                names[heldout].append(document.name)
                arrays[heldout].append(np.concatenate([bos, ids, eos]))
                num_bytes[heldout] += int(byte_lengths[ids].sum())
            report(len(names[False]) + len(names[True]), sum(num_bytes.values()))
    for heldout, part, remedy in [(False, 'training', 'lower'), (True, 'held-out', 'raise')]:
        if not names[heldout]:
            raise ValueError(
                f'{config.source} has {len(names[not heldout])} documents and none falls into the {part} part: '
                f'{remedy} {config.heldout_fraction=} or add documents'
            )
    parts = [
        TokenizedDocuments(
            tokens=np.concatenate(arrays[heldout]),
            offsets=_starts([len(array) for array in arrays[heldout]]),
            names=tuple(names[heldout]),
            num_bytes=num_bytes[heldout],
        )
        for heldout in (False, True)
    ]
    return parts[0], parts[1]


def _cache_key(config: DataConfig, tokenizer: Tokenizer) -> str:
    """A digest of all that decides what `_tokenize` returns.

    The code counts as it stands in the files: a version number would stay the same while it is worked on.
    """
    code = [inspect.getsource(module) for module in (sources, tokenizer_lib, sys.modules[__name__])]
    with tempfile.TemporaryDirectory() as folder:
        kind = tokenizer.save(folder)
        files = [hashlib.blake2b(file.read_bytes()).hexdigest() for file in sorted(Path(folder).iterdir())]
    parts = (sources.identity_of(config.source), config.heldout_fraction, kind, files, tokenizers.__version__, code)
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _arrays(documents: TokenizedDocuments, part: str) -> dict[str, np.ndarray]:
    """What `token_cache` keeps of a part."""
    return {
        f'{part}_tokens': documents.tokens,
        f'{part}_offsets': documents.offsets,
        f'{part}_names': np.frombuffer(json.dumps(documents.names).encode(), np.uint8),
        f'{part}_num_bytes': np.array(documents.num_bytes, np.int64),
    }


def _documents(arrays: Mapping[str, np.ndarray], part: str) -> TokenizedDocuments:
    """The inverse of `_arrays`."""
    return TokenizedDocuments(
        tokens=arrays[f'{part}_tokens'],
        offsets=arrays[f'{part}_offsets'],
        names=tuple(json.loads(arrays[f'{part}_names'].tobytes())),
        num_bytes=int(arrays[f'{part}_num_bytes']),
    )


class PackedRows:
    """Training rows by index, without end: a random access source for `grain.MapDataset.source`.

    No row has padding: the tokens that do not fill an epoch's last row are left out of that epoch, other ones in
    each. Fill-in-the-middle turns `bos text eos` into `bos begin prefix hole suffix end middle eos` [4.1], cut at two
    places drawn evenly from those between tokens.
    """

    def __init__(self, corpus: Corpus, sequence_length: int, seed: int) -> None:
        """Raises `ValueError` for numbers out of range and for a corpus that does not fill one row."""
        if sequence_length < 1 or seed < 0:
            raise ValueError(f'{sequence_length=} must be positive and {seed=} must not be negative')
        self._documents, self._config, self._seed = corpus.train, corpus.config, seed
        self._fim_ids = np.array(corpus.tokenizer.fim_ids or (), np.uint32)
        self._length = sequence_length
        # Fill-in-the-middle only lengthens an epoch, so every epoch has this many rows.
        self.rows_per_epoch = (len(self._documents.tokens) - 1) // sequence_length
        if not self.rows_per_epoch:
            raise ValueError(
                f'the corpus holds {len(self._documents.tokens)} training tokens, less than one row of '
                f'{sequence_length=} and its last target: shorten the rows or add documents'
            )
        self._lock = threading.Lock()
        self._epochs: dict[int, _Epoch] = {}

    def __len__(self) -> int:
        return NUM_ENDLESS_ROWS

    def __getitem__(self, index: int) -> Row:
        """Row `index` of the endless order."""
        if not 0 <= index < NUM_ENDLESS_ROWS:
            raise IndexError(f'{index=} must lie in 0..{NUM_ENDLESS_ROWS}')
        epoch_number, place = divmod(int(index), self.rows_per_epoch)
        epoch = self._epoch(epoch_number)
        start = int(epoch.rows[place]) * self._length
        stop = start + self._length + 1
        pieces, lengths = [], []
        place = int(np.searchsorted(epoch.starts, start, 'right')) - 1
        while epoch.starts[place] < stop:
            offset = int(epoch.starts[place])
            views = _window(self._views(epoch, place), start - offset, stop - offset)
            pieces += views
            lengths.append(sum(map(len, views)))
            place += 1
        return _row(np.concatenate(pieces), lengths, self._config.mask_documents)

    def _epoch(self, number: int) -> '_Epoch':
        """The epoch's order; the last two are kept, for the threads that read on both sides of a boundary."""
        with self._lock:
            if number not in self._epochs:
                if len(self._epochs) > 1:
                    del self._epochs[min(self._epochs)]
                self._epochs[number] = self._draw_epoch(number)
            return self._epochs[number]

    def _draw_epoch(self, number: int) -> '_Epoch':
        lengths = np.diff(self._documents.offsets)
        order = _permutation(len(lengths), self._seed, number, 0)
        fim = _uniform(len(lengths), self._seed, number, 2) < self._config.fim_rate
        draws = np.sort([_uniform(len(lengths), self._seed, number, stream) for stream in (3, 4)], axis=0)
        return _Epoch(
            order=order,
            # One more start, past every token, ends the search in the last document.
            starts=_starts((lengths + len(self._fim_ids) * fim)[order]),
            rows=_permutation(self.rows_per_epoch, self._seed, number, 1),
            fim=fim,
            cuts=(draws * (lengths - 1)).astype(np.int64),
        )

    def _views(self, epoch: '_Epoch', place: int) -> list[np.ndarray]:
        """The document at this place of the epoch, as views of the corpus in the order to read them."""
        index = epoch.order[place]
        document = self._documents.tokens[self._documents.offsets[index] : self._documents.offsets[index + 1]]
        if not epoch.fim[index]:
            return [document]
        begin, hole, end = self._fim_ids[:, None]
        text = document[1:-1]
        left, right = epoch.cuts[:, index]
        return [document[:1], begin, text[:left], hole, text[right:], end, text[left:right], document[-1:]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Epoch:
    """Document indices in order, their starts in the stream, row numbers in order; per document: whether it is a
    fill-in-the-middle example, and the two cuts (2, num_documents)."""

    order: np.ndarray
    starts: np.ndarray
    rows: np.ndarray
    fim: np.ndarray
    cuts: np.ndarray


class HeldoutRows(Sequence[Row]):
    """Held-out rows in the order of the documents, none shuffled or rearranged.

    The last row is padded. With `max_rows`, of N rows those numbered `floor(k N / max_rows)` are kept, so they spread
    evenly over the held-out part and are the same in every evaluation.
    """

    def __init__(self, corpus: Corpus, sequence_length: int, max_rows: int | None = None) -> None:
        if sequence_length < 1 or (max_rows is not None and max_rows < 1):
            raise ValueError(f'{sequence_length=} and {max_rows=} must be positive')
        self._documents, self._config, self._length = corpus.heldout, corpus.config, sequence_length
        self._pad_id = corpus.tokenizer.pad_id
        total = math.ceil((len(self._documents.tokens) - 1) / sequence_length)
        kept = total if max_rows is None else min(max_rows, total)
        self._starts = [k * total // kept * sequence_length for k in range(kept)]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Row:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Row `index`; padding has token `pad_id`, segment 0 and weight 0."""
        start = self._starts[index]
        tokens = self._documents.tokens[start : start + self._length + 1]
        offsets = self._documents.offsets
        cuts = offsets[np.searchsorted(offsets, start, 'right') : np.searchsorted(offsets, start + len(tokens), 'left')]
        lengths = np.diff([start, *cuts, start + len(tokens)])
        return _row(tokens, lengths, self._config.mask_documents, self._length + 1 - len(tokens), self._pad_id)


def training_rows(
    corpus: Corpus, sequence_length: int, seed: int, share: int = 0, shares: int = 1, first_row: int = 0
) -> grain.DatasetIterator[Row]:
    """An endless iterator over the rows `first_row + share + k * shares` of the global order, read ahead in threads.

    A run goes on, in any number of shares, with the rows that all of them had taken together as `first_row`.
    """
    if not 0 <= share < shares or first_row < 0:
        raise ValueError(f'{share=} must lie in 0..{shares=} and {first_row=} must not be negative')
    rows = grain.MapDataset.source(PackedRows(corpus, sequence_length, seed))
    return iter(rows.slice(slice(first_row + share, None, shares)).to_iter_dataset(READ_OPTIONS))


def batch(rows: Iterator[Row], size: int) -> Row:
    """The next `size` rows stacked: tokens and segments (size, T + 1), weights (size, T)."""
    return _stack([next(rows) for _ in range(size)])


def heldout_batches(
    corpus: Corpus,
    sequence_length: int,
    size: int,
    max_rows: int | None = None,
    share: int = 0,
    shares: int = 1,
) -> Iterator[Row]:
    """A share of the held-out rows in batches of `size`, as many in every share.

    Share p has rows p, p + shares, ...; places left over are filled with rows of weight 0.
    """
    if not 0 <= share < shares or size < 1:
        raise ValueError(f'{share=} must lie in 0..{shares=} and {size=} must be positive')
    rows = HeldoutRows(corpus, sequence_length, max_rows)
    pad_id = corpus.tokenizer.pad_id
    filler = _row(np.empty(0, np.uint32), [], corpus.config.mask_documents, sequence_length + 1, pad_id)
    for first in range(0, len(rows), size * shares):
        places = range(first + share, first + size * shares, shares)
        yield _stack([rows[place] if place < len(rows) else filler for place in places])


def cut_rows(rows: Row, length: int) -> Row:
    """The rows of a batch cut into sequences of `length` targets, those of a row in its order.

    Raises:
      ValueError: `length` does not divide the rows'.
    """
    count, whole = rows['weights'].shape
    if whole % length:
        raise ValueError(f'{length=} must divide the {whole} targets of a row')
    ahead = {'weights': 0, 'tokens': 1, 'segments': 1}  # of the last target
    starts = range(0, whole, length)
    return {
        name: np.stack([values[:, start : start + length + ahead[name]] for start in starts], axis=1).reshape(
            count * len(starts), -1
        )
        for name, values in rows.items()
    }


def target_bytes(rows: Row, byte_lengths: np.ndarray) -> int:
    """Bytes of text that the weighted targets of a row or a batch stand for, by `Tokenizer.byte_lengths()`."""
    return int((byte_lengths[rows['tokens'][..., 1:]] * (rows['weights'] > 0)).sum())


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """`nats / (ln 2 * num_bytes)`, from the summed loss of all weighted targets and their `target_bytes`.

    Special tokens count in the loss and stand for no bytes. Raises `ValueError` without bytes.
    """
    if num_bytes < 1:
        raise ValueError(f'{num_bytes=} must be positive: the targets stand for no text')
    return nats / (math.log(2) * num_bytes)


def _row(tokens: np.ndarray, lengths: Sequence[int] | np.ndarray, mask: bool, padding: int = 0, pad_id: int = 0) -> Row:
    """A row of `tokens` that belong to documents of these lengths, and padding after them."""
    numbers = np.arange(1, len(lengths) + 1) if mask else np.ones(len(lengths), np.int64)
    segments = np.concatenate([np.repeat(numbers, lengths), np.zeros(padding, np.int64)]).astype(np.int32)
    return {
        'tokens': np.concatenate([tokens, np.full(padding, pad_id)]).astype(np.int32),
        'segments': segments,
        'weights': ((segments[1:] == segments[:-1]) & (segments[1:] > 0)).astype(np.float32),
    }


def _stack(rows: Sequence[Row]) -> Row:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _window(views: Sequence[np.ndarray], start: int, stop: int) -> list[np.ndarray]:
    """The parts of the views that lie at start..stop of their concatenation."""
    parts, position = [], 0
    for view in views:
        parts.append(view[max(start - position, 0) : max(stop - position, 0)])
        position += len(view)
    return parts


def _starts(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """0 and the running sums, int64 (n + 1,)."""
    return np.concatenate([[0], np.cumsum(lengths)], dtype=np.int64)


def _raw(count: int, *key: int) -> np.ndarray:
    """`count` random uint64, by key. Bit generators keep their streams across NumPy releases; `Generator` may not."""
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


def _permutation(count: int, *key: int) -> np.ndarray:
    return np.argsort(_raw(count, *key), kind='stable')


def _uniform(count: int, *key: int) -> np.ndarray:
    """Floats in [0, 1)."""
    return (_raw(count, *key) >> np.uint64(11)) * 2.0**-53


def _chunks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about `CHUNK_CHARACTERS` characters."""
    chunk, characters = [], 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


@contextlib.contextmanager
def _terminal_progress() -> Iterator[Progress]:
    """A reporter that shows a line on a terminal's standard error once two seconds have passed."""
    console = rich.console.Console(stderr=True)
    columns = ('reading text: {task.fields[documents]:,} documents, {task.completed:,} bytes',)
    bar = rich.progress.Progress(*columns, rich.progress.TimeElapsedColumn(), console=console, transient=True)
    task = bar.add_task('', total=None, documents=0)
    began = time.monotonic()

    def report(documents: int, num_bytes: int) -> None:
        bar.update(task, documents=documents, completed=num_bytes)
        if console.is_terminal and not bar.live.is_started and time.monotonic() - began > 2:
            bar.start()

    try:
        yield report
    finally:
        if bar.live.is_started:
            bar.stop()
