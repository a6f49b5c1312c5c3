"""The two forms of log-probabilities, for tokens that are not whole characters."""

from __future__ import annotations

import math

from api.logprobs import CompletionLogprobsFormatter, chat_logprobs
from engine.core.outputs import CompletionOutput, Logprob

END = 0
TOKENS = {1: b"a", 2: b"\xe2\x82", 3: b"\xac", 4: b"b", END: b"<end>"}


def sample(*token_ids: int) -> CompletionOutput:
    """Every token is drawn as the second likeliest, after a token that cannot be drawn."""
    logprobs = []
    for token_id in token_ids:
        data = TOKENS[token_id]
        chosen = Logprob(-1.5, 2, data.decode(errors="replace"), data)
        logprobs.append({token_id: chosen, 9: Logprob(-math.inf, 1, "z", b"z")})
    return CompletionOutput(0, token_ids=list(token_ids), logprobs=logprobs)


def test_the_legacy_form_counts_whole_characters_over_chunks() -> None:
    formatter = CompletionLogprobsFormatter(frozenset([END]))
    first, second = formatter.format(sample(1, 2)), formatter.format(sample(3, 4, END))
    assert first is not None
    assert second is not None
    assert first.tokens == ["a", "bytes:\\xe2\\x82"]
    assert second.tokens == ["bytes:\\xac", "b", "<end>"]
    assert first.text_offset + second.text_offset == [0, 1, 1, 2, 3]
    assert first.token_logprobs == [-1.5, -1.5]
    assert first.top_logprobs[0] == {"a": -1.5, "z": -9999.0}


def test_the_chat_form_sorts_by_rank_and_gives_bytes() -> None:
    result = chat_logprobs(sample(2), 2)
    assert result is not None
    [entry] = result.content
    assert (entry.token, entry.logprob, entry.bytes) == ("\ufffd", -1.5, [0xE2, 0x82])
    assert [top.token for top in entry.top_logprobs] == ["z", "\ufffd"]
    assert entry.top_logprobs[0].logprob == -9999.0


def test_none_asked_for_is_none() -> None:
    assert chat_logprobs(CompletionOutput(0, token_ids=[1]), 0) is None
    assert CompletionLogprobsFormatter(frozenset()).format(CompletionOutput(0, token_ids=[1])) is None
