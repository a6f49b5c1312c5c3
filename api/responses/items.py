"""From the items of an input to the messages of a conversation: each in its place, those of an answer in one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from api.errors import ApiError, not_supported
from api.generation import new_id
from api.kept_reasoning import recall_reasoning
from api.responses.protocol import (
    AdditionalTools,
    AgentMessage,
    BuiltInCall,
    BuiltInOutput,
    CallOutput,
    Content,
    CustomCall,
    FunctionCall,
    Message,
    Part,
    Reasoning,
    ToolSearchOutput,
    read_item,
    unknown_members,
)
from api.responses.tools import Toolbox, ToolName

ROLES = {"user": "user", "system": "system", "developer": "system", "assistant": "assistant"}
"""Roles as chat templates know them."""

TEXT_PARTS = ("input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text")

ID_PREFIXES = {
    "message": "msg_",
    "function_call": "fc_",
    "function_call_output": "fco_",
    "custom_tool_call": "ctc_",
    "custom_tool_call_output": "ctco_",
    "reasoning": "rs_",
}
"""How ids of items begin, by type."""


class Transcript:
    """The messages that items make.

    Args:
        toolbox: Gets the tools that items bring.

    Attributes:
        messages: As `ChatFormat.turn` takes them.
        unknown: Members and types of items that nothing here reads.
    """

    def __init__(self, instructions: str | None, toolbox: Toolbox) -> None:
        self.messages: list[dict[str, Any]] = []
        self._toolbox = toolbox
        self.unknown: list[str] = []
        self._calls: set[str] = set()
        if instructions:
            self.messages.append({"role": "system", "content": instructions})

    def add(self, given: dict[str, Any], where: str) -> None:
        """Adds an item.

        Raises:
            ApiError: 400, it is not what its type must be, holds more than text, or is the result of no call.
        """
        item = read_item(given, where)
        self.unknown += unknown_members(given, item)
        match item:
            case Message():
                self._add_message(item, where)
            case FunctionCall():
                name = ToolName(item.name, item.namespace).offered
                self._add_call(item.call_id, name, item.arguments or "{}")
            case CustomCall():
                name = ToolName(item.name, item.namespace).offered
                self._add_call(item.call_id, name, {"input": item.input})
            case CallOutput():
                self._add_result(item.call_id, _text(item.output, f"{where}.output"), where)
            case Reasoning():
                self._add_reasoning(item, where)
            case AgentMessage():
                content = _text(item.content or "", f"{where}.content")
                self.messages.append({"role": "user", "content": content})
            case AdditionalTools():
                self.messages.append({"role": "system", "content": self._told(item.tools, where)})
            case ToolSearchOutput():
                self._add_result(item.call_id, self._told(item.tools, where), where)
            case BuiltInCall():
                self._add_built_in(item, given)
            case BuiltInOutput():
                output = item.output if isinstance(item.output, str) else _json(item.output)
                self._add_result(item.call_id or item.id, output, where)

    def _add_message(self, item: Message, where: str) -> None:
        role = ROLES.get(item.role)
        if role is None:
            raise ApiError(
                400,
                f"{where}.role must be one of {', '.join(ROLES)}, got {item.role!r}",
                param=f"{where}.role",
            )
        content = _text(item.content, f"{where}.content")
        if role == "assistant" and self._is_open("content"):
            self.messages[-1]["content"] = content
        else:
            self.messages.append({"role": role, "content": content})

    def _is_open(self, field: str) -> bool:
        """Whether the last message is an answer that may still get a content, or calls after it."""
        last = self.messages[-1] if self.messages else {}
        if last.get("role") != "assistant":
            return False
        return field == "tool_calls" or (last["content"] is None and "tool_calls" not in last)

    def _add_reasoning(self, item: Reasoning, where: str) -> None:
        text = _joined(item.content or item.summary or (), f"{where}.content")
        text = text or recall_reasoning(item.encrypted_content or "")
        if not text:
            return
        if not self._is_open("content"):
            self.messages.append({"role": "assistant", "content": None})
        last = self.messages[-1]
        last["reasoning_content"] = last.get("reasoning_content", "") + text

    def _add_call(self, call_id: str, name: str, arguments: Any) -> None:
        if not self._is_open("tool_calls"):
            self.messages.append({"role": "assistant", "content": None})
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        self.messages[-1].setdefault("tool_calls", []).append(call)
        self._calls.add(call_id)

    def _add_built_in(self, item: BuiltInCall, given: dict[str, Any]) -> None:
        """A call that the model did not make here: it is shown one of a function of that name."""
        arguments = given.get("arguments")
        if not isinstance(arguments, dict):
            known = ("type", "id", "call_id", "status", "execution")
            arguments = {name: value for name, value in given.items() if name not in known}
        self._add_call(item.call_id or item.id or new_id("call_"), item.type.removesuffix("_call"), arguments)

    def _add_result(self, call_id: str | None, content: str | list[dict[str, str]], where: str) -> None:
        """Adds what a call has returned; templates drop the result of no call, or take it for another's."""
        if call_id not in self._calls:
            raise ApiError(
                400,
                f"{where}.call_id {call_id!r} is of no call in the items before",
                param=f"{where}.call_id",
            )
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": content})

    def _told(self, tools: Sequence[Any], where: str) -> str:
        """What the model is told of tools that are there from now on."""
        lines = [
            _json(tool.declaration)
            for index, given in enumerate(tools)
            for tool in self._toolbox.add_later(given, f"{where}.tools[{index}]")
        ]
        return (
            "\n".join(["From now on these tools can be called, too:", *lines]) if lines else "No new tools."
        )

    def finish(self) -> list[dict[str, Any]]:
        """The messages; an input of nothing is a user's who says nothing."""
        for message in self.messages:
            if message["content"] is None and "tool_calls" not in message:
                message["content"] = ""
        if all(message["role"] == "system" for message in self.messages):
            self.messages.append({"role": "user", "content": ""})
        return self.messages


def _text(content: Content, where: str) -> str | list[dict[str, str]]:
    """A text, or parts of text where there are several."""
    if isinstance(content, str):
        return content
    texts = list(_texts(content, where))
    return "".join(texts) if len(texts) < 2 else [{"type": "text", "text": text} for text in texts]


def _joined(parts: Sequence[Part], where: str) -> str:
    return "".join(_texts(parts, where))


def _texts(parts: Sequence[Part], where: str) -> Iterator[str]:
    for index, part in enumerate(parts):
        place = f"{where}[{index}]"
        if part.type == "encrypted_content" and part.encrypted_content is not None:
            # What one agent wrote to another: here it came from this server, in plain words.
            yield part.encrypted_content
            continue
        if part.type not in TEXT_PARTS:
            raise not_supported(f"{place}.type {part.type!r}", f"{place}.type")
        text = part.refusal if part.type == "refusal" else part.text
        if text is None:
            raise ApiError(400, f"missing field: {place}.text", param=f"{place}.text")
        yield text


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def input_items(given: str | list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The items of an input, which may be a text."""
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}] if given else []
    return given or []


def listed_item(given: dict[str, Any]) -> dict[str, Any]:
    """An item of an input as it is stored and listed: with a type, an id, a status and, of a message, parts."""
    item = {name: value for name, value in given.items() if value is not None}
    kind = item.setdefault("type", "message")
    item["id"] = item.get("id") or new_id(ID_PREFIXES.get(kind, f"{kind}_"))
    if kind not in ("reasoning", "additional_tools", "agent_message"):
        item.setdefault("status", "completed")
    if kind == "message" and isinstance(item.get("content"), str):
        is_answer = item.get("role") == "assistant"
        text = {"type": "output_text", "annotations": []} if is_answer else {"type": "input_text"}
        item["content"] = [{**text, "text": item["content"]}]
    return item
