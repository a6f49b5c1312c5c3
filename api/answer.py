"""Answers of a chat as messages: content, reasoning and calls of tools, whole or as deltas."""

from __future__ import annotations

import json
import secrets

from msgspec import UNSET, UnsetType

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
from engine.frontend.tool_formats.stream import Piece

LONGEST_ESCAPE = 12
"""Characters that one character takes in JSON at most: two times \\uXXXX."""


class AnswerWriter:
    """Turns the text of one sample into deltas, or into a message.

    Args:
        is_legacy: Calls take the form that requests with `functions` know.
        has_reasoning: Reasoning is shown; else it is left out.
    """

    def __init__(self, turn: ChatTurn, is_legacy: bool, has_reasoning: bool) -> None:
        self._parser = turn.parser()
        self._custom_tools = turn.custom_tools
        self._is_legacy, self._has_reasoning = is_legacy, has_reasoning
        self._num_calls = 0
        # Of a custom tool's call that runs: its arguments, of which the input is given once they are whole.
        self._input: str | None = None

    def write(self, text: str, is_last: bool) -> ChatDelta:
        """What the text adds to the message."""
        pieces = self._parser.push(text, is_last)
        delta = ChatDelta()
        calls: dict[int, ToolCallDelta] = {}
        for piece in pieces:
            match piece.kind:
                case "content":
                    delta.content = _join(delta.content, piece.text)
                case "reasoning" if self._has_reasoning:
                    delta.reasoning_content = _join(delta.reasoning_content, piece.text)
                case "call":
                    self._end_input(calls)
                    self._begin(piece, calls)
                case "arguments":
                    self._go_on(piece, calls)
        if is_last:
            self._end_input(calls)
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
        """Why the sample ended, as chats say it."""
        if reason != "stop" or not self._num_calls:
            return reason
        return "function_call" if self._is_legacy else "tool_calls"

    def _begin(self, piece: Piece, calls: dict[int, ToolCallDelta]) -> None:
        index = self._num_calls
        self._num_calls += 1
        call_id = f"call_{secrets.token_hex(12)}"
        if piece.text in self._custom_tools:
            self._input = ""
            calls[index] = ToolCallDelta(index, call_id, "custom", custom=CustomDelta(piece.text, ""))
        else:
            calls[index] = ToolCallDelta(index, call_id, "function", FunctionDelta(piece.text, ""))

    def _go_on(self, piece: Piece, calls: dict[int, ToolCallDelta]) -> None:
        if self._input is not None:
            self._input += piece.text
            return
        index = self._num_calls - 1
        call = calls.setdefault(index, ToolCallDelta(index, function=FunctionDelta()))
        assert call.function is not UNSET
        call.function.arguments = _join(call.function.arguments, piece.text)

    def _end_input(self, calls: dict[int, ToolCallDelta]) -> None:
        if self._input is None:
            return
        index = self._num_calls - 1
        call = calls.setdefault(index, ToolCallDelta(index, custom=CustomDelta()))
        assert call.custom is not UNSET
        call.custom.input = _read_input(self._input)
        self._input = None


def _read_input(arguments: str) -> str:
    """The input of a custom tool, as far as it goes: an answer may be cut off, even amid a character's escapes."""
    shorter = (arguments[: len(arguments) - cut] + '"}' for cut in range(min(len(arguments), LONGEST_ESCAPE)))
    for text in (arguments, *shorter):
        try:
            found = str(json.loads(text)["input"])
            found.encode()  # no half of a character
        except (ValueError, KeyError):
            continue
        return found
    return ""


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
