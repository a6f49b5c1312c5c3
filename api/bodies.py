"""The bodies of responses and stream chunks. UNSET fields are left out, None is sent as null."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from engine.core.outputs import FinishReason

ChatFinishReason = FinishReason | Literal["tool_calls", "function_call"]


class PromptTokensDetails(Struct):
    cached_tokens: int


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Timings(Struct):
    """Times of an answer, with llama.cpp's names; as the server's front sees them, waiting included.

    Attributes:
        cache_n: Prompt tokens that came from the prefix cache.
        prompt_n: Prompt tokens that were computed.
        prompt_ms: From the request's arrival to the first token.
        predicted_n: Tokens of the answer.
        predicted_ms: From the first token to the last.
    """

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float | None
    prompt_per_second: float | None
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float | None
    predicted_per_second: float | None


class CompletionLogprobs(Struct):
    """One entry a token; `text_offset` counts characters from the start of the choice's text.

    The first token of an echoed prompt has no log-probabilities.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(Struct):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]
"""A token of the prompt each, by token id: the prompt's own and the likeliest in its place; None for the first."""


class CompletionChoice(Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    matched_stop: int | str | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(Struct):
    """A whole completion, or a chunk of one: OpenAI gives both the same shape."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    object: Literal["text_completion"] = "text_completion"
    usage: Usage | UnsetType | None = UNSET
    timings: Timings | UnsetType = UNSET


class TokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Struct):
    content: list[ChatTokenLogprob]
    refusal: None = None


class FunctionCall(Struct):
    """Attributes:
    arguments: JSON as text.
    """

    name: str
    arguments: str


class FunctionToolCall(Struct, tag_field="type", tag="function"):
    id: str
    function: FunctionCall


class CustomCall(Struct):
    name: str
    input: str


class CustomToolCall(Struct, tag_field="type", tag="custom"):
    id: str
    custom: CustomCall


class ChatMessage(Struct):
    """Attributes:
    content: None where the answer calls tools, and says nothing besides.
    function_call: A call as requests with `functions` know it.
    """

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[FunctionToolCall | CustomToolCall] | UnsetType = UNSET
    function_call: FunctionCall | UnsetType = UNSET


class ChatChoice(Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    stop_reason: int | str | None
    matched_stop: int | str | None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings
    system_fingerprint: str
    object: Literal["chat.completion"] = "chat.completion"
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class FunctionDelta(Struct):
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class CustomDelta(Struct):
    name: str | UnsetType = UNSET
    input: str | UnsetType = UNSET


class ToolCallDelta(Struct):
    """What is new of the call of this index; id, type and name come once, at its beginning."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function", "custom"] | UnsetType = UNSET
    function: FunctionDelta | UnsetType = UNSET
    custom: CustomDelta | UnsetType = UNSET


class ChatDelta(Struct):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET
    function_call: FunctionDelta | UnsetType = UNSET

    # Written out, since every token of a stream asks.
    @property
    def is_empty(self) -> bool:
        return self.content is UNSET and self._is_bare

    @property
    def is_content(self) -> bool:
        """Whether it has a content, and nothing besides."""
        return self.content is not UNSET and self._is_bare

    @property
    def _is_bare(self) -> bool:
        return (
            self.reasoning_content is UNSET
            and self.tool_calls is UNSET
            and self.function_call is UNSET
            and self.role is UNSET
        )


class ChatChunkChoice(Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    matched_stop: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET


class Embedding(Struct):
    """Attributes:
    embedding: Numbers, or their float32 bytes, little-endian, in base64.
    """

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(Struct):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Struct):
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


class Tokens(Struct):
    """A prompt's tokens, as vLLM's /tokenize gives them.

    Attributes:
        token_strs: As the vocabulary writes them; None for ids without a token.
    """

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | UnsetType = UNSET


class Prompt(Struct):
    prompt: str


class Version(Struct):
    version: str


class Model(Struct):
    """Attributes:
    root: What is served under the name `id`: the server's --model.
    """

    id: str
    created: int
    root: str
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: str = "engine"
    parent: None = None


class Status(Struct):
    status: Literal["healthy", "ready"]


class ModelList(Struct):
    """Attributes:
    models: The same, as Codex CLI reads them.
    """

    data: list[Model]
    models: list[Struct] | UnsetType = UNSET
    object: Literal["list"] = "list"
