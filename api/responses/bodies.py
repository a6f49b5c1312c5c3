"""The bodies of answers. UNSET fields are left out, None is sent as null."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType

from api.bodies import ChatTokenLogprob

Status = Literal["in_progress", "completed", "incomplete", "failed"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(Struct, kw_only=True):
    text: str = ""
    annotations: list[Any] = []
    logprobs: list[ChatTokenLogprob] = []
    type: Literal["output_text"] = "output_text"


class ReasoningText(Struct, kw_only=True):
    text: str = ""
    type: Literal["reasoning_text"] = "reasoning_text"


class OutputMessage(Struct, kw_only=True):
    id: str
    content: list[OutputText] = []
    role: Literal["assistant"] = "assistant"
    status: ItemStatus = "in_progress"
    type: Literal["message"] = "message"


class ReasoningItem(Struct, kw_only=True):
    id: str
    summary: list[Any] = []
    content: list[ReasoningText] = []
    encrypted_content: str | UnsetType = UNSET
    status: ItemStatus = "in_progress"
    type: Literal["reasoning"] = "reasoning"


class FunctionCallItem(Struct, kw_only=True):
    """Attributes:
    arguments: JSON as text.
    """

    id: str
    call_id: str
    name: str
    arguments: str = ""
    namespace: str | UnsetType = UNSET
    status: ItemStatus = "in_progress"
    type: Literal["function_call"] = "function_call"


class CustomCallItem(Struct, kw_only=True):
    """OpenAI gives it no status."""

    id: str
    call_id: str
    name: str
    input: str = ""
    namespace: str | UnsetType = UNSET
    type: Literal["custom_tool_call"] = "custom_tool_call"


OutputItem = OutputMessage | ReasoningItem | FunctionCallItem | CustomCallItem


class InputTokensDetails(Struct):
    """Attributes:
    cache_write_tokens: Those that a cache is asked to keep; here it keeps all, unasked.
    """

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(Struct):
    reasoning_tokens: int


class ResponseUsage(Struct):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(Struct):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseFailure(Struct):
    message: str
    code: Literal["server_error"] = "server_error"


class ReasoningSettings(Struct):
    effort: str | None
    summary: None = None


class Response(Struct, kw_only=True):
    id: str
    created_at: int
    model: str
    status: Status = "in_progress"
    object: Literal["response"] = "response"
    output: list[OutputItem] = []
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    usage: ResponseUsage | None = None
    completed_at: int | None = None
    background: Literal[False] = False
    service_tier: Literal["default"] = "default"
    # What the request gave, or the default that stood in for it.
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ReasoningSettings
    safety_identifier: str | None
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: str
    user: str | None


class DeletedResponse(Struct):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class InputItemList(Struct, kw_only=True):
    """A page of the items of an input; the ids of its ends are empty where it holds none."""

    data: list[dict[str, Any]]
    first_id: str
    last_id: str
    has_more: bool
    object: Literal["list"] = "list"
