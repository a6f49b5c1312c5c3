"""The bodies of Anthropic's requests. None means not given; members without a field here are accepted and counted.

A field of type Any is accepted without effect, or refused where `conversation.py` says so.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from api.protocol import Integer


class Block(Struct, kw_only=True):
    """A block of content of any kind; `type` says which members it has."""

    type: str

    # text, and its marks
    text: str | None = None
    cache_control: Any = None
    citations: Any = None

    # thinking, redacted_thinking
    thinking: str | None = None
    signature: str | None = None
    data: Any = None

    # tool_use
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    caller: Any = None
    toolset_name: Any = None

    # tool_result, and the tool_reference in it
    tool_use_id: str | None = None
    content: str | list[Block] | dict[str, Any] | None = None
    is_error: bool | None = None
    tool_name: str | None = None


class Message(Struct, kw_only=True):
    role: str
    content: str | list[Block]


class Tool(Struct, kw_only=True):
    """A tool of the client's, or one that Anthropic's own servers know by its `type`."""

    type: str | None = None
    name: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: bool | None = None
    input_examples: list[dict[str, Any]] | None = None
    allowed_callers: list[str] | None = None
    cache_control: Any = None
    eager_input_streaming: Any = None


class ToolChoice(Struct, kw_only=True):
    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Struct, kw_only=True):
    type: str
    display: str | None = None
    budget_tokens: Any = None


class OutputFormat(Struct, kw_only=True):
    type: str
    schema: dict[str, Any] | None = None


class OutputConfig(Struct, kw_only=True):
    effort: str | None = None
    format: OutputFormat | None = None
    task_budget: Any = None


class ContextEdit(Struct, kw_only=True):
    type: str
    keep: Any = None


class ContextManagement(Struct, kw_only=True):
    edits: list[ContextEdit] | None = None


class CountRequest(Struct, kw_only=True):
    """What of a request makes the prompt."""

    messages: list[Message]
    model: str | None = None
    system: str | list[Block] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    context_management: ContextManagement | None = None

    # Known, and refused: they change the answer.
    compaction: Any = None
    container: Any = None
    mcp_servers: Any = None
    thread: Any = None

    # Accepted without effect.
    betas: Any = None
    billing_policy: Any = None
    cache_control: Any = None
    diagnostics: Any = None
    fallback_credit_token: Any = None
    fallbacks: Any = None
    inference_geo: Any = None
    metadata: Any = None
    service_tier: Any = None
    speed: Any = None
    user_profile_id: Any = None
    workspace_id: Any = None


class MessageRequest(CountRequest, kw_only=True):
    max_tokens: Integer
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_k: Integer | None = None
    top_p: float | None = None

    # As in chats.
    cache_salt: str | None = None
    timeout: float | None = None
