"""The bodies of requests, and how raw bytes become one of them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from api.errors import ApiError, not_supported

# What fits the wire between server and engine; a wider number is refused here, by its field's name.
Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]

# Fields that OpenAI knows and this server does not act on, with the values that ask for nothing.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "suffix": ("",),
    "verbosity": ("medium",),
    "web_search_options": (),
}


class StreamOptions(Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class GenerationRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields of both endpoints. None means not given; SamplingParams holds the ranges."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    n: Integer | None = None
    max_tokens: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Integer | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[Integer, float] | None = None

    # Beyond OpenAI, with vLLM's names.
    min_tokens: Integer | None = None
    top_k: Integer | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[Integer] | None = None
    allowed_token_ids: list[Integer] | None = None
    bad_words: list[str] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: Integer | None = None
    priority: Integer | None = None
    return_token_ids: bool | None = None

    # The form of the answer; `api.structured_outputs` makes one of them.
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None

    # Accepted and ignored: they do not change what is generated.
    metadata: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    user: Any = None


class CompletionRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    prompt: str | list[str | Integer | list[Integer]]
    echo: bool | None = None
    logprobs: Integer | None = None
    best_of: Integer | None = None
    suffix: Any = None


class ContentPart(Struct, kw_only=True):
    """A part of a message; kinds other than text carry fields of their own and are refused by `type`."""

    type: str
    text: str | None = None


class CalledFunction(Struct, kw_only=True):
    """Attributes:
    arguments: JSON as text.
    """

    name: str
    arguments: str = ""


class CalledCustomTool(Struct, kw_only=True):
    name: str
    input: str = ""


class ToolCall(Struct, kw_only=True):
    """A call in a conversation; further fields of an answer that is sent back are of no account."""

    id: str | None = None
    type: str = "function"
    function: CalledFunction | None = None
    custom: CalledCustomTool | None = None


class Message(Struct, kw_only=True, forbid_unknown_fields=True):
    """A message of a chat, or an answer of this server sent back as one."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    annotations: Any = None
    audio: Any = None
    function_call: CalledFunction | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatCompletionRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    messages: list[Message]
    max_completion_tokens: Integer | None = None
    logprobs: bool | None = None
    top_logprobs: Integer | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    # Tools and reasoning; `engine.frontend.tools` reads what has no type here.
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    include_reasoning: bool | None = None

    audio: Any = None
    modalities: Any = None
    moderation: Any = None
    prediction: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class EmbeddingRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """OpenAI's, with vLLM's extensions; `PoolingParams` holds the ranges."""

    input: str | list[str | Integer | list[Integer]]
    model: str | None = None
    dimensions: Integer | None = None
    encoding_format: Literal["float", "base64"] | None = None
    normalize: bool | None = None
    pooling: str | None = None
    priority: Integer | None = None
    user: Any = None


Body = TypeVar("Body", bound=Struct)
RequestBody = TypeVar("RequestBody", bound=GenerationRequest)


def decode_request(body: bytes, kind: type[RequestBody]) -> RequestBody:
    """`body` as a request of type `kind`.

    Raises:
        ApiError: As `decode_body`; and 400 for fields that this server does not support.
    """
    request = decode_body(body, kind)
    for field, neutral in NEUTRAL_VALUES.items():
        value = getattr(request, field, None)
        if value is not None and value not in neutral:
            raise not_supported(field)
    if request.stream_options is not None:
        if not request.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options")
        if request.stream_options.include_obfuscation:
            raise not_supported("stream_options.include_obfuscation")
    return request


def decode_body(body: bytes, kind: type[Body]) -> Body:
    """`body` as a struct of type `kind`.

    Raises:
        ApiError: 400, naming the field, for malformed JSON, unknown fields and wrong types.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None


def _explain(problem: str) -> ApiError:
    """msgspec's words, such as "Expected `int`, got `str` - at `$.max_tokens`", as an error of that field."""
    what, _, where = problem.partition(" - at ")
    path = re.search(r"\$\.?([^`]*)", where)
    parent = path[1] if path else ""
    member = re.search(r"(unknown|missing required) field `(.*?)`", what)
    if member is not None:
        name = f"{parent}.{member[2]}" if parent else member[2]
        if member[1] == "unknown":
            return ApiError(400, f"unknown field: {name}", param=name, code="unknown_parameter")
        return ApiError(400, f"missing field: {name}", param=name, code="missing_required_parameter")
    text = what.replace("`", "").replace(" | ", " or ").replace("Expected", "expected", 1)
    return ApiError(400, f"{parent or 'the body'}: {text}", param=parent or None, code="invalid_type")
