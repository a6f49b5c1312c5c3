"""What a user gets back: RequestOutput and its parts, with the field names vLLM's users know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class Logprob:
    """The log-probability of one token, before penalties and temperature.

    Attributes:
        logprob: Natural logarithm of the token's probability.
        rank: 1 for the likeliest token.
        decoded_token: The token's text; may be a fragment of a character (then "\\ufffd").
        token_bytes: The token's own bytes.
    """

    logprob: float
    rank: int
    decoded_token: str
    token_bytes: bytes


@dataclass(frozen=True, slots=True)
class CalledTool:
    """A call of a tool.

    Attributes:
        arguments: JSON as text; cut off where the answer is.
    """

    name: str
    arguments: str


@dataclass(slots=True)
class ChatAnswer:
    """What an answer of a chat says.

    Attributes:
        content: The text, without reasoning and calls.
        reasoning_content: What the model thought before.
    """

    content: str = ""
    reasoning_content: str = ""
    tool_calls: list[CalledTool] = field(default_factory=list)


@dataclass(slots=True)
class CompletionOutput:
    """One sample of a request: whole when it comes from `LLM`, what is new when it comes from a stream.

    Attributes:
        index: Which of the n samples this is.
        text: Detokenized text, complete characters only, stop strings cut.
        token_ids: Generated token ids, the stop token included.
        logprobs: Per token of `token_ids`: {token id: Logprob} of the chosen and the likeliest tokens,
            the chosen one first; None if not asked for.
        cumulative_logprob: The sum of the log-probabilities of `token_ids`; None if they were not asked for.
        finish_reason: None while the sample runs.
        stop_reason: The stop string or stop token id that ended it; None for end-of-sequence.
        answer: From `LLM.chat` alone: the text read as an answer.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    answer: ChatAnswer | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a model holds a continuation of a prompt.

    Attributes:
        token_ids: The continuation's tokens.
        token_logprobs: The log-probability of each, given all tokens before it.
        logprob: Their sum.
        is_greedy: Whether each is the likeliest token in its place, or as likely.
    """

    token_ids: list[int]
    token_logprobs: list[float]
    logprob: float
    is_greedy: bool


@dataclass(slots=True)
class EmbeddingOutput:
    """Attributes:
    embedding: float32 numbers; none where the request failed.
    """

    embedding: list[float]


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """What came of a request for an embedding.

    Attributes:
        prompt: The prompt's text, or None if it came as token ids.
        num_cached_tokens: Prompt tokens found in the prefix cache.
        error: Why the request failed, if it did.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    finished: bool = True
    num_cached_tokens: int = 0
    error: str | None = None


@dataclass(slots=True)
class RequestOutput:
    """The state of one request.

    Attributes:
        prompt: The prompt's text, or None if it came as token ids.
        num_cached_tokens: Prompt tokens found in the prefix cache.
        prompt_logprobs: Per token of the prompt: {token id: Logprob} of itself and the likeliest tokens in its place,
            itself first, and None for the first token; None if not asked for. In a stream they come once, with the
            first token, or with the end where there is none.
        outputs: The samples, by index; in a stream only those with something new.
        finished: True once every sample has a finish_reason.
        error: Why the request failed, if it did (finish_reason "error").
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    error: str | None = None
