"""The bodies of requests, and how raw bytes become one of them."""

from __future__ import annotations

import difflib
import gc
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import msgspec
from msgspec import Meta, Raw, Struct

from api.errors import ApiError, not_supported

# What fits the wire between server and engine; a wider number is refused here, by its field's name.
Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]

NULL = b"null"
"""How a member is written that is none."""

# Fields that OpenAI or vLLM know and this server does not act on, with the values that ask for nothing.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "chat_template": (),
    "length_penalty": (1,),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_embeds": (),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "web_search_options": (),
}


class StreamOptions(Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class GenerationRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields of both endpoints. None means not given; SamplingParams holds the ranges.

    Attributes:
        request_id: The answer's id.
        cache_salt: Requests with another one, or none, share no cached blocks with this.
        truncate_prompt_tokens: Most tokens of the prompt that are kept; -1: what fits beside the answer.
        add_special_tokens: Whether the tokenizer adds its BOS and the like.
        timeout: Seconds after which the request ends with an error.
    """

    model: str | None = None
    request_id: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    n: Integer | None = None
    max_tokens: Integer | None = None
    max_completion_tokens: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Integer | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[Integer, float | None] | None = None

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
    return_tokens_as_token_ids: bool | None = None
    truncate_prompt_tokens: Integer | None = None
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool | None = None
    cache_salt: str | None = None
    timeout: float | None = None

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

    # Accepted where they ask for nothing.
    length_penalty: Any = None
    spaces_between_special_tokens: Any = None
    use_beam_search: Any = None


class CompletionRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    prompt: str | list[str | Integer | list[Integer]]
    echo: bool | None = None
    logprobs: Integer | None = None
    best_of: Integer | None = None
    prompt_embeds: Any = None
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
    arguments: str | None = None


class CalledCustomTool(Struct, kw_only=True):
    name: str
    input: str | None = None


class ToolCall(Struct, kw_only=True):
    """A call in a conversation."""

    id: str | None = None
    type: str | None = None
    function: CalledFunction | None = None
    custom: CalledCustomTool | None = None


class Message(Struct, kw_only=True):
    """What is known of a message of a chat, or of an answer of this server sent back as one.

    Messages, their parts and their calls may have other members, which are the chat template's.
    """

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    audio: Any = None
    function_call: CalledFunction | None = None
    reasoning_content: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatCompletionRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    # As they come, since the template may know more of them; `api.openai_messages` reads them as `Message`.
    messages: Annotated[
        list[dict[str, Any]], Meta(extra_json_schema={"items": {"$ref": "#/components/schemas/Message"}})
    ]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None

    # Tools and reasoning; `engine.frontend.tools` reads what has no type here.
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    verbosity: str | None = None

    logprobs: bool | None = None
    top_logprobs: Integer | None = None
    include_reasoning: bool | None = None

    # Accepted where they ask for nothing.
    audio: Any = None
    chat_template: Any = None
    mm_processor_kwargs: Any = None
    modalities: Any = None
    moderation: Any = None
    prediction: Any = None
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
    timeout: float | None = None
    truncate_prompt_tokens: Integer | None = None
    truncation_side: Literal["left", "right"] | None = None
    user: Any = None


class TokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """Text whose tokens are asked for."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatRequest(ChatCompletionRequest, kw_only=True, forbid_unknown_fields=True):
    """A chat whose tokens are asked for; what they do not depend on makes no difference."""

    return_token_strs: bool | None = None


class DetokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    tokens: list[Integer]
    model: str | None = None


Body = TypeVar("Body")
Key = TypeVar("Key")
RequestBody = TypeVar("RequestBody", bound=Struct)


def decode_body(body: bytes | bytearray, kind: type[Body]) -> Body:
    """`body` as a value of type `kind`.

    Raises:
        ApiError: 400, naming the field, for malformed JSON and wrong types.
    """
    try:
        return _decode(body, kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error), kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None


def _decode(body: bytes | bytearray, kind: type[Body]) -> Body:
    """Looks for no garbage meanwhile: there is none, and it would go through all that has been made, again and again.

    No other thread runs either.
    """
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        return msgspec.json.decode(body, type=kind)
    finally:
        if is_enabled:
            gc.enable()


def read_members(body: bytes | bytearray) -> dict[str, bytes]:
    """The members of a body that is an object, by name: what they are made of is not looked at.

    Raises:
        ApiError: 400, it is none.
    """
    return {name: bytes(value) for name, value in decode_body(body, dict[str, Raw]).items()}


def decode_request(body: bytes | bytearray, kind: type[RequestBody]) -> RequestBody:
    """`body` as a request of type `kind`; members that are null are taken for not given.

    What nothing reads is left out, however long it is.

    Raises:
        ApiError: 400, naming the field, for malformed JSON, unknown fields, wrong types, and fields that this
            server does not support.
    """
    ignored = _untyped_fields(kind) - NEUTRAL_VALUES.keys()
    members = read_members(body).items()
    given = {name: value for name, value in members if value != NULL and name not in ignored}
    if given.get("stream_options", b"").startswith(b"{"):
        given["stream_options"] = _encoded(
            {name: value for name, value in read_members(given["stream_options"]).items() if value != NULL}
        )
    request = decode_body(_encoded(given), kind)
    check_neutral(request, NEUTRAL_VALUES)
    if isinstance(request, GenerationRequest) and request.stream_options is not None:
        if not request.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options")
        if request.stream_options.include_obfuscation:
            raise not_supported("stream_options.include_obfuscation")
    return request


def _encoded(members: Mapping[str, bytes]) -> bytes:
    return msgspec.json.encode({name: Raw(value) for name, value in members.items()})


def without_ignored(body: bytes | bytearray, kind: type[Struct], refused: Iterable[str]) -> bytes:
    """The body without what is accepted without effect, however long it is: fields of type Any.

    Args:
        refused: Those that are not accepted.

    Raises:
        ApiError: 400, it is no object.
    """
    ignored = _untyped_fields(kind) - set(refused)
    return _encoded({name: value for name, value in read_members(body).items() if name not in ignored})


@cache
def _untyped_fields(kind: type[Struct]) -> frozenset[str]:
    hints = get_type_hints(kind)
    return frozenset(name for name in hints if hints[name] is Any)


def check_neutral(request: Struct, neutral_values: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuses fields that this server does not act on, unless they ask for nothing.

    Args:
        neutral_values: By field, the values that do.

    Raises:
        ApiError: 400, naming the field.
    """
    for field, neutral in neutral_values.items():
        value = getattr(request, field, None)
        if value is not None and value not in neutral:
            raise not_supported(field)


def convert_member(value: Any, kind: type[RequestBody], where: str) -> RequestBody:
    """A member of a body, read already, as `kind`; `where` names it in errors.

    Raises:
        ApiError: 400, naming the field.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error), kind, where) from None


def without_nulls(value: dict[Key, Any]) -> dict[Key, Any]:
    """The object without the members that are null."""
    return {name: one for name, one in value.items() if one is not None}


def _explain(problem: str, kind: type, where: str = "") -> ApiError:
    """msgspec's words, such as "Expected `int`, got `str` - at `$.max_tokens`", as an error of that field."""
    what, _, place = problem.partition(" - at ")
    path = re.search(r"\$\.?([^`]*)", place)
    parent = ".".join(filter(None, (where, path[1] if path else "")))
    member = re.search(r"(unknown|missing required) field `(.*?)`", what)
    if member is not None:
        name = f"{parent}.{member[2]}" if parent else member[2]
        if member[1] == "unknown":
            return _unknown(name, member[2], StreamOptions if parent == "stream_options" else kind)
        return ApiError(400, f"missing field: {name}", param=name, code="missing_required_parameter")
    text = what.replace("`", "").replace(" | ", " or ").replace("Expected", "expected", 1)
    return ApiError(400, f"{parent or 'the body'}: {text}", param=parent or None, code="invalid_type")


def _unknown(path: str, name: str, kind: type[Struct]) -> ApiError:
    nearest = difflib.get_close_matches(name[:100], kind.__struct_fields__, 1)
    hint = f"; the nearest that is known is {nearest[0]}" if nearest else ""
    return ApiError(400, f"unknown field: {path}{hint}", param=path, code="unknown_parameter")
