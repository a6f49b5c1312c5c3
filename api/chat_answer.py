"""Answers in the form that chat completions have: messages, whole or as deltas."""

from __future__ import annotations

from msgspec import UNSET, UnsetType

from api.answer import AnswerPart, AnswerReader
from api.bodies import (
    ChatDelta,
    ChatFinishReason,
    ChatMessage,
    CustomCall,
    CustomDelta,
    CustomToolCall,
    FunctionCall,
    FunctionDelta,
    FunctionToolCall,
    ToolCallDelta,
)
from engine.core.outputs import FinishReason
from engine.frontend.chat_format import ChatTurn


class ChatAnswerWriter:
    """Turns the text of one sample into deltas, or into a message.

    Args:
        is_legacy: Calls take the form that requests with `functions` know.
        has_reasoning: Reasoning is shown; else it is left out.
    """

    def __init__(self, turn: ChatTurn, is_legacy: bool, has_reasoning: bool) -> None:
        self._reader = AnswerReader(turn)
        self._is_legacy, self._has_reasoning = is_legacy, has_reasoning

    def write(self, text: str, is_last: bool) -> ChatDelta:
        """What the text adds to the message."""
        delta = ChatDelta()
        calls: dict[int, ToolCallDelta] = {}
        for part in self._reader.read(text, is_last):
            match part.kind:
                case "content":
                    delta.content = _join(delta.content, part.text)
                case "reasoning" if self._has_reasoning:
                    delta.reasoning_content = _join(delta.reasoning_content, part.text)
                case "call" | "input":
                    _add_to_call(part, calls)
        if calls and self._is_legacy:
            # There is one at most.
            (delta.function_call,) = (call.function for call in calls.values())
        elif calls:
            delta.tool_calls = list(calls.values())
        return delta

    def message(self, text: str) -> ChatMessage:
        """The whole text as a message: what the deltas joined would be."""
        delta = self.write(text, is_last=True)
        message = ChatMessage(delta.content or None, reasoning_content=delta.reasoning_content)
        if delta.function_call is not UNSET:
            message.function_call = _function(delta.function_call)
        elif delta.tool_calls is not UNSET:
            message.tool_calls = [_call(call) for call in delta.tool_calls]
        else:
            message.content = delta.content or ""
        return message

    def finish_reason(self, reason: FinishReason | None) -> ChatFinishReason | None:
        """Why the sample ended, as chats say it: a call that a stop string has cut is none to be made."""
        if reason != "stop" or not self._reader.calls or self._reader.ends_amid_call:
            return reason
        return "function_call" if self._is_legacy else "tool_calls"


def _add_to_call(part: AnswerPart, calls: dict[int, ToolCallDelta]) -> None:
    """Adds the part to the deltas of calls, by index."""
    call = part.call
    assert call is not None
    if part.kind == "call" and call.is_custom:
        calls[call.index] = ToolCallDelta(call.index, call.id, "custom", custom=CustomDelta(call.name, ""))
    elif part.kind == "call":
        calls[call.index] = ToolCallDelta(call.index, call.id, "function", FunctionDelta(call.name, ""))
    elif call.is_custom:
        delta = calls.setdefault(call.index, ToolCallDelta(call.index, custom=CustomDelta()))
        assert delta.custom is not UNSET
        delta.custom.input = _join(delta.custom.input, part.text)
    else:
        delta = calls.setdefault(call.index, ToolCallDelta(call.index, function=FunctionDelta()))
        assert delta.function is not UNSET
        delta.function.arguments = _join(delta.function.arguments, part.text)


def _join(first: str | UnsetType, second: str) -> str:
    return second if first is UNSET else first + second


def _function(delta: FunctionDelta | UnsetType) -> FunctionCall:
    assert delta is not UNSET
    assert delta.name is not UNSET
    assert delta.arguments is not UNSET
    return FunctionCall(delta.name, delta.arguments)


def _call(delta: ToolCallDelta) -> FunctionToolCall | CustomToolCall:
    assert delta.id is not UNSET
    if delta.custom is UNSET:
        return FunctionToolCall(delta.id, _function(delta.function))
    assert delta.custom.name is not UNSET
    assert delta.custom.input is not UNSET
    return CustomToolCall(delta.id, CustomCall(delta.custom.name, delta.custom.input))
