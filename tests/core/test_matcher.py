"""llguidance through its C interface: laid out as it is, and other threads run while it sorts a vocabulary."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor

import llguidance
import numpy as np
import pytest

from engine.core.matcher import Limits, Matcher, TokenTrie, Vocabulary, grammar_problem

BYTES = [bytes([byte]) for byte in range(256)]
END = 256


@pytest.fixture(scope="module")
def trie() -> TokenTrie:
    return TokenTrie(Vocabulary.of([*BYTES, b"<end>", b"<call>"], [END, 257]), 260, [END])


def allowed(matcher: Matcher) -> set[int]:
    mask = np.empty(9, np.int32)
    matcher.fill(mask)
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def test_its_limits_are_read_where_it_writes_them(trie: TokenTrie) -> None:
    expected, limits = llguidance.LLParserLimits(verbose_errors=False), trie.constraint().limits
    for name, _ in Limits._fields_:
        assert getattr(limits, name) == getattr(expected, name)


def test_a_matcher_goes_as_far_as_its_grammar(trie: TokenTrie) -> None:
    matcher = Matcher(trie, 'start: "a" ("b" | <call>)')
    assert allowed(matcher) == {ord("a")}
    assert not matcher.consume(ord("a"))
    other = matcher.copy()
    assert allowed(matcher) == {ord("b"), 257}
    assert other.consume(257)
    assert allowed(other) == {END}
    with pytest.raises(ValueError, match="token"):
        matcher.consume(ord("c"))
    with pytest.raises(ValueError, match="token"):
        matcher.fill(np.empty(9, np.int32))
    fresh = Matcher(trie, 'start: "a" "b"')
    fresh.consume_all([ord("a"), ord("b")])
    assert allowed(fresh) == {END}
    with pytest.raises(ValueError, match="token"):
        Matcher(trie, 'start: "a" "b"').consume_all([ord("b")])


def test_a_model_without_an_end_gets_one_beyond_its_vocabulary() -> None:
    trie = TokenTrie(Vocabulary.of(BYTES, []), 256, [])
    assert trie.num_tokens == 257
    matcher = Matcher(trie, 'start: "a"')
    assert matcher.consume(ord("a"))
    assert allowed(matcher) == {256}


@pytest.mark.parametrize("end", [[END], [256, 259]])
def test_every_end_may_come_where_a_form_may_end(end: list[int]) -> None:
    tokens = [*BYTES, b"<end>", b"", b"", b"<turn>"]
    matcher = Matcher(TokenTrie(Vocabulary.of(tokens, [256, 259]), 260, end), 'start: "a"*')
    assert allowed(matcher) == {ord("a"), *end}


def test_what_cannot_be_kept_is_said(trie: TokenTrie) -> None:
    assert grammar_problem(trie, "lark", 'start: "a"') is None
    assert "unknown" in str(grammar_problem(trie, "lark", "start: what")).lower()
    assert "format" in str(grammar_problem(trie, "json_schema", '{"type": "string", "format": "no"}'))
    # C would read as far as the NUL, and keep another grammar.
    assert "NUL" in str(grammar_problem(trie, "lark", 'start: "a" // \0'))
    with pytest.raises(ValueError, match="NUL"):
        Matcher(trie, 'start: "a" // \0')
    with pytest.raises(ValueError, match="what"):
        Matcher(trie, "start: what")


def test_other_threads_run_while_a_vocabulary_is_sorted() -> None:
    """This one has a core as long as the other; were the GIL held, it would wait for it all that time."""
    source = random.Random(0)
    words = {bytes(source.choices(b"abcdefghij", k=source.randrange(2, 9))) for _ in range(60_000)}
    vocabulary = Vocabulary.of([*BYTES, *sorted(words)], [])

    def make() -> float:
        TokenTrie(vocabulary, len(words) + 256, [0])
        return time.thread_time()

    TokenTrie(Vocabulary.of(BYTES, []), 256, [0])  # imports the package
    start = time.thread_time()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(make)
        while not future.done():
            pass
        assert time.thread_time() - start > 0.5 * future.result()
