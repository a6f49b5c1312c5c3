"""The bodies of requests. None means not given; members without a field here are accepted and counted.

A field of type Any is accepted without effect, or refused as NEUTRAL_VALUES says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from msgspec import Struct

from api.errors import ApiError
from api.protocol import Integer, check_neutral, convert_member, decode_body, without_ignored
from api.unknown_members import find_unknown

NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "moderation": (),
    "prompt": (),
}
"""Fields that OpenAI knows and this server does not act on, with the values that ask for nothing."""

INCLUDED = (
    "reasoning.encrypted_content", "message.output_text.logprobs", "code_interpreter_call.outputs",
    "computer_call_output.output.image_url", "file_search_call.results", "message.input_image.image_url",
    "web_search_call.action.sources", "web_search_call.results",
)  # fmt: skip
"""Values of `include`: the first two are had here, the others say more of what is never in an answer here."""

SAMPLING_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "ignore_eos",
)  # fmt: skip
"""Fields of `ResponseRequest` that are sampling parameters as they stand."""


class TextConfig(Struct, kw_only=True):
    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ReasoningConfig(Struct, kw_only=True):
    effort: str | None = None

    # There is no summary, whatever is asked for.
    summary: Any = None
    generate_summary: Any = None


class ResponseRequest(Struct, kw_only=True):
    """POST /v1/responses. `api.responses.items` reads the input, `api.responses.tools` the tools."""

    model: str | None = None
    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    include: list[str] | None = None
    truncation: str | None = None
    metadata: dict[str, str] | None = None

    max_output_tokens: Integer | None = None
    top_logprobs: Integer | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    temperature: float | None = None
    top_p: float | None = None

    # Beyond OpenAI, with vLLM's names.
    top_k: Integer | None = None
    min_p: float | None = None
    seed: Integer | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    priority: Integer | None = None
    cache_salt: str | None = None
    timeout: float | None = None

    # Given back as they came.
    max_tool_calls: Integer | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None

    access_programs: Any = None
    background: Any = None
    background_options: Any = None
    client_metadata: Any = None
    context_management: Any = None
    conversation: Any = None
    image: Any = None
    moderation: Any = None
    prompt: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    service_tier: Any = None
    stream_options: Any = None

    @property
    def stores(self) -> bool:
        return self.store is not False

    @property
    def has_encrypted_reasoning(self) -> bool:
        return "reasoning.encrypted_content" in (self.include or ())

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are told beside the chosen one; None: nothing is."""
        if self.top_logprobs or "message.output_text.logprobs" in (self.include or ()):
            return self.top_logprobs or 0
        return None


class Part(Struct, kw_only=True):
    """A part of a content; `type` says which members it has."""

    type: str = "input_text"
    text: str | None = None
    refusal: str | None = None
    encrypted_content: str | None = None
    annotations: Any = None
    logprobs: Any = None
    prompt_cache_breakpoint: Any = None


Content = str | list[Part]


class Item(Struct, kw_only=True):
    """What items of every type may have."""

    type: str = "message"
    id: str | None = None
    status: Any = None


class Message(Item, kw_only=True):
    role: str
    content: Content
    phase: Any = None


class FunctionCall(Item, kw_only=True):
    """Attributes:
    arguments: JSON as text.
    """

    call_id: str
    name: str
    arguments: str
    namespace: str | None = None
    caller: Any = None


class CustomCall(Item, kw_only=True):
    call_id: str
    name: str
    input: str
    namespace: str | None = None
    caller: Any = None


class CallOutput(Item, kw_only=True):
    call_id: str
    output: Content
    name: Any = None
    namespace: Any = None
    caller: Any = None


class Reasoning(Item, kw_only=True):
    summary: list[Part] | None = None
    content: list[Part] | None = None
    encrypted_content: str | None = None


class AgentMessage(Item, kw_only=True):
    """What one agent of Codex tells another."""

    author: str | None = None
    recipient: str | None = None
    content: Content | None = None


class AdditionalTools(Item, kw_only=True):
    """Tools that are there from now on."""

    tools: list[dict[str, Any]]
    role: Any = None


class ToolSearchOutput(Item, kw_only=True):
    """Tools that a search has found."""

    tools: list[dict[str, Any]]
    call_id: str | None = None
    execution: Any = None


class BuiltInCall(Item, kw_only=True):
    """A call of a tool that OpenAI knows by its type; its members are the type's own."""

    call_id: str | None = None
    execution: Any = None


class BuiltInOutput(Item, kw_only=True):
    call_id: str | None = None
    output: Any = None


ITEMS: dict[str, type[Item]] = {
    "message": Message,
    "function_call": FunctionCall,
    "function_call_output": CallOutput,
    "custom_tool_call": CustomCall,
    "custom_tool_call_output": CallOutput,
    "reasoning": Reasoning,
    "agent_message": AgentMessage,
    "additional_tools": AdditionalTools,
    "tool_search_output": ToolSearchOutput,
}
"""Items by type; calls of tools that OpenAI knows are `BuiltInCall` and `BuiltInOutput`."""


def decode_response_request(body: bytearray) -> tuple[ResponseRequest, list[str]]:
    """The request, and what it holds that nothing reads, but in `input` and `tools`.

    Raises:
        ApiError: 400, naming the field, for malformed JSON, wrong types, and what this server does not support.
    """
    kept = without_ignored(body, ResponseRequest, NEUTRAL_VALUES)
    request = decode_body(kept, ResponseRequest)
    check_neutral(request, NEUTRAL_VALUES)
    _check_one_of("truncation", request.truncation, ("auto", "disabled"))
    unknown = list(find_unknown(decode_body(kept, dict[str, Any]), ResponseRequest))
    unknown += [f"include[] {name}" for name in request.include or () if name not in INCLUDED]
    return request, unknown


def _check_one_of(field: str, value: str | None, known: Iterable[str]) -> None:
    if value is not None and value not in known:
        raise ApiError(400, f"{field} must be one of {', '.join(known)}, got {value!r}", param=field)


def read_item(given: dict[str, Any], where: str) -> Item | None:
    """The item; None if its type is none that is known.

    Raises:
        ApiError: 400, it lacks what its type has, or has it in another form.
    """
    kind = given.get("type") or "message"
    if not isinstance(kind, str):
        raise ApiError(400, f"{where}.type must be text, got {kind!r}", param=f"{where}.type")
    found = ITEMS.get(kind)
    if found is None and kind.endswith("_call"):
        found = BuiltInCall
    elif found is None and kind.endswith("_call_output"):
        found = BuiltInOutput
    # Of one that is not known, what all have must be right: it is stored by its id.
    item = convert_member({**given, "type": kind}, found or Item, where)
    return None if found is None else item


def unknown_members(given: dict[str, Any], item: Item | None) -> Iterator[str]:
    """What the item holds that nothing reads."""
    if item is None:
        yield f"input[].type {given.get('type')}"
    elif not isinstance(item, BuiltInCall | BuiltInOutput):
        yield from find_unknown(given, type(item), "input[]")
