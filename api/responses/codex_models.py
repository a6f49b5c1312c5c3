"""What Codex CLI asks of a list of models: a `models` array beside OpenAI's `data`, or it takes the list for broken.

An entry has every member that some version of Codex has required; one that is missing makes it drop the whole list.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

BASE_INSTRUCTIONS = (
    "You are a coding agent in a terminal. You share a workspace with the user. Read what you need with the tools "
    "that you are given, change files as the user asks, check what you changed, and say in a few words what you did. "
    "Ask only where you cannot find out, and leave alone what is none of the task's."
)
"""What Codex tells the model first; an entry must have it, and it stands in for Codex's own."""

MAX_OUTPUT_TOKENS = 10_000
"""Tokens of a tool's output, beyond which Codex shortens it."""


class TruncationPolicy(Struct, frozen=True):
    limit: int = MAX_OUTPUT_TOKENS
    mode: Literal["tokens"] = "tokens"


class CodexModel(Struct, kw_only=True):
    """A model as Codex's ModelInfo has it.

    Attributes:
        apply_patch_tool_type: The custom tool that keeps a grammar; without it Codex offers no tool that edits files.
        auto_compact_token_limit: Tokens of a conversation, beyond which Codex shortens it.
        effective_context_window_percent: The share of the context that Codex fills.
    """

    slug: str
    display_name: str
    context_window: int
    max_context_window: int
    auto_compact_token_limit: int
    description: str | None = None
    default_reasoning_level: None = None
    supported_reasoning_levels: list[Any] = []
    shell_type: Literal["default"] = "default"
    visibility: Literal["list"] = "list"
    supported_in_api: bool = True
    priority: int = 0
    additional_speed_tiers: list[Any] = []
    service_tiers: list[Any] = []
    default_service_tier: None = None
    availability_nux: None = None
    upgrade: None = None
    base_instructions: str = BASE_INSTRUCTIONS
    model_messages: None = None
    supports_reasoning_summaries: bool = False
    default_reasoning_summary: Literal["auto"] = "auto"
    support_verbosity: bool = False
    default_verbosity: None = None
    apply_patch_tool_type: Literal["freeform"] = "freeform"
    web_search_tool_type: Literal["text"] = "text"
    truncation_policy: TruncationPolicy = TruncationPolicy()
    supports_parallel_tool_calls: bool = True
    supports_image_detail_original: bool = False
    effective_context_window_percent: int = 95
    experimental_supported_tools: list[Any] = []
    input_modalities: tuple[Literal["text"]] = ("text",)
    supports_search_tool: bool = False
    use_responses_lite: bool = False
    auto_review_model_override: None = None
    tool_mode: None = None
    multi_agent_version: None = None


def codex_model(name: str, max_model_len: int) -> CodexModel:
    """The entry of a model that is served under a name.

    Args:
        max_model_len: Tokens that the context holds.
    """
    return CodexModel(
        slug=name,
        display_name=name,
        context_window=max_model_len,
        max_context_window=max_model_len,
        auto_compact_token_limit=max_model_len * 9 // 10,
    )
