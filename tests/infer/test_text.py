import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.tokenizer import ByteTokenizer, DecodeStream
from infer.text import TextStream


class Pieces(DecodeStream):
    """A decode stream whose ids are places in a list of pieces."""

    def __init__(self, pieces, rest=''):
        self.pieces, self.rest = pieces, rest

    def step(self, token_id):
        return self.pieces[token_id]

    def flush(self):
        return self.rest


def run(pieces, stop, rest=''):
    """What comes out at each step and at the end, and whether a stop string was found."""
    stream = TextStream(Pieces(pieces, rest), stop)
    out = []
    for token_id in range(len(pieces)):
        out.append(stream.step(token_id))
        if stream.stopped:
            return out, True
    out.append(stream.flush())
    return out, stream.stopped


def cut(text, stop):
    """The text up to the stop string that is complete first, read one character at a time."""
    for end in range(len(text) + 1):
        if found := [string for string in stop if text[:end].endswith(string)]:
            return text[: end - max(map(len, found))], True
    return text, False


ALPHABET = st.text('ab', max_size=12)


@given(
    st.lists(st.text('ab', max_size=4), max_size=8),
    st.lists(st.text('ab', min_size=1, max_size=4), max_size=3),
    ALPHABET,
)
def test_text_stream_cuts_where_a_reader_of_characters_would(pieces, stop, rest):
    out, stopped = run(pieces, stop, rest)
    assert (''.join(out), stopped) == cut(''.join(pieces) + rest, stop)


@given(st.lists(st.text('ab', max_size=4), max_size=8), st.lists(st.text('ab', min_size=1, max_size=4), max_size=3))
def test_text_stream_holds_back_only_what_may_become_a_stop_string(pieces, stop):
    out, _ = run(pieces, stop)
    shown = ''
    for count, text in enumerate(out[:-1], start=1):
        shown += text
        read = ''.join(pieces[:count])
        starts = [n for n in range(len(read) + 1) if any(string.startswith(read[n:]) for string in stop)]
        assert shown == read[: min([*starts, len(read)])]


def test_text_stream_examples():
    assert run(['a', 'bc', 'd'], ['bcd']) == (['a', '', ''], True)
    assert run(['a', 'bc', 'e'], ['bcd']) == (['a', '', 'bce', ''], False)
    assert run(['a', 'bc'], ['bcd']) == (['a', '', 'bc'], False)
    assert run(['xaay'], ['aa', 'aay']) == (['x'], True)
    assert run(['one', ' two'], []) == (['one', ' two', ''], False)


@pytest.mark.parametrize(
    ('text', 'stop', 'expected'),
    [('h\u00e9 \u6f22\u5b57 \U0001f600!', (), None), ('a\u6f22\u5b57b', ('\u5b57',), 'a\u6f22')],
)
def test_text_stream_shows_multibyte_characters_whole(text, stop, expected):
    tokenizer = ByteTokenizer()
    stream = TextStream(tokenizer.stream(), stop)
    out = [stream.step(token_id) for token_id in tokenizer.encode(text)]
    assert ''.join(out) + stream.flush() == (text if expected is None else expected)
    assert all(len(piece) <= 1 and piece != '\ufffd' for piece in out)


def test_text_stream_ends_a_cut_character_with_a_replacement():
    stream = TextStream(ByteTokenizer().stream())
    assert [stream.step(token_id) for token_id in '\u6f22'.encode()[:2]] == ['', '']
    assert stream.flush() == '\ufffd'
