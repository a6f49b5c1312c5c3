"""Log-probabilities in the two forms that OpenAI's endpoints give them."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from api.bodies import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
)
from engine.core.outputs import CompletionOutput, Logprob

# JSON has no infinity; OpenAI writes this for a token that cannot be drawn.
MIN_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True)
class EchoedPrompt:
    """A prompt that stands before what was generated.

    Attributes:
        text: As it is echoed.
        first: Bytes of the first token, which has no log-probabilities.
        num_top: How many of the likeliest tokens are shown.
    """

    text: str
    token_ids: Sequence[int]
    first: bytes
    logprobs: Sequence[dict[int, Logprob] | None]
    num_top: int


class CompletionLogprobsFormatter:
    """The legacy form, for one choice, chunk by chunk.

    Args:
        silent_token_ids: Tokens that add nothing to the text.
        as_ids: Tokens are named by their ids.
    """

    def __init__(self, silent_token_ids: frozenset[int], as_ids: bool = False) -> None:
        self._as_ids = as_ids
        self._text_offset = 0
        self._silent_token_ids = silent_token_ids
        # A character may be spread over several tokens; it counts once, at its last byte.
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")

    def format(
        self, sample: CompletionOutput, echoed: EchoedPrompt | None = None
    ) -> CompletionLogprobs | None:
        """The log-probabilities of the echoed prompt and the tokens in `sample`; None if they were not asked for."""
        if sample.logprobs is None:
            return None
        result = CompletionLogprobs([], [], [], [])
        if echoed is not None:
            self._add_prompt(result, echoed)
        for token_id, entries in zip(sample.token_ids, sample.logprobs, strict=True):
            chosen = entries[token_id]
            result.tokens.append(self._name(token_id, chosen.token_bytes))
            result.token_logprobs.append(_finite(chosen.logprob))
            result.top_logprobs.append(self._named(entries))
            result.text_offset.append(self._text_offset)
            if token_id not in self._silent_token_ids:
                self._text_offset += len(self._decoder.decode(chosen.token_bytes))
        return result

    def _add_prompt(self, result: CompletionLogprobs, echoed: EchoedPrompt) -> None:
        offset = 0
        for token_id, entries in zip(echoed.token_ids, echoed.logprobs, strict=True):
            data = echoed.first if entries is None else entries[token_id].token_bytes
            result.tokens.append(self._name(token_id, data))
            result.token_logprobs.append(None if entries is None else _finite(entries[token_id].logprob))
            result.top_logprobs.append(
                None if entries is None else self._named(_likeliest(entries, echoed.num_top))
            )
            result.text_offset.append(offset)
            offset += len(self._decoder.decode(data))
        # What a tokenizer puts before a text, such as a token for its beginning, is not in the text.
        num_added = max(0, offset - len(echoed.text))
        result.text_offset = [max(0, offset - num_added) for offset in result.text_offset]
        self._text_offset = len(echoed.text)

    def _named(self, entries: dict[int, Logprob]) -> dict[str, float]:
        return {
            self._name(token_id, entry.token_bytes): _finite(entry.logprob)
            for token_id, entry in entries.items()
        }

    def _name(self, token_id: int, data: bytes) -> str:
        return _id_text(token_id) if self._as_ids else _legacy_text(data)


def prompt_logprobs_of(logprobs: Sequence[dict[int, Logprob] | None], num_top: int) -> PromptLogprobs:
    """A prompt's log-probabilities as vLLM gives them, with so many of the likeliest tokens."""
    return [None if entries is None else _prompt_entries(entries, num_top) for entries in logprobs]


def _prompt_entries(entries: dict[int, Logprob], num_top: int) -> dict[int, PromptLogprob]:
    return {
        token_id: PromptLogprob(_finite(entry.logprob), entry.rank, entry.decoded_token)
        for token_id, entry in _likeliest(entries, num_top).items()
    }


def _likeliest(entries: dict[int, Logprob], num_top: int) -> dict[int, Logprob]:
    """The first entry, which is the token's own, and so many of the likeliest."""
    return {
        token_id: entry
        for place, (token_id, entry) in enumerate(entries.items())
        if place == 0 or entry.rank <= num_top
    }


def chat_logprobs(
    sample: CompletionOutput, num_top_logprobs: int, as_ids: bool = False
) -> ChatLogprobs | None:
    """The chat form of the tokens in `sample`; None if it was not asked for.

    Args:
        as_ids: Tokens are named by their ids; `bytes` are theirs all the same.
    """
    if sample.logprobs is None:
        return None
    content = []
    for token_id, entries in zip(sample.token_ids, sample.logprobs, strict=True):
        chosen = entries[token_id]
        likeliest = sorted(entries.items(), key=lambda item: item[1].rank)[:num_top_logprobs]
        content.append(
            ChatTokenLogprob(
                token=_id_text(token_id) if as_ids else chosen.decoded_token,
                logprob=_finite(chosen.logprob),
                bytes=list(chosen.token_bytes),
                top_logprobs=[
                    TokenLogprob(
                        _id_text(each) if as_ids else entry.decoded_token,
                        _finite(entry.logprob),
                        list(entry.token_bytes),
                    )
                    for each, entry in likeliest
                ],
            )
        )
    return ChatLogprobs(content)


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)


def _id_text(token_id: int) -> str:
    return f"token_id:{token_id}"


def _legacy_text(data: bytes) -> str:
    """A token's text; fragments of characters by their bytes, or they would share one key."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
