"""Where training text comes from: each source yields named documents in a fixed order.

A document's name is what decides whether it is held out, so it does not depend on the other documents: files are
named by their path below the source, records without a path by a digest of their text.
"""

import codecs
import collections
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import site
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from deepseek_jax.config import check_types, require_positive

logger = logging.getLogger(__name__)

MAX_REPORTED_LINES = 20


@dataclasses.dataclass(frozen=True)
class Document:
    """One text and the name it has whatever other texts there are."""

    name: str
    text: str


@runtime_checkable
class Source(Protocol):
    """Anything with documents; the classes below are the ones that come with the project."""

    def documents(self) -> Iterator[Document]:
        """The documents in a fixed order, none empty. Raises `ValueError` at the end if there were none."""
        ...


@runtime_checkable
class DatedSource(Source, Protocol):
    """A source that can tell, without reading its text, whether it holds what it held at another time."""

    def identity(self) -> str:
        """A text that changes if the source is configured anew, or if a file comes, goes, or changes size or date."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandardLibrary:
    """Every Python file of the running interpreter's standard library, tests included: text on every machine."""

    def documents(self) -> Iterator[Document]:
        """The files by path below the library. Those that are not UTF-8 (test data) are left out and counted."""
        return _read([_standard_library(('.py',))], logging.INFO)

    def identity(self) -> str:
        return _identity(self, [_standard_library(('.py',))])


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstalledPython:
    """Every Python file of the running environment: the standard library's, then those of the installed packages.

    A file is named by its path below the library or below the folder of packages, so the library's bear the names that
    `StandardLibrary` gives them. Of files with the same text, which packages carry with them, the first one counts.

    Attributes:
      suffixes: endings of the files; ('.py', '.pyi', '.md', '.rst', '.txt') takes stubs and documentation too.
      max_bytes: of a file; most of the larger ones are tables that a program wrote.
    """

    suffixes: tuple[str, ...] = ('.py',)
    max_bytes: int = 500_000

    def __post_init__(self) -> None:
        _check_suffixes(self)
        require_positive(self, 'max_bytes')

    def documents(self) -> Iterator[Document]:
        """The files by root and path; those that are not UTF-8, too large, or copies are left out and counted."""
        return _without_copies(_read(self._trees(), logging.INFO, self.max_bytes))

    def identity(self) -> str:
        return _identity(self, self._trees())

    def _trees(self) -> 'list[_Tree]':
        packages = [_Tree(Path(root), self.suffixes, ('__pycache__',)) for root in site.getsitepackages()]
        return [_standard_library(self.suffixes), *packages]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Several:
    """The documents of several sources, one source after the other.

    A text that was there before is left out: under another name it might be held out in one place and trained on in the
    other.
    """

    sources: tuple[Source, ...]

    def __post_init__(self) -> None:
        check_types(self)
        object.__setattr__(self, 'sources', tuple(self.sources))
        if not self.sources or any(isinstance(source, type) for source in self.sources):
            raise ValueError(
                f'Several.sources={self.sources} must be instances, at least one: in gin, (@TextDirectory(),)'
            )

    def documents(self) -> Iterator[Document]:
        """The documents in the order of the sources, copies left out and counted."""
        return _without_copies(document for source in self.sources for document in source.documents())

    def identity(self) -> str:
        return '\n'.join(identity_of(source) for source in self.sources)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextDirectory:
    """Every file below a directory whose name ends in one of `suffixes`."""

    path: str
    suffixes: tuple[str, ...] = ('.txt', '.md', '.rst', '.py')

    def __post_init__(self) -> None:
        _check_suffixes(self)

    def documents(self) -> Iterator[Document]:
        """The files by path below the directory. Those that are not UTF-8 are left out, with one warning.

        Raises `NotADirectoryError` if the path is none.
        """
        return _read([self._tree()], logging.WARNING)

    def identity(self) -> str:
        return _identity(self, [self._tree()])

    def _tree(self) -> '_Tree':
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise NotADirectoryError(f'{root} is not a directory: TextDirectory.path names one that holds text files')
        return _Tree(root, self.suffixes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonLines:
    """One JSON object a line, its text in `field`; `path` is a file, or a directory whose *.jsonl files are read."""

    path: str
    field: str = 'text'

    def __post_init__(self) -> None:
        check_types(self)
        if not self.field:
            raise ValueError(f'JsonLines.field={self.field!r} must name the field that holds the text')

    def documents(self) -> Iterator[Document]:
        """The records in file order, each named by the BLAKE2b digest of its text.

        So neither the order of lines nor the file decides what is held out, and copies of a text share their fate.
        A line that is no UTF-8 JSON object with the field is left out with a warning that names file and line, up
        to a limit, then counted. Raises `FileNotFoundError` if the path is neither file nor directory.
        """
        path = Path(self.path).expanduser()
        kept = skipped = 0
        for file in self._files():
            with file.open('rb') as lines:
                for number, line in enumerate(lines, 1):
                    if not line.strip():
                        continue
                    try:
                        text = _text_of_line(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, self.field)
                    except (ValueError, RecursionError) as error:
                        skipped += 1
                        if skipped <= MAX_REPORTED_LINES:
                            logger.warning('%s:%d: line left out: %s', file, number, error)
                        continue
                    if text:
                        kept += 1
                        yield Document(hashlib.blake2b(text.encode(), digest_size=16).hexdigest(), text)
        if skipped:
            logger.warning('%s: %d lines left out, %d kept', path, skipped, kept)
        if not kept:
            rule = f'one JSON object a line with a non-empty string {self.field!r}'
            raise ValueError(f'{path} holds no documents: expected {rule}, in files *.jsonl if it is a directory')

    def identity(self) -> str:
        return _digest(self, ((file.name, file) for file in self._files()))

    def _files(self) -> list[Path]:
        path = Path(self.path).expanduser()
        if not path.exists():
            raise FileNotFoundError(f'{path} does not exist: JsonLines.path names a file or a directory of *.jsonl')
        return sorted(path.glob('*.jsonl')) if path.is_dir() else [path]


def identity_of(source: Source) -> str:
    """The source's identity. Raises `ValueError` if it is not a `DatedSource`."""
    if not isinstance(source, DatedSource):
        raise ValueError(f'{source} has no method identity(), and so cannot tell whether it has changed')
    return source.identity()


class _Tree(NamedTuple):
    """The files below a root whose names end in one of the suffixes, but those in folders with excluded names."""

    root: Path
    suffixes: tuple[str, ...]
    excluded: Collection[str] = ()

    def files(self) -> list[tuple[str, Path]]:
        """Their paths below the root, sorted, and where they are."""
        names = []
        for directory, subdirectories, files in os.walk(self.root):
            subdirectories[:] = [name for name in subdirectories if name not in self.excluded]
            chosen = (Path(directory) / file for file in files if file.endswith(self.suffixes))
            names += [path.relative_to(self.root).as_posix() for path in chosen]
        return [(name, self.root / name) for name in sorted(names)]


def _standard_library(suffixes: tuple[str, ...]) -> _Tree:
    return _Tree(Path(sysconfig.get_path('stdlib')), suffixes, ('site-packages', 'dist-packages', '__pycache__'))


def _check_suffixes(config: TextDirectory | InstalledPython) -> None:
    check_types(config)
    object.__setattr__(config, 'suffixes', tuple(config.suffixes))
    if not config.suffixes or not all(config.suffixes):
        raise ValueError(f"{type(config).__name__}.suffixes={config.suffixes} must name endings such as '.txt'")


def _text_of_line(line: bytes, field: str) -> str:
    record = json.loads(line.decode())
    if not isinstance(record, dict) or not isinstance(text := record.get(field), str):
        raise ValueError(f'not an object with a string {field!r}')
    text.encode()  # escapes can spell lone surrogates, which are no text
    return text


def _read(trees: Sequence[_Tree], level: int, max_bytes: int | None = None) -> Iterator[Document]:
    """The non-empty UTF-8 files of the trees; how many were left out, and why, is logged at `level`."""
    where = ', '.join(str(tree.root) for tree in trees)
    left_out = collections.Counter()
    seen = kept = 0
    for name, file in itertools.chain.from_iterable(tree.files() for tree in trees):
        seen += 1
        if not file.is_file():
            continue
        if max_bytes is not None and file.stat().st_size > max_bytes:
            left_out[f'larger than {max_bytes} bytes'] += 1
            continue
        try:
            # Not read_text: line ends stay as they are.
            text = file.read_bytes().decode()
            name.encode()
        except UnicodeError:
            left_out['not UTF-8'] += 1
            continue
        if text:
            kept += 1
            yield Document(name, text)
    for reason, count in left_out.items():
        logger.log(level, '%s: %d of %d files left out because they are %s', where, count, seen, reason)
    if not kept:
        suffixes = ', *'.join(trees[0].suffixes)
        raise ValueError(f'{where} holds no documents: expected non-empty UTF-8 files named *{suffixes}')


def _without_copies(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents whose text was not there before; how many were left out is logged."""
    digests: set[bytes] = set()
    copies = 0
    for document in documents:
        digest = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
        if digest in digests:
            copies += 1
        else:
            digests.add(digest)
            yield document
    if copies:
        logger.info('%d documents left out because another one has the same text', copies)


def _identity(source: Source, trees: Sequence[_Tree]) -> str:
    return _digest(source, itertools.chain.from_iterable(tree.files() for tree in trees))


def _digest(source: Source, files: Iterable[tuple[str, Path]]) -> str:
    """The source as it is configured, and a digest of the names, sizes and dates of its files."""
    digest = hashlib.blake2b(digest_size=16)
    for name, file in files:
        if file.is_file():
            status = file.stat()
            digest.update(repr((name, status.st_size, status.st_mtime_ns)).encode())
    return f'{source} {digest.hexdigest()}'
