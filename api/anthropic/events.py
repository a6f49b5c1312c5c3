"""Answers in Anthropic's shape: blocks of a message, whole or as events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

from msgspec import Struct

from api.answer import AnswerPart, AnswerReader
from api.errors import anthropic_error
from api.generation import TokenCounter
from api.kept_reasoning import keep_reasoning
from api.streaming import StreamEnds, event
from engine.frontend.chat_format import ChatTurn

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class Usage(Struct):
    """Attributes:
    input_tokens: Those of the prompt that were computed.
    cache_read_input_tokens: Those that the prefix cache had.
    """

    input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int = 0


class TextBlock(Struct):
    text: str = ""
    type: Literal["text"] = "text"


class ThinkingBlock(Struct):
    thinking: str = ""
    signature: str = ""
    type: Literal["thinking"] = "thinking"


class ToolUseBlock(Struct):
    id: str
    name: str
    input: dict[str, Any]
    type: Literal["tool_use"] = "tool_use"


AnswerBlock = TextBlock | ThinkingBlock | ToolUseBlock


class AnswerMessage(Struct):
    """Attributes:
    stop_sequence: Which of the request's strings ended the answer.
    """

    id: str
    model: str
    content: list[AnswerBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: Usage
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"


class TextDelta(Struct):
    text: str
    type: Literal["text_delta"] = "text_delta"


class ThinkingDelta(Struct):
    thinking: str
    type: Literal["thinking_delta"] = "thinking_delta"


class SignatureDelta(Struct):
    signature: str
    type: Literal["signature_delta"] = "signature_delta"


class InputDelta(Struct):
    partial_json: str
    type: Literal["input_json_delta"] = "input_json_delta"


class MessageStart(Struct):
    message: AnswerMessage
    type: Literal["message_start"] = "message_start"


class BlockStart(Struct):
    index: int
    content_block: AnswerBlock
    type: Literal["content_block_start"] = "content_block_start"


class BlockDelta(Struct):
    index: int
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputDelta
    type: Literal["content_block_delta"] = "content_block_delta"


class BlockStop(Struct):
    index: int
    type: Literal["content_block_stop"] = "content_block_stop"


class Ending(Struct):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageEnd(Struct):
    delta: Ending
    usage: Usage
    type: Literal["message_delta"] = "message_delta"


class MessageStop(Struct):
    type: Literal["message_stop"] = "message_stop"


class Ping(Struct):
    type: Literal["ping"] = "ping"


BlockEvent = BlockStart | BlockDelta | BlockStop
Event = MessageStart | BlockEvent | MessageEnd | MessageStop | Ping

ENDS = StreamEnds(error=lambda error: event(anthropic_error(error), "error"), done=b"")
"""How streams of messages end."""


def encode(one: Event) -> bytes:
    """The event as a server-sent one of its type."""
    return event(one, one.type)


def usage_of(counter: TokenCounter) -> Usage:
    """The counts so far."""
    cached = counter.num_cached_tokens
    return Usage(counter.num_prompt_tokens - cached, cached, counter.num_completion_tokens)


class BlockWriter:
    """Turns the text of an answer into events of blocks, or into blocks.

    Args:
        shows_thoughts: Whether thinking blocks have their text; else it rides in the signature.

    Attributes:
        has_calls: Whether the answer has called a tool.
    """

    def __init__(self, turn: ChatTurn, shows_thoughts: bool) -> None:
        self._reader = AnswerReader(turn)
        self._shows_thoughts = shows_thoughts
        self._num_blocks = 0
        self._open: Literal["text", "thinking", "tool_use"] | None = None
        self._hidden = ""

    @property
    def has_calls(self) -> bool:
        return bool(self._reader.calls)

    def write(self, text: str, is_last: bool) -> Iterator[BlockEvent]:
        """What the text adds."""
        for part in self._reader.read(text, is_last):
            match part.kind:
                case "content":
                    yield from self._enter("text", TextBlock())
                    yield self._delta(TextDelta(part.text))
                case "reasoning":
                    yield from self._enter("thinking", ThinkingBlock())
                    if self._shows_thoughts:
                        yield self._delta(ThinkingDelta(part.text))
                    else:
                        self._hidden += part.text
                case "call":
                    yield from self._leave()
                    yield from self._enter("tool_use", _begun(part))
                case "input":
                    yield self._delta(InputDelta(part.text))
        if is_last:
            yield from self._leave()

    def blocks(self, text: str) -> list[AnswerBlock]:
        """The blocks of a whole answer: what the events add up to."""
        blocks: list[AnswerBlock] = []
        inputs = ""
        for one in self.write(text, is_last=True):
            match one:
                case BlockStart(content_block=block):
                    blocks.append(block)
                    inputs = ""
                case BlockDelta(delta=TextDelta(text=more)):
                    blocks[-1].text += more  # type: ignore[union-attr]
                case BlockDelta(delta=ThinkingDelta(thinking=more)):
                    blocks[-1].thinking += more  # type: ignore[union-attr]
                case BlockDelta(delta=SignatureDelta(signature=signature)):
                    blocks[-1].signature = signature  # type: ignore[union-attr]
                case BlockDelta(delta=InputDelta(partial_json=more)):
                    inputs += more
                case BlockStop() if isinstance(blocks[-1], ToolUseBlock):
                    blocks[-1].input = _read_input(inputs)
        return blocks

    def _enter(
        self, kind: Literal["text", "thinking", "tool_use"], block: AnswerBlock
    ) -> Iterator[BlockEvent]:
        if self._open != kind:
            yield from self._leave()
            self._open = kind
            self._num_blocks += 1
            yield BlockStart(self._num_blocks - 1, block)

    def _leave(self) -> Iterator[BlockEvent]:
        if self._open == "thinking":
            yield self._delta(SignatureDelta(keep_reasoning(self._hidden) if self._hidden else ""))
            self._hidden = ""
        if self._open is not None:
            yield BlockStop(self._num_blocks - 1)
        self._open = None

    def _delta(self, delta: TextDelta | ThinkingDelta | SignatureDelta | InputDelta) -> BlockDelta:
        return BlockDelta(self._num_blocks - 1, delta)


def _begun(part: AnswerPart) -> ToolUseBlock:
    assert part.call is not None
    return ToolUseBlock(part.call.id.replace("call_", "toolu_", 1), part.call.name, {})


def _read_input(text: str) -> dict[str, Any]:
    """The input of a call; nothing where max_tokens has cut it off, which no object can say."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
