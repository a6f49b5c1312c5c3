"""A chat as every endpoint for chats hands it on: none of them knows another's words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from api.errors import ApiError
from engine.frontend.tools import NO_CALLS, ToolChoice

if TYPE_CHECKING:
    from engine.core.structured_outputs import StructuredOutputs
    from engine.frontend.chat_format import ChatFormat, ChatTurn
    from engine.frontend.tool_formats.format import Tool

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""How much a model may think, in OpenAI's words."""

VERBOSITIES = ("low", "medium", "high")


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a model is to answer.

    Attributes:
        messages: As `ChatFormat.turn` takes them.
        choice: What of the tools may be called.
        is_parallel: Whether there may be several calls in the answer.
        form: What an answer must be that calls nothing; None: free text.
        template_arguments: Further arguments of the model's chat template.
        adds_special_tokens: Whether the tokenizer adds its own to what the template writes.
    """

    messages: Sequence[dict[str, Any]]
    tools: Sequence[Tool] = ()
    choice: ToolChoice = NO_CALLS
    is_parallel: bool = True
    form: StructuredOutputs | None = None
    template_arguments: dict[str, Any] = field(default_factory=dict)
    adds_special_tokens: bool = False

    def turn(self, chat_format: ChatFormat) -> ChatTurn:
        """The prompt, and how its answer is to be read.

        Raises:
            RequestError: The template does not take it, or a tool or the form cannot be kept; names the field.
        """
        return chat_format.turn(
            self.messages,
            self.tools,
            self.choice,
            self.is_parallel,
            self.form,
            self.adds_special_tokens,
            **self.template_arguments,
        )


def verbosity_arguments(verbosity: str, field: str) -> dict[str, Any]:
    """What the chat template is told of how much the model is to say.

    Raises:
        ApiError: 400, it is none of VERBOSITIES; `field` names it.
    """
    if verbosity not in VERBOSITIES:
        raise ApiError(
            400, f"{field} must be one of {', '.join(VERBOSITIES)}, got {verbosity!r}", param=field
        )
    return {"verbosity": verbosity}


def effort_arguments(effort: str, field: str) -> dict[str, Any]:
    """What the chat template is told of how much the model may think.

    Raises:
        ApiError: 400, it is none of EFFORTS; `field` names it.
    """
    if effort not in EFFORTS:
        raise ApiError(400, f"{field} must be one of {', '.join(EFFORTS)}, got {effort!r}", param=field)
    off = {"enable_thinking": False} if effort == "none" else {}
    return {"reasoning_effort": effort, **off}
