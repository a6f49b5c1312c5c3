"""Probes: conversations that a chat template renders, to see how it writes tools, calls and reasoning."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from engine.errors import RequestError
from engine.frontend.reasoning import REASONING_FORMATS, ReasoningFormat
from engine.frontend.tool_formats import TOOL_FORMATS
from engine.frontend.tool_formats.format import Tool, ToolFormat
from engine.frontend.tool_formats.stream import StreamParser
from engine.tokenizer.tokenizer import Tokenizer

Message = dict[str, Any]

_QUESTION, _THOUGHT, _SAID = "A probe's question?", "A probe's thought.", "A probe's answer."
_ARGUMENTS = {"probe_argument": "probe_value"}
_PROBE = Tool(
    "probe_tool",
    {"type": "object", "properties": {"probe_argument": {"type": "string", "description": "A probe."}}},
    "A probe.",
)
_ASKED: Message = {"role": "user", "content": _QUESTION}


class TemplateProbes:
    """What a chat template makes of probes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def _render(self, messages: Sequence[Message], **arguments: Any) -> str:
        """What the template makes of them; nothing if it refuses them."""
        try:
            return self._tokenizer.apply_chat_template(list(messages), **arguments)
        except RequestError:
            return ""

    @property
    def _tools(self) -> list[dict[str, Any]]:
        return [_PROBE.declaration]

    @cached_property
    def _call(self) -> tuple[str, str | None, bool, list[ToolFormat]]:
        """The answer with a call as rendered, what empty content and arguments it takes, and formats that read it."""
        best: tuple[str, str | None, bool, list[ToolFormat]] = ("", "", False, [])
        for takes_text in (False, True):
            for content in ("", None):
                arguments = json.dumps(_ARGUMENTS) if takes_text else _ARGUMENTS
                function = {"name": _PROBE.name, "arguments": arguments}
                call = {"id": "probe0001", "type": "function", "function": function}
                said: Message = {"role": "assistant", "content": content, "tool_calls": [call]}
                result = {"role": "tool", "tool_call_id": "probe0001", "name": _PROBE.name, "content": "ok"}
                answer = self._answer([_ASKED, said, result], tools=self._tools)
                found = [one for one in TOOL_FORMATS.values() if _reads_probe(one, answer)]
                if found:
                    return answer, content, takes_text, found
                if _ARGUMENTS["probe_argument"] in answer and not best[0]:
                    best = (answer, content, takes_text, [])
        return best

    def _answer(self, messages: Sequence[Message], **arguments: Any) -> str:
        """What follows the prompt that the first message makes."""
        whole = self._render(messages, **arguments)
        prompt = self._render(messages[:1], **arguments)
        # Where the template opens or skips the reasoning, an answer that is there already may not.
        opens = [one.open for one in REASONING_FORMATS.values() if one.open in prompt]
        for start in (prompt, *(prompt.rpartition(mark)[0] for mark in opens)):
            if start and whole.startswith(start):
                return whole[len(start) :]
        return whole.partition(_QUESTION)[2]

    @property
    def tool_formats(self) -> list[ToolFormat]:
        return self._call[3]

    @property
    def empty_content(self) -> str | None:
        """The content of a message that has calls alone."""
        return self._call[1]

    @property
    def takes_text(self) -> bool:
        """Whether a call's arguments are text to the template, else an object."""
        return self._call[2]

    @cached_property
    def knows_tools(self) -> bool:
        return _PROBE.name in self._render([_ASKED], tools=self._tools) or bool(self._call[0])

    @cached_property
    def takes_system(self) -> bool:
        """Whether a conversation may begin with a system message."""
        return _SAID in self._render([{"role": "system", "content": _SAID}, _ASKED])

    @cached_property
    def takes_later_system(self) -> bool:
        """Whether a system message may stand after others, and stays there."""
        _, _, later = self._render([_ASKED, {"role": "system", "content": _SAID}]).partition(_QUESTION)
        return _SAID in later

    @cached_property
    def _rendered(self) -> list[str]:
        """Prompts with and without thinking, and one that has a thought in it."""
        thought = {"role": "assistant", "content": _SAID, "reasoning_content": _THOUGHT}
        choices: list[dict[str, bool]] = [{}, {"enable_thinking": True}, {"enable_thinking": False}]
        prompts = [self._render([_ASKED], **choice) for choice in choices]
        return [*prompts, self._render([_ASKED, thought]), self._render([_ASKED, thought, _ASKED])]

    @cached_property
    def reasoning(self) -> ReasoningFormat | None:
        """The marks that the template writes, or takes out of what was said before."""
        for one in REASONING_FORMATS.values():
            if any(one.close in text or one.open in text for text in self._rendered) or self._takes_out(one):
                return one
        return None

    def _takes_out(self, one: ReasoningFormat) -> bool:
        said = {"role": "assistant", "content": f"{one.open}\n{_THOUGHT}\n{one.close}\n\n{_SAID}"}
        text = self._render([_ASKED, said, _ASKED])
        return _SAID in text and _THOUGHT not in text

    @cached_property
    def is_harmony(self) -> bool:
        return any("<|channel|>final<|message|>" in text for text in self._rendered)


def _reads_probe(tool_format: ToolFormat, answer: str) -> bool:
    pieces = StreamParser(tool_format.parse).push(answer, is_last=True)
    calls = [piece.text for piece in pieces if piece.kind == "call"]
    arguments = "".join(piece.text for piece in pieces if piece.kind == "arguments")
    try:
        return calls == [_PROBE.name] and json.loads(arguments) == _ARGUMENTS
    except ValueError:
        return False
