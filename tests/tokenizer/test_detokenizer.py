"""Text from tokens: whole and piece by piece, for tokens that are fragments of characters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models

from engine.tokenizer.files import TokenizerSettings
from engine.tokenizer.tokenizer import IncrementalDetokenizer, Tokenizer

SETTINGS = TokenizerSettings(special_tokens={"bos_token": "<s>"}, eos_token_ids=(1,), chat_templates={})
ADDED = [
    AddedToken("<s>", special=True),
    AddedToken("</s>", special=True),
    AddedToken("<｜tag｜>", special=False),
]
WORDS = [" ", "a", " b", "é", "語", " x語", "\n", "👩", "'s", "▁"]


def byte_level() -> tokenizers.Tokenizer:
    """Every byte a token, and a few words."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [alphabet.pre_tokenize_str(word)[0][0] for word in WORDS]
    pieces = dict.fromkeys([*tokenizers.pre_tokenizers.ByteLevel.alphabet(), *words])
    backend = tokenizers.Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(ADDED)
    return backend


def sentencepiece(*last_steps: decoders.Decoder) -> tokenizers.Tokenizer:
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + [word.replace(" ", "▁") for word in WORDS]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last_steps]
    )
    backend.add_tokens(ADDED)
    return backend


BACKENDS = {
    "byte-level": byte_level(),
    "gemma": sentencepiece(),
    "llama2": sentencepiece(decoders.Strip(" ", 1, 0)),
}
TOKENIZERS = {name: Tokenizer(backend, SETTINGS) for name, backend in BACKENDS.items()}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]


def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Any ids, more of bytes above 0x7F and of words than chance gives, and some without a token."""
    size = tokenizer.vocab_size
    return st.lists(
        st.integers(0, size - 1) | st.integers(size - 16, size + 1) | st.integers(128, 255), max_size=24
    )


def for_ids(tokenizer: Tokenizer, check: Callable[..., None], lists: int) -> None:
    strategies = [ids_of(tokenizer)] * lists
    settings(deadline=None, max_examples=200)(given(*strategies, st.booleans())(check))()


def test_pieces_joined_are_the_text(tokenizer: Tokenizer) -> None:
    def check(ids: list[int], skip: bool) -> None:
        stream = IncrementalDetokenizer(tokenizer, [], skip)
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids, skip)

    for_ids(tokenizer, check, 1)


def test_output_continues_the_text_of_the_prompt(tokenizer: Tokenizer) -> None:
    def check(prompt: list[int], output: list[int], skip: bool) -> None:
        # The prompt's own text, as far as its characters are complete.
        before = IncrementalDetokenizer(tokenizer, [], skip)
        prompt_text = "".join(map(before.push, prompt))
        stream = IncrementalDetokenizer(tokenizer, prompt, skip)
        text = "".join(map(stream.push, output)) + stream.flush()
        assert prompt_text + text == tokenizer.decode(prompt + output, skip)

    for_ids(tokenizer, check, 2)


def test_pieces_hold_complete_characters(tokenizer: Tokenizer) -> None:
    """For valid text no piece has a replacement character, and nothing is left at the end."""

    @settings(deadline=None, max_examples=200)
    @given(st.text(max_size=20))
    def check(text: str) -> None:
        if "\ufffd" in text:
            return
        first = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"a")
        byte_ids = {tokenizer.token_bytes(i): i for i in range(256)}
        stream = IncrementalDetokenizer(tokenizer, [first], True)
        pieces = [stream.push(byte_ids[bytes([byte])]) for byte in text.encode()]
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) == text
        assert stream.flush() == ""

    check()


@pytest.mark.parametrize("name", BACKENDS)
def test_decode_agrees_with_tokenizers_where_bytes_are_valid(name: str) -> None:
    """`tokenizers` replaces whole runs of byte tokens that are not UTF-8; a stream cannot look ahead."""
    tokenizer, backend = TOKENIZERS[name], BACKENDS[name]

    def check(ids: list[int], skip: bool) -> None:
        text = tokenizer.decode(ids, skip)
        if name == "byte-level" or "\ufffd" not in text:
            known = [token_id for token_id in ids if token_id < tokenizer.vocab_size]
            assert text == backend.decode(known, skip_special_tokens=skip)

    for_ids(tokenizer, check, 1)


def test_leading_space_belongs_to_the_prompt() -> None:
    tokenizer = TOKENIZERS["llama2"]
    b = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b" b")
    bos = tokenizer.bos_token_id
    assert bos is not None
    assert tokenizer.decode([b, b]) == "b b"
    assert tokenizer.decode([bos, b, b]) == "b b"
    assert tokenizer.decode([bos, b, b], skip_special_tokens=False) == "<s> b b"
    assert IncrementalDetokenizer(tokenizer, [], True).push(b) == "b"
    assert IncrementalDetokenizer(tokenizer, [bos], True).push(b) == "b"
    assert IncrementalDetokenizer(tokenizer, [bos], False).push(b) == " b"
    assert IncrementalDetokenizer(tokenizer, [bos, b], True).push(b) == " b"


def test_a_character_begun_by_the_prompt_is_finished_by_the_output() -> None:
    tokenizer = TOKENIZERS["gemma"]
    first, second, third = "語".encode()
    stream = IncrementalDetokenizer(tokenizer, [first, second], True)
    assert stream.push(third) == "語"
    stream = IncrementalDetokenizer(tokenizer, [], True)
    assert [stream.push(first), stream.push(second), stream.flush()] == ["", "", "\ufffd"]
