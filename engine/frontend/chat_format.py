"""How a model's chat template writes tools, calls and reasoning, found by rendering probes.

A template that knows no tools gets them in a system message of ours (`describe_tools`), and answers in Hermes's.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.core.grammar import lark_of
from engine.core.outputs import CalledTool, ChatAnswer
from engine.core.sampling_params import SamplingParams
from engine.core.structured_outputs import FIELD, StructuredOutputs
from engine.errors import RequestError
from engine.frontend.grammar import FormChecker
from engine.frontend.reasoning import (
    REASONING_FORMATS,
    ReasoningFormat,
    after_reasoning,
    reasoning_grammar,
)
from engine.frontend.template_probes import TemplateProbes
from engine.frontend.tool_formats import TOOL_FORMATS
from engine.frontend.tool_formats.format import Answer, Tool, ToolFormat
from engine.frontend.tool_formats.harmony import HARMONY
from engine.frontend.tool_formats.hermes import HERMES
from engine.frontend.tool_formats.lark import Lark, nested
from engine.frontend.tool_formats.stream import Parsing, Piece, Source, StreamParser
from engine.frontend.tools import NO_CALLS, ToolChoice
from engine.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Message = dict[str, Any]

ANY_OBJECT: dict[str, Any] = {"type": "object"}

MAX_LOGGED = 256
"""Names of tools that are logged at most."""


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """A prompt, and how to read what the model answers to it.

    Attributes:
        form: What the answer must be, reasoning and calls and all; None: anything.
        shows_special_tokens: Whether the parser needs the text of special tokens.
        parse: The answer's parser.
        is_plain: Whether all of the answer is content.
        custom_tools: Names of the tools that take a text.
        prompt: As the template writes it.
    """

    prompt_token_ids: list[int]
    form: StructuredOutputs | None
    shows_special_tokens: bool
    parse: Callable[[Source], Parsing[None]]
    custom_tools: frozenset[str] = frozenset()
    prompt: str = ""
    is_plain: bool = False

    def parser(self) -> StreamParser:
        """For one sample."""
        return StreamParser(self.parse)

    def params(self, params: SamplingParams) -> SamplingParams:
        """The parameters under which the model answers."""
        skips = params.skip_special_tokens and not self.shows_special_tokens
        if params.structured_outputs is self.form and params.skip_special_tokens == skips:
            return params
        return replace(params, structured_outputs=self.form, skip_special_tokens=skips)

    def read(self, text: str) -> ChatAnswer:
        """A whole answer."""
        answer = ChatAnswer()
        for piece in self.parser().push(text, is_last=True):
            match piece.kind:
                case "content":
                    answer.content += piece.text
                case "reasoning":
                    answer.reasoning_content += piece.text
                case "call":
                    answer.tool_calls.append(CalledTool(piece.text, ""))
                case "arguments":
                    call = answer.tool_calls[-1]
                    answer.tool_calls[-1] = CalledTool(call.name, call.arguments + piece.text)
        return answer


class ChatFormat:
    """What a model's chat template does with tools and reasoning.

    Args:
        tool_format: A name of TOOL_FORMATS; "prompt": tools in a system message of ours, whatever the template does;
            "auto": what the template itself writes.
        reasoning_format: A name of REASONING_FORMATS, "harmony" or "none"; "auto": what the template itself writes.

    Attributes:
        tool_format: How calls are written; None where that cannot be told.
        is_prompted: Whether tools are described in a system message of ours.
        reasoning: The marks around reasoning; None: it is not told from the answer.
        is_harmony: Whether answers are messages in channels.
    """

    def __init__(
        self, tokenizer: Tokenizer, tool_format: str = "auto", reasoning_format: str = "auto"
    ) -> None:
        self._tokenizer = tokenizer
        self._probes = TemplateProbes(tokenizer)
        self._forms = FormChecker(tokenizer, tokenizer.vocab_size)
        self._loose: set[str] = set()
        self._problem = ""
        self.tool_format: ToolFormat | None = TOOL_FORMATS.get(tool_format)
        self.is_prompted = tool_format == "prompt" or not self._probes.knows_tools
        if self.is_prompted:
            self._prompt_tools(tool_format)
        elif tool_format == "auto":
            self._find_format()
        self.is_harmony = reasoning_format == "harmony" or (
            reasoning_format == "auto" and (self.tool_format is HARMONY or self._probes.is_harmony)
        )
        self.reasoning = REASONING_FORMATS.get(reasoning_format)
        if reasoning_format == "auto" and not self.is_harmony:
            self.reasoning = self._probes.reasoning

    def _prompt_tools(self, tool_format: str) -> None:
        if tool_format in ("auto", "prompt", HERMES.name):
            self.tool_format = HERMES
        else:
            self.tool_format = None
            self._problem = (
                f"the model's chat template knows no tools, so it cannot have them in the format {tool_format}: "
                "--tool-format prompt describes them in a system message"
            )

    def _find_format(self) -> None:
        found = self._probes.tool_formats
        if len(found) == 1:
            [self.tool_format] = found
            return
        names = ", ".join(found_format.name for found_format in found)
        what = f"may be of several formats ({names})" if found else "is of no format that is known here"
        self._problem = (
            f"how the model's chat template writes a call {what}: name it with --tool-format, "
            f"one of {', '.join(TOOL_FORMATS)}, or prompt, which describes tools in a system message"
        )

    def turn(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        choice: ToolChoice = NO_CALLS,
        is_parallel: bool = True,
        form: StructuredOutputs | None = None,
        adds_special_tokens: bool = False,
        **template_arguments: Any,
    ) -> ChatTurn:
        """The prompt for messages and tools, and how its answer is to be read.

        Args:
            messages: As OpenAI's: a call's arguments are JSON as text.
            is_parallel: Whether there may be several calls, where the format has such.
            form: What an answer must be that calls nothing; None: free text.
            adds_special_tokens: Whether the tokenizer adds its own, although templates write BOS themselves.
            template_arguments: As in `Tokenizer.apply_chat_template`.

        Raises:
            RequestError: The template does not take them, or how the model calls tools is not known.
        """
        offered = list(tools) if choice.mode != "none" else []
        if offered and self.tool_format is None:
            raise RequestError(f"tools: {self._problem}", "tools")
        try:
            listed = [tool for tool in offered if tool.is_listed]
            rendered = list(self._rendered(self._in_place(messages), listed))
        except (AttributeError, KeyError, TypeError):
            raise RequestError(
                "messages must be objects with a role; calls in them have an id and a function with a name",
                "messages",
            ) from None
        if listed and not self.is_prompted:
            template_arguments["tools"] = [tool.declaration for tool in listed]
        text = self._tokenizer.apply_chat_template(rendered, **template_arguments)
        token_ids = self._tokenizer.encode(text, adds_special_tokens)
        is_continued = bool(template_arguments.get("continue_final_message"))
        callable_tools = [tool for tool in offered if choice.names is None or tool.name in choice.names]
        reading = _Reading(
            self._tokenizer.special_token_id,
            self.tool_format if offered else None,
            None if is_continued else self.reasoning,
            self.is_harmony and not is_continued,
            text.rstrip(),
        )
        has_parallel = reading.tool_format is not None and reading.tool_format.has_parallel_calls
        answer = Answer(
            callable_tools,
            choice.mode == "required",
            is_parallel and has_parallel and not choice.is_named,
            None if form is None else nested(_lark_of(form)),
        )
        return ChatTurn(
            token_ids,
            self._form(reading, answer, form),
            any(self._tokenizer.special_token_id(mark) is not None for mark in reading.marks),
            reading.parse,
            frozenset(tool.name for tool in offered if tool.is_custom),
            text,
            reading.is_plain,
        )

    def _form(
        self, reading: _Reading, answer: Answer, form: StructuredOutputs | None
    ) -> StructuredOutputs | None:
        """The form of all of an answer.

        Raises:
            RequestError: It cannot be kept; names the tool.
        """
        for tool in answer.tools:
            if tool.grammar is not None and not (reading.tool_format and reading.tool_format.has_texts):
                raise RequestError(
                    f"{tool.where}: a Lark grammar cannot be kept in the model's format of calls, which is JSON; "
                    "--tool-format prompt has another",
                    tool.where,
                )
        answer = replace(answer, tools=[self._kept(tool) for tool in answer.tools])
        if not answer.tools and (form is None or not reading.marks):
            return form
        return StructuredOutputs(grammar=reading.grammar(answer))

    def _kept(self, tool: Tool) -> Tool:
        """The tool with arguments that can be kept.

        Raises:
            RequestError: Its own cannot, and it is strict; names the tool.
        """
        by_schema = StructuredOutputs(json=tool.parameters)
        try:
            self._forms.check(by_schema if tool.grammar is None else StructuredOutputs(grammar=tool.grammar))
        except RequestError as error:
            problem = str(error).replace(FIELD, tool.where, 1)
            if tool.is_strict:
                raise RequestError(problem, tool.where, error.code) from None
            if tool.name not in self._loose and len(self._loose) < MAX_LOGGED:
                self._loose.add(tool.name)
                logger.warning("the tool %s is not strict, and takes any JSON object: %s", tool.name, problem)
            return replace(tool, parameters=ANY_OBJECT)
        return tool

    def _in_place(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages; what a system says amid them is the user's words where the template has no place for it."""
        if self._probes.takes_later_system:
            return messages
        placed: list[Message] = []
        has_system = False
        for message in messages:
            is_later = message["role"] == "system" and bool(placed) and placed[-1]["role"] != "system"
            if is_later:
                message = {**message, "role": "user"}
            if (is_later or has_system) and placed[-1]["role"] == message["role"] == "user":
                # One message: such templates want users and assistants to take turns.
                placed[-1] = {**message, "content": f"{_text(placed[-1])}\n{_text(message)}"}
                has_system = True
            else:
                placed.append(message)
                has_system = is_later
        return placed

    def _rendered(self, messages: Sequence[Message], tools: list[Tool]) -> Iterator[Message]:
        """The messages as the template takes them."""
        if self.is_prompted:
            yield from _without_tools(messages, tools, self._probes.takes_system)
            return
        call_id = (self.tool_format and self.tool_format.call_id) or (lambda given: given)
        names: dict[str, str] = {}
        for message in messages:
            calls = message.get("tool_calls")
            if calls:
                names |= {call["id"]: call["function"]["name"] for call in calls if call.get("id")}
                calls = [self._rendered_call(call, call_id) for call in calls]
                message = {**message, "tool_calls": calls}
                if not message.get("content"):
                    message["content"] = self._probes.empty_content
            elif message["role"] == "tool":
                given = message.get("tool_call_id") or ""
                name = message.get("name") or names.get(given)
                message = {**message, "tool_call_id": call_id(given), "name": name}
            yield message

    def _rendered_call(self, call: dict[str, Any], call_id: Callable[[str], str]) -> dict[str, Any]:
        function = call["function"]
        arguments = _read_arguments(function)
        if self._probes.takes_text:
            arguments = json.dumps(arguments, ensure_ascii=False)
        function = {**function, "arguments": arguments}
        return {**call, "id": call_id(call.get("id") or ""), "function": function}


@dataclass(frozen=True, slots=True)
class _Reading:
    """How one answer is read.

    Attributes:
        prompt: Its end tells whether the reasoning has begun, or is over.
    """

    special_token_id: Callable[[str], int | None]
    tool_format: ToolFormat | None
    reasoning: ReasoningFormat | None
    is_harmony: bool
    prompt: str

    @property
    def marks(self) -> tuple[str, ...]:
        reasoning = (self.reasoning.open, self.reasoning.close) if self.reasoning else ()
        tools = self.tool_format.marks if self.tool_format else ()
        return (*reasoning, *tools, *(HARMONY.marks if self.is_harmony else ()))

    @property
    def is_plain(self) -> bool:
        return self.tool_format is None and self.reasoning is None and not self.is_harmony

    @property
    def has_begun(self) -> bool:
        """Whether the prompt ends in the reasoning."""
        return self.reasoning is not None and self.prompt.endswith(self.reasoning.open)

    def parse(self, source: Source) -> Parsing[None]:
        parse = self.tool_format.parse if self.tool_format else _plain
        if self.is_harmony:
            parse = HARMONY.parse
        elif self.reasoning is not None:
            parse = after_reasoning(self.reasoning, self.has_begun, parse)
        yield from parse(source)

    def grammar(self, answer: Answer) -> str:
        lark = Lark(self.special_token_id)
        if self.is_harmony:
            return lark.source(HARMONY.grammar(lark, answer))
        reasons = self.reasoning is not None and not self.prompt.endswith(self.reasoning.close)
        first = ""
        if self.reasoning is not None and reasons:
            is_text = answer.content is None and not answer.is_required
            first = reasoning_grammar(
                lark, self.reasoning, self.has_begun, space="" if is_text else r"/\s{0,2}/"
            )
            if not self.has_begun and self.special_token_id(self.reasoning.open) is None:
                lark.never_first = self.reasoning.open
        if self.tool_format is not None:
            start = self.tool_format.grammar(lark, answer)
        else:
            assert answer.content is not None
            start = answer.content
        return lark.source(f"{first} {start}")


def _plain(source: Source) -> Parsing[None]:
    """All of it is content."""
    while True:
        text, source.position = source.rest, len(source.text)
        yield Piece("content", text)
        if source.is_closed:
            return
        yield None


def _read_arguments(function: dict[str, Any]) -> Any:
    """The arguments of a call in a conversation.

    Raises:
        RequestError: They are no JSON object.
    """
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    if not isinstance(arguments, dict):
        raise RequestError(
            f"messages: the arguments of a call of {function['name']} are no JSON object", "messages"
        )
    return arguments


def describe_tools(tools: Sequence[Tool]) -> str:
    """What a model is told of tools where its chat template knows none."""
    declarations = "\n".join(json.dumps(tool.declaration, ensure_ascii=False) for tool in tools)
    return (
        "You can call functions. Each is described here by a name and a JSON schema of its arguments:\n"
        f"<tools>\n{declarations}\n</tools>\n"
        "To call one, write its name and its arguments as JSON between these tags, once for each call:\n"
        '<tool_call>\n{"name": "the function\'s name", "arguments": {"argument": "value"}}\n</tool_call>\n'
        "You will be given what it returns between <tool_response> and </tool_response>."
    )


def _without_tools(messages: Sequence[Message], tools: list[Tool], takes_system: bool) -> Iterator[Message]:
    """The messages as templates take them that know no tools: calls and results are text.

    Args:
        tools: What the first message says of; none: nothing.
    """
    told = describe_tools(tools) if tools else ""
    results: list[str] = []
    for message in messages:
        role = message["role"]
        if role == "tool":
            results.append(f"<tool_response>\n{_text(message)}\n</tool_response>")
            continue
        if results and role == "user":
            # One message: there are templates that want users and assistants to take turns.
            message = {**message, "content": "\n".join([*results, _text(message)])}
            results = []
        elif results:
            yield {"role": "user", "content": "\n".join(results)}
            results = []
        if told and (role == "system" or (role == "user" and not takes_system)):
            message, told = {**message, "content": "\n\n".join(filter(None, [_text(message), told]))}, ""
        elif told and takes_system:
            yield {"role": "system", "content": told}
            told = ""
        calls = message.get("tool_calls")
        if calls:
            message = {key: value for key, value in message.items() if key != "tool_calls"}
            message["content"] = "\n".join(filter(None, [_text(message), *map(_written_call, calls)]))
        yield message
    if results:
        yield {"role": "user", "content": "\n".join(results)}


def _written_call(call: dict[str, Any]) -> str:
    function = call["function"]
    written = {"name": function["name"], "arguments": _read_arguments(function)}
    return f"<tool_call>\n{json.dumps(written, ensure_ascii=False)}\n</tool_call>"


def _lark_of(form: StructuredOutputs) -> str:
    """
    Raises:
        RequestError: The form is a grammar that cannot be read.
    """
    try:
        return lark_of(form)
    except ValueError as error:
        raise RequestError(f"{FIELD}: {error}", FIELD) from None


def _text(message: Message) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
