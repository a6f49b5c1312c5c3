"""A response as it grows: from the parts of an answer to output items, and the events that tell of each.

    response.created, response.in_progress
    response.output_item.added
        response.content_part.added, response.output_text.delta …, .done, response.content_part.done
        response.content_part.added, response.reasoning_text.delta …, .done, response.content_part.done
        response.function_call_arguments.delta …, .done
        response.custom_tool_call_input.delta …, .done
    response.output_item.done
    response.completed, response.incomplete or response.failed

Events carry numbers from 0 on, without a gap.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import UNSET

from api.answer import AnswerPart, AnswerReader, Call
from api.bodies import ChatTokenLogprob
from api.errors import ApiError
from api.generation import TokenCounter, new_id
from api.kept_reasoning import keep_reasoning
from api.logprobs import chat_logprobs
from api.responses.bodies import (
    CustomCallItem,
    FunctionCallItem,
    IncompleteDetails,
    InputTokensDetails,
    OutputItem,
    OutputMessage,
    OutputText,
    OutputTokensDetails,
    ReasoningItem,
    ReasoningText,
    Response,
    ResponseFailure,
    ResponseUsage,
)
from api.responses.tools import ToolName
from engine.core.outputs import CompletionOutput, FinishReason
from engine.frontend.chat_format import ChatTurn

Event = dict[str, Any]


class ResponseWriter:
    """Turns the one sample of a response into its output.

    Args:
        response: It has just begun, and grows.
        names: What the client calls its tools, by what the model does.
        num_top_logprobs: How many of the likeliest tokens are told beside each.
        keeps_reasoning: Whether clients get reasoning in the word that they send back, too.
    """

    def __init__(
        self,
        response: Response,
        turn: ChatTurn,
        names: Mapping[str, ToolName],
        num_top_logprobs: int,
        keeps_reasoning: bool,
    ) -> None:
        self.response = response
        self._reader = AnswerReader(turn)
        self._names, self._num_top_logprobs = names, num_top_logprobs
        self._keeps_reasoning = keeps_reasoning
        self._is_open = False
        self._sequence_number = 0
        # Tokens whose text is held back until it is known what they are part of.
        self._num_held_tokens = 0
        self._held_logprobs: list[ChatTokenLogprob] = []
        self._num_reasoning_tokens = 0

    def _event(self, kind: str, **members: Any) -> Event:
        event = {"type": f"response.{kind}", "sequence_number": self._sequence_number, **members}
        self._sequence_number += 1
        return event

    def _at_item(self, kind: str, **members: Any) -> Event:
        """An event about the open item."""
        return self._event(kind, item_id=self._item.id, output_index=len(self.response.output) - 1, **members)

    @property
    def _item(self) -> OutputItem:
        return self.response.output[-1]

    def begin(self) -> Iterator[Event]:
        """The response has begun."""
        yield self._event("created", response=self.response)
        yield self._event("in_progress", response=self.response)

    def write(self, sample: CompletionOutput) -> Iterator[Event]:
        """What is new of the sample."""
        self._num_held_tokens += len(sample.token_ids)
        logprobs = chat_logprobs(sample, self._num_top_logprobs)
        self._held_logprobs += logprobs.content if logprobs is not None else []
        for part in self._reader.read(sample.text, is_last=sample.finish_reason is not None):
            if part.text or part.kind == "call":
                yield from self._write_part(part)
                self._held_logprobs, self._num_held_tokens = [], 0

    def _write_part(self, part: AnswerPart) -> Iterator[Event]:
        match part.kind:
            case "content":
                if not self._is_open or not isinstance(self._item, OutputMessage):
                    yield from self._open(OutputMessage(id=new_id("msg_"), content=[]))
                    self._item.content.append(OutputText(logprobs=[]))  # type: ignore[union-attr,arg-type]
                    yield self._part_event("content_part.added")
                yield from self._add_text(part.text)
            case "reasoning":
                if not self._is_open or not isinstance(self._item, ReasoningItem):
                    yield from self._open(ReasoningItem(id=new_id("rs_"), content=[]))
                    self._item.content.append(ReasoningText())  # type: ignore[union-attr,arg-type]
                    yield self._part_event("content_part.added")
                self._num_reasoning_tokens += self._num_held_tokens
                self._text_part.text += part.text
                yield self._at_item("reasoning_text.delta", content_index=0, delta=part.text)
            case "call":
                assert part.call is not None
                yield from self._open(self._call_item(part.call))
            case "input" if isinstance(self._item, CustomCallItem):
                self._item.input += part.text
                yield self._at_item("custom_tool_call_input.delta", delta=part.text)
            case "input":
                assert isinstance(self._item, FunctionCallItem)
                self._item.arguments += part.text
                yield self._at_item("function_call_arguments.delta", delta=part.text)

    @property
    def _text_part(self) -> OutputText | ReasoningText:
        assert isinstance(self._item, OutputMessage | ReasoningItem)
        return self._item.content[0]

    def _part_event(self, kind: str) -> Event:
        return self._at_item(kind, content_index=0, part=copy.copy(self._text_part))

    def _add_text(self, text: str) -> Iterator[Event]:
        part = self._text_part
        assert isinstance(part, OutputText)
        logprobs = _tokens_of(text, self._held_logprobs)
        part.text += text
        part.logprobs += logprobs
        yield self._at_item("output_text.delta", content_index=0, delta=text, logprobs=_brief(logprobs))

    def _call_item(self, call: Call) -> OutputItem:
        name = self._names.get(call.name, ToolName(call.name))
        namespace = UNSET if name.namespace is None else name.namespace
        kind, prefix = (CustomCallItem, "ctc_") if call.is_custom else (FunctionCallItem, "fc_")
        return kind(id=new_id(prefix), call_id=call.id, name=name.name, namespace=namespace)

    def _open(self, item: OutputItem) -> Iterator[Event]:
        yield from self._close(is_whole=True)
        self.response.output.append(item)
        self._is_open = True
        yield self._event("output_item.added", output_index=len(self.response.output) - 1, item=_copy(item))

    def _close(self, is_whole: bool) -> Iterator[Event]:
        """Ends the open item, if there is one."""
        if not self._is_open:
            return
        item, self._is_open = self._item, False
        match item:
            case OutputMessage(content=[part]):
                logprobs = _brief(part.logprobs)
                yield self._at_item("output_text.done", content_index=0, text=part.text, logprobs=logprobs)
                yield self._part_event("content_part.done")
            case ReasoningItem(content=[part]):
                if self._keeps_reasoning:
                    item.encrypted_content = keep_reasoning(part.text)
                yield self._at_item("reasoning_text.done", content_index=0, text=part.text)
                yield self._part_event("content_part.done")
            case FunctionCallItem():
                yield self._at_item("function_call_arguments.done", arguments=item.arguments)
            case CustomCallItem():
                yield self._at_item("custom_tool_call_input.done", input=item.input)
        if not isinstance(item, CustomCallItem):
            item.status = "completed" if is_whole else "incomplete"
        yield self._event("output_item.done", output_index=len(self.response.output) - 1, item=_copy(item))

    def end_items(self, reason: FinishReason | None, counter: TokenCounter) -> Iterator[Event]:
        """The answer has ended; the response has its status, and `end` tells of it."""
        is_whole = reason == "stop"
        yield from self._close(is_whole and not self._reader.ends_amid_call)
        response = self.response
        response.status = "completed" if is_whole else "incomplete"
        response.incomplete_details = None if is_whole else IncompleteDetails()
        response.completed_at = int(time.time()) if is_whole else None
        response.usage = self._usage(counter)

    def fail(self, error: ApiError, counter: TokenCounter) -> None:
        """The response has failed, and `end` tells of it."""
        self._is_open = False
        self.response.status, self.response.error = "failed", ResponseFailure(error.message)
        self.response.usage = self._usage(counter)

    def end(self) -> Event:
        """The response has its last status."""
        return self._event(self.response.status, response=self.response)

    def _usage(self, counter: TokenCounter) -> ResponseUsage:
        num_input, num_output = counter.num_prompt_tokens, counter.num_completion_tokens
        return ResponseUsage(
            num_input,
            InputTokensDetails(counter.num_cached_tokens),
            num_output,
            OutputTokensDetails(self._num_reasoning_tokens),
            num_input + num_output,
        )


def _copy(item: OutputItem) -> OutputItem:
    """The item as it is now: events are written later than they are made."""
    item = copy.copy(item)
    match item:
        case OutputMessage():
            item.content = [copy.copy(part) for part in item.content]
        case ReasoningItem():
            item.content = [copy.copy(part) for part in item.content]
    return item


def _tokens_of(text: str, held: list[ChatTokenLogprob]) -> list[ChatTokenLogprob]:
    """The tokens that a text came in, without those of marks before it."""
    data, tokens = text.encode(), [bytes(token.bytes) for token in held]
    start = 0
    while start < len(held) and data in b"".join(tokens[start + 1 :]):
        start += 1
    return held[start:]


def _brief(logprobs: list[ChatTokenLogprob]) -> list[dict[str, Any]]:
    """Log-probabilities as events have them: without bytes."""
    return [
        {
            "token": one.token,
            "logprob": one.logprob,
            "top_logprobs": [{"token": other.token, "logprob": other.logprob} for other in one.top_logprobs],
        }
        for one in logprobs
    ]
