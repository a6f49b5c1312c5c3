"""Chat templates: Jinja set up as Hugging Face's models expect it, in a sandbox.

A template is a program over what a client sends. It may run for so long and write so much, and `range` has Jinja's
own limit; what it writes is taken piece by piece, so that one that writes without end is stopped, too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.core.limits import MAX_RENDERED_CHARACTERS, MAX_RENDERING_SECONDS
from engine.errors import RequestError

# Its blank tells whether a template trims what it gets. No client writes code points for private use.
_MARK = "\ue000end of the content\ue000 "


_began: ContextVar[tuple[float, float]] = ContextVar("began", default=(float("inf"), float("inf")))
"""When the rendering of this thread began: in seconds that have gone by, and in those of its own CPU time."""


def _check_time() -> None:
    began, own = _began.get()
    # CPU time counts, so that a busy machine costs none; but to ask for it is a call of the system.
    if (
        time.perf_counter() > began + MAX_RENDERING_SECONDS
        and time.thread_time() > own + MAX_RENDERING_SECONDS
    ):
        raise TemplateError(f"it ran for {MAX_RENDERING_SECONDS:g} s, and was stopped")


class _Environment(ImmutableSandboxedEnvironment):
    """Looks at the clock whenever a template reaches into what it was given, or calls something.

    A loop that does neither does not depend on what a client sends.
    """

    def getattr(self, obj: Any, attribute: str) -> Any:
        _check_time()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _check_time()
        return super().getitem(obj, argument)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        _check_time()
        return super().call(context, function, *args, **kwargs)


class ChatTemplate:
    """A compiled chat template.

    Attributes:
        variables: What every rendering sees besides its own arguments, like "bos_token".

    Raises:
        RequestError: The source is no valid template.
    """

    def __init__(self, source: str, variables: dict[str, Any]) -> None:
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.variables = variables
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise RequestError(f"the model's chat template is not valid: {error}", "messages") from error

    def render(self, messages: list[dict[str, Any]], **arguments: Any) -> str:
        """The prompt for `messages`.

        Raises:
            RequestError: The messages are not what the template takes, or keep it busy for too long.
        """
        outer = _began.set((time.perf_counter(), time.thread_time()))
        try:
            return _joined(self._template.generate(messages=messages, **{**self.variables, **arguments}))
        except Exception as error:  # the template is a program over the client's data: it may raise anything
            reason = str(error) or type(error).__name__
            raise RequestError(f"the chat template cannot render messages: {reason}", "messages") from error
        finally:
            _began.reset(outer)

    def render_open(self, messages: list[dict[str, Any]], **arguments: Any) -> str:
        """The prompt up to the end of the last message's content, for the model to go on with.

        Where that is, a mark at its end tells: the content itself may occur elsewhere, too ("<").

        Raises:
            RequestError: As `render`; or there is no such text, or the template rewrites it.
        """
        last = messages[-1] if messages else {}
        content = last.get("content")
        if isinstance(content, list) and content:
            text = content[-1]["text"]
            marked: Any = [*content[:-1], {**content[-1], "text": text + _MARK}]
        else:
            text = content
            marked = f"{content}{_MARK}"
        if not isinstance(text, str) or not text.strip():
            raise RequestError("continue_final_message needs a message with text at the end", "messages")
        rendered = self.render([*messages[:-1], {**last, "content": marked}], **arguments)
        start = rendered.rfind(_MARK.strip())
        if start < 0 or text.strip() not in rendered:
            raise RequestError(
                "continue_final_message: the chat template rewrites the last message", "messages"
            )
        # A template that trims the mark's own blank would have trimmed the content's.
        is_trimmed = not rendered.startswith(_MARK, start)
        return rendered[:start].rstrip() if is_trimmed else rendered[:start]

    @cached_property
    def walks_parts(self) -> bool:
        """Whether the template takes a content that is a list of parts of text: tried out with one."""
        words = ("first-part", "second-part")
        parts = [{"type": "text", "text": word} for word in words]
        try:
            rendered = self.render([{"role": "user", "content": parts}], add_generation_prompt=True)
        except RequestError:
            return False
        # The others add the list to a text, which fails, or write it as Python does.
        return (
            all(word in rendered for word in words) and "'text'" not in rendered and '"text"' not in rendered
        )


def _joined(pieces: Iterator[str]) -> str:
    """
    Raises:
        TemplateError: There are too many, or they take too long.
    """
    kept, size = [], 0
    for piece in pieces:
        _check_time()
        size += len(piece)
        if size > MAX_RENDERED_CHARACTERS:
            raise TemplateError(f"it wrote more than {MAX_RENDERED_CHARACTERS} characters")
        kept.append(piece)
    return "".join(kept)


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's part for training; its contents are rendered as they are."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it an instance attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML characters, which a prompt must not have."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
