"""Where training text comes from: each source yields named documents in a fixed order.

A document's name is what decides whether it is held out, so it does not depend on the other documents: files are
named by their path below the source, records without a path by a digest of their text.
"""

import codecs
import dataclasses
import hashlib
import json
import logging
import os
import sysconfig
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from deepseek_jax.config import check_types

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandardLibrary:
    """Every Python file of the running interpreter's standard library, tests included: text on every machine."""

    def documents(self) -> Iterator[Document]:
        """The files by path below the library. Those that are not UTF-8 (test data) are left out and counted."""
        root = Path(sysconfig.get_path('stdlib'))
        return _read_tree(root, ('.py',), {'site-packages', 'dist-packages', '__pycache__'}, logging.INFO)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextDirectory:
    """Every file below a directory whose name ends in one of `suffixes`."""

    path: str
    suffixes: tuple[str, ...] = ('.txt', '.md', '.rst', '.py')

    def __post_init__(self) -> None:
        check_types(self)
        object.__setattr__(self, 'suffixes', tuple(self.suffixes))
        if not self.suffixes or not all(self.suffixes):
            raise ValueError(f"TextDirectory.suffixes={self.suffixes} must name endings such as '.txt'")

    def documents(self) -> Iterator[Document]:
        """The files by path below the directory. Those that are not UTF-8 are left out, with one warning.

        Raises `NotADirectoryError` if the path is none.
        """
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise NotADirectoryError(f'{root} is not a directory: TextDirectory.path names one that holds text files')
        return _read_tree(root, self.suffixes, (), logging.WARNING)


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
        if not path.exists():
            raise FileNotFoundError(f'{path} does not exist: JsonLines.path names a file or a directory of *.jsonl')
        files = sorted(path.glob('*.jsonl')) if path.is_dir() else [path]
        kept = skipped = 0
        for file in files:
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


def _text_of_line(line: bytes, field: str) -> str:
    record = json.loads(line.decode())
    if not isinstance(record, dict) or not isinstance(text := record.get(field), str):
        raise ValueError(f'not an object with a string {field!r}')
    text.encode()  # escapes can spell lone surrogates, which are no text
    return text


def _read_tree(root: Path, suffixes: tuple[str, ...], excluded: Collection[str], level: int) -> Iterator[Document]:
    """The non-empty UTF-8 files below `root`, by path; how many were left out is logged at `level`."""
    names = []
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in excluded]
        names += [(Path(directory) / file).relative_to(root).as_posix() for file in files if file.endswith(suffixes)]
    kept = skipped = 0
    for name in sorted(names):
        if not (file := root / name).is_file():
            continue
        try:
            # Not read_text: line ends stay as they are.
            text = file.read_bytes().decode()
            name.encode()
        except UnicodeError:
            skipped += 1
            continue
        if text:
            kept += 1
            yield Document(name, text)
    if skipped:
        logger.log(level, '%s: %d of %d files left out because they are not UTF-8', root, skipped, len(names))
    if not kept:
        raise ValueError(f'{root} holds no documents: expected non-empty UTF-8 files named *{", *".join(suffixes)}')
