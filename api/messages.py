"""From the messages of a chat to the token ids of a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from api.errors import ApiError, not_supported
from api.protocol import ChatCompletionRequest, Message
from engine.errors import RequestError

if TYPE_CHECKING:
    from engine.tokenizer.tokenizer import Tokenizer

ROLES = ("system", "developer", "user", "assistant")
# What the server itself hands to the template.
RESERVED_TEMPLATE_ARGUMENTS = ("self", "messages", "add_generation_prompt", "continue_final_message")


def encode_messages(tokenizer: Tokenizer, request: ChatCompletionRequest) -> list[int]:
    """The prompt that the model's chat template makes of the request's messages, as token ids.

    Raises:
        ApiError: 400, messages that are empty, of unknown roles, or hold more than text.
        RequestError: The template refuses them.
    """
    if not request.messages:
        raise ApiError(400, "messages must hold at least one message", param="messages")
    arguments = dict(request.chat_template_kwargs or {})
    for name in RESERVED_TEMPLATE_ARGUMENTS:
        if name in arguments:
            raise ApiError(
                400, f"chat_template_kwargs must not hold {name}", param=f"chat_template_kwargs.{name}"
            )
    messages = [_plain_message(message, f"messages[{i}]") for i, message in enumerate(request.messages)]
    if request.continue_final_message:
        return _encode_open_end(tokenizer, request, messages, arguments)
    arguments["add_generation_prompt"] = request.add_generation_prompt is not False
    return tokenizer.encode_chat(messages, **arguments)


def _encode_open_end(
    tokenizer: Tokenizer,
    request: ChatCompletionRequest,
    messages: list[dict[str, Any]],
    arguments: dict[str, Any],
) -> list[int]:
    """The prompt up to the end of the last message's content, which the model then goes on with."""
    if request.add_generation_prompt:
        problem = "continue_final_message excludes add_generation_prompt"
    elif messages[-1]["role"] != "assistant":
        problem = "continue_final_message needs an assistant's message with text at the end"
    else:
        try:
            return tokenizer.encode_chat(messages, continue_final_message=True, **arguments)
        except RequestError as error:
            problem = str(error)
    raise ApiError(400, problem, param="continue_final_message")


def _plain_message(message: Message, where: str) -> dict[str, Any]:
    """The message as templates take it; `where` names it in errors."""
    if message.role in ("tool", "function"):
        raise not_supported(f"{where}.role {message.role!r}", f"{where}.role")
    if message.role not in ROLES:
        raise ApiError(
            400,
            f"{where}.role must be one of {', '.join(ROLES)}, got {message.role!r}",
            param=f"{where}.role",
        )
    for field in ("audio", "function_call", "tool_calls", "tool_call_id"):
        if getattr(message, field) not in (None, []):
            raise not_supported(f"{where}.{field}")
    # Templates know the developer's role by its older name.
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": _plain_content(message, where)}
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _plain_content(message: Message, where: str) -> str | list[dict[str, str]] | None:
    """Text, or parts of text; an assistant's may be null."""
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        if message.role == "assistant":
            return None
        raise ApiError(400, f"missing field: {where}.content", param=f"{where}.content")
    parts = []
    for index, part in enumerate(message.content):
        place = f"{where}.content[{index}]"
        if part.type != "text":
            raise not_supported(f"{place}.type {part.type!r}", f"{place}.type")
        if part.text is None:
            raise ApiError(400, f"missing field: {place}.text", param=f"{place}.text")
        parts.append({"type": "text", "text": part.text})
    return parts
