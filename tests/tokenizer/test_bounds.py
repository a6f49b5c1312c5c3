"""How few tokens a text can have: fewer than it does have, whatever it is; and how long texts are tokenized."""

from __future__ import annotations

import threading
import unicodedata
from functools import cache

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from engine.core.validation import CONTEXT_LENGTH_EXCEEDED
from engine.errors import RequestError
from engine.loading.resolve import resolve_model
from engine.tokenizer.bounds import COMPOSITION, text_bound
from engine.tokenizer.files import byte_tokenizer
from engine.tokenizer.tokenizer import Tokenizer, load_tokenizer

BYTES = {f"<0x{byte:02X}>": 256 + byte for byte in range(256)}


def with_bytes_to_fall_back_on(normalizer: normalizers.Normalizer | None = None) -> tokenizers.Tokenizer:
    words = {"▁": 0, "▁▁": 1, "a": 2, "aa": 3, "é": 4}
    backend = tokenizers.Tokenizer(
        models.BPE({**words, **BYTES}, [("▁", "▁"), ("a", "a")], byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizer or normalizers.Replace(" ", "▁")
    return backend


@cache
def llama() -> Tokenizer:
    return load_tokenizer(resolve_model("llama"))


TEXTS = st.text() | st.text(st.sampled_from("a \n▁éé\x04\x06\U00100000<|im_end|>1"), max_size=200)


@given(TEXTS)
def test_no_text_has_fewer_tokens(text: str) -> None:
    composing = with_bytes_to_fall_back_on(
        normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
    )
    for backend in (with_bytes_to_fall_back_on(), composing, byte_tokenizer()):
        bound = text_bound(backend)
        assert bound is not None
        assert len(backend.encode(text).ids) >= bound.least_tokens(text)


@given(TEXTS)
def test_bytes_that_the_vocabulary_lacks_do_not_count(text: str) -> None:
    bound = llama().bound
    assert bound is not None
    assert bound.dropped
    assert len(llama().encode(text, add_special_tokens=False)) >= bound.least_tokens(text)


def test_the_bound_is_met() -> None:
    bound = text_bound(with_bytes_to_fall_back_on())
    assert bound is not None
    # The longest name is a byte's, or two marks for blanks, three bytes each.
    assert bound.least_tokens("▁" * 20) == 10 == len(with_bytes_to_fall_back_on().encode("▁" * 20).ids)


def test_characters_are_no_shorter_composed_than_is_said() -> None:
    spelled: dict[str, int] = {}
    composed = []
    for char in map(chr, (*range(0xD800), *range(0xE000, 0x30000))):
        parts = unicodedata.normalize("NFD", char)
        if len(parts) == 1:
            spelled[parts] = max(spelled.get(parts, 0), len(char.encode()))
        if unicodedata.normalize("NFC", char) == char:
            composed.append((char, parts))
    ratios = [sum(spelled[part] for part in parts) / len(char.encode()) for char, parts in composed]
    assert 3 < max(ratios) <= COMPOSITION


def with_word_level() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))


def without_all_bytes() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer(models.BPE({"a": 0}, [], byte_fallback=True))


def that_removes() -> tokenizers.Tokenizer:
    backend = byte_tokenizer()
    split = pre_tokenizers.Split(Regex(" +"), "removed")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel()])
    return backend


def that_joins_blanks() -> tokenizers.Tokenizer:
    return with_bytes_to_fall_back_on(normalizers.Replace(Regex(" {2,}"), "▁"))


def with_a_token_that_swallows() -> tokenizers.Tokenizer:
    backend = byte_tokenizer()
    backend.add_tokens([AddedToken("<mask>", lstrip=True)])
    return backend


@pytest.mark.parametrize(
    "make",
    [with_word_level, without_all_bytes, that_removes, that_joins_blanks, with_a_token_that_swallows],
)
def test_there_is_none_where_text_can_vanish(make: object) -> None:
    assert callable(make)
    assert text_bound(make()) is None


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized() -> None:
    limited = load_tokenizer(resolve_model("llama"))
    limited.max_tokens = 100
    longest = 100 * 81
    assert len(limited.encode(" " * longest)) > 100  # the engine refuses it, which knows the number
    with pytest.raises(RequestError, match="prompt is too long: 101 tokens > 100 maximum") as raised:
        limited.encode(" " * (longest + 1))
    assert (raised.value.field, raised.value.code) == ("prompt", CONTEXT_LENGTH_EXCEEDED)
    assert len(llama().encode(" " * (longest + 1))) > 100


def test_other_threads_run_while_a_long_text_is_tokenized() -> None:
    is_over, num_ticks = threading.Event(), 0

    def tick() -> None:
        nonlocal num_ticks
        while not is_over.wait(0.001):
            num_ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    before = num_ticks
    llama().encode("words and more words, 1234. " * 20_000)
    ticks = num_ticks - before
    is_over.set()
    thread.join()
    # With the interpreter's lock held it is one at the very beginning, if any.
    assert ticks >= 10
