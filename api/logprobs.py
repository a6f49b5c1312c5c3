"""Log-probabilities in the two forms that OpenAI's endpoints give them."""

from __future__ import annotations

import codecs

from api.bodies import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TokenLogprob
from engine.core.outputs import CompletionOutput, Logprob

# JSON has no infinity; OpenAI writes this for a token that cannot be drawn.
MIN_LOGPROB = -9999.0


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

    def format(self, sample: CompletionOutput) -> CompletionLogprobs | None:
        """The log-probabilities of the tokens in `sample`; None if they were not asked for."""
        if sample.logprobs is None:
            return None
        result = CompletionLogprobs([], [], [], [])
        for token_id, entries in zip(sample.token_ids, sample.logprobs, strict=True):
            chosen = entries[token_id]
            result.tokens.append(self._name(token_id, chosen))
            result.token_logprobs.append(_finite(chosen.logprob))
            result.top_logprobs.append(
                {self._name(each, entry): _finite(entry.logprob) for each, entry in entries.items()}
            )
            result.text_offset.append(self._text_offset)
            if token_id not in self._silent_token_ids:
                self._text_offset += len(self._decoder.decode(chosen.token_bytes))
        return result

    def _name(self, token_id: int, entry: Logprob) -> str:
        return _id_text(token_id) if self._as_ids else _legacy_text(entry)


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


def _legacy_text(entry: Logprob) -> str:
    """The token's text; fragments of characters by their bytes, or they would share one key."""
    try:
        return entry.token_bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry.token_bytes)
