"""What a model is told of the bodies that Anthropic's clients send, without a server."""

from __future__ import annotations

import json
import logging
from typing import Any, get_type_hints

import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_create_params as beta_params

from api.anthropic.conversation import read_conversation
from api.anthropic.protocol import CountRequest, MessageRequest
from api.errors import ApiError
from api.kept_reasoning import keep_reasoning, recall_reasoning
from api.protocol import decode_body
from api.unknown_members import find_unknown
from engine.errors import RequestError
from engine.frontend.chat_format import ChatFormat
from tests.helpers.chat_templates import PLAIN, TEMPLATES, THINKING, tokenizer_of

TOOL: dict[str, Any] = {
    "name": "look_up",
    "description": "Looks it up.",
    "input_schema": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "look_up", "input": {"word": "tide"}}
ASKED = {"role": "user", "content": "What is a tide?"}
CALLED = {"role": "assistant", "content": [CALL]}


def conversation_of(*messages: Any, **fields: Any):
    body = {"messages": list(messages) or [ASKED], **fields}
    return read_conversation(decode_body(json.dumps(body).encode(), CountRequest))


def prompt_of(template: str, *messages: Any, **fields: Any) -> str:
    tokenizer = tokenizer_of(template)
    turn = conversation_of(*messages, **fields).turn(ChatFormat(tokenizer))
    return tokenizer.decode(turn.prompt_token_ids, skip_special_tokens=False)


def refusal(*messages: Any, **fields: Any) -> str:
    with pytest.raises(ApiError) as caught:
        conversation_of(*messages, **fields)
    assert caught.value.status == 400
    assert caught.value.param is not None
    return caught.value.message


def result(**members: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", **members}]}


def test_every_field_of_the_official_client_is_known() -> None:
    known = set(MessageRequest.__struct_fields__)
    assert set(get_type_hints(message_create_params.MessageCreateParamsBase)) <= known
    assert set(get_type_hints(beta_params.MessageCreateParamsBase)) <= known
    counted = set(get_type_hints(message_count_tokens_params.MessageCountTokensParams))
    assert counted <= set(CountRequest.__struct_fields__)


def test_a_null_means_not_given() -> None:
    required = {"messages": [ASKED], "max_tokens": 1}
    nulls = {field: None for field in MessageRequest.__struct_fields__ if field not in required}
    read_conversation(decode_body(json.dumps({**nulls, **required}).encode(), MessageRequest))


def test_the_system_prompt_is_text_or_blocks() -> None:
    blocks = [
        {"type": "text", "text": "Be brief."},
        {"type": "text", "text": "", "cache_control": {"type": "ephemeral"}},
    ]
    expected = "<|sys|>Be brief.<|eot|><|user|>What is a tide?<|eot|><|bot|>"
    assert prompt_of(PLAIN, system="Be brief.") == prompt_of(PLAIN, system=blocks) == expected
    assert prompt_of(PLAIN, system="") == prompt_of(PLAIN)


def test_a_header_for_billing_is_no_part_of_the_prompt() -> None:
    plain = prompt_of(PLAIN, system="Be brief.")
    for number in (1, 2):
        header = f"x-anthropic-billing-header: cc_version=2.1.{number}; cch={number};"
        block = {"type": "text", "text": header}
        assert prompt_of(PLAIN, system=[block, {"type": "text", "text": "Be brief."}]) == plain
        assert prompt_of(PLAIN, system=f"{header}\nBe brief.") == plain
        assert prompt_of(PLAIN, system=[block]) == prompt_of(PLAIN)
    assert "x-anthropic" in prompt_of(PLAIN, system="Say x-anthropic-billing-header: to nobody.")


def test_system_messages_stay_in_place_whatever_their_shape() -> None:
    told = {"role": "system", "content": "The tide is out."}
    marked = {
        "role": "system",
        "content": [{"type": "text", "text": "The tide is out.", "cache_control": {}}],
    }
    prompt = prompt_of(PLAIN, ASKED, CALLED, result(content="ok"), told, system="Be brief.")
    assert prompt.endswith("<|sys|>The tide is out.<|eot|><|bot|>")
    assert prompt == prompt_of(PLAIN, ASKED, CALLED, result(content="ok"), marked, system="Be brief.")


def test_neighbours_of_one_role_are_one_turn() -> None:
    prompt = prompt_of(PLAIN, {"role": "user", "content": "First."}, {"role": "user", "content": "Second."})
    assert prompt == "<|user|>First.\nSecond.<|eot|><|bot|>"


def test_results_come_in_their_order_and_say_what_failed() -> None:
    parts = [{"type": "text", "text": "high"}, {"type": "text", "text": "low"}]
    after = {"type": "text", "text": "And now?"}
    for given, told in (
        ({"content": "high\nlow"}, "high\nlow"),
        ({"content": parts}, "high\nlow"),
        ({"content": parts, "is_error": False}, "high\nlow"),
        ({"content": "no such word", "is_error": True}, "Error: no such word"),
        ({}, ""),
    ):
        message = result(**given)
        message["content"].append(after)
        prompt = prompt_of(TEMPLATES["hermes"], ASKED, CALLED, message, tools=[TOOL])
        call = '<|bot|><tool_call>\n{"name": "look_up", "arguments": {"word": "tide"}}\n</tool_call><|eot|>'
        assert prompt.endswith(f"{call}<|tool|>{told}<|eot|><|user|>And now?<|eot|><|bot|>")


def test_thoughts_go_back_to_the_template_as_reasoning() -> None:
    def reasoning(*blocks: dict[str, Any]) -> Any:
        said = {"role": "assistant", "content": [*blocks, {"type": "text", "text": "Water."}]}
        (message,) = [
            one for one in conversation_of(ASKED, said, ASKED).messages if one["role"] == "assistant"
        ]
        assert message["content"] == "Water."
        return message.get("reasoning_content")

    assert reasoning({"type": "thinking", "thinking": "The moon.", "signature": ""}) == "The moon."
    hidden = keep_reasoning("The moon, ☾.")
    assert reasoning({"type": "thinking", "thinking": "", "signature": hidden}) == "The moon, ☾."
    assert reasoning({"type": "thinking", "thinking": "", "signature": "EqoBCkgIARAB"}) is None
    assert reasoning({"type": "redacted_thinking", "data": "EqoBCkgIARAB"}) is None
    for signature in ("", "reasoning:", "reasoning:é", "reasoning:gA=="):
        assert recall_reasoning(signature) == ""


@pytest.mark.parametrize(
    ("thinking", "prompt_end"),
    [
        (None, "<|bot|>"),
        ("enabled", "<|bot|>"),
        ("adaptive", "<|bot|>"),
        ("disabled", "<|bot|><think>\n\n</think>\n\n"),
    ],
)
def test_thinking_is_the_switch_of_the_template(thinking: str | None, prompt_end: str) -> None:
    fields = {} if thinking is None else {"thinking": {"type": thinking, "budget_tokens": 2000}}
    assert prompt_of(THINKING, **fields).endswith(prompt_end)
    assert (
        prompt_of("{{ enable_thinking }} {{ reasoning_effort }}", output_config={"effort": "high"}) == " high"
    )


def test_an_answer_is_gone_on_with() -> None:
    begun = {"role": "assistant", "content": "A tide is"}
    assert prompt_of(PLAIN, ASKED, begun).endswith("<|bot|>A tide is")
    assert prompt_of(PLAIN, ASKED, begun, tools=[TOOL], tool_choice={"type": "none"}).endswith("A tide is")
    assert "at the end" in refusal(ASKED, begun, tools=[TOOL])
    assert "at the end" in refusal(ASKED, CALLED)


@pytest.mark.parametrize(
    ("choice", "mode", "names", "is_named", "is_parallel"),
    [
        (None, "auto", None, False, True),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", None, False, False),
        ({"type": "any"}, "required", None, False, True),
        ({"type": "tool", "name": "look_up"}, "required", {"look_up"}, True, True),
        ({"type": "none"}, "none", None, False, True),
    ],
)
def test_choices(choice: Any, mode: str, names: Any, is_named: bool, is_parallel: bool) -> None:
    read = conversation_of(tools=[TOOL], tool_choice=choice)
    assert (read.choice.mode, read.choice.names, read.choice.is_named) == (mode, names, is_named)
    assert read.is_parallel is is_parallel
    assert conversation_of(tool_choice={"type": "auto"}).choice.mode == "none"


def test_tools_of_servers_and_tools_to_be_found_are_not_offered() -> None:
    search = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}
    later = {**TOOL, "name": "later", "defer_loading": True}
    by_code = {**TOOL, "name": "by_code", "allowed_callers": ["code_execution_20260120"]}
    tools = [search, later, by_code, {**TOOL, "type": "custom"}]
    assert [tool.name for tool in conversation_of(tools=tools).tools] == ["look_up"]
    found = result(content=[{"type": "tool_reference", "tool_name": "later"}])
    read = conversation_of(ASKED, CALLED, found, tools=tools)
    assert [tool.name for tool in read.tools] == ["later", "look_up"]
    # It is told of where it was found: the prompt up to there is as it was.
    for template in (PLAIN, TEMPLATES["hermes"]):
        before = prompt_of(template, ASKED, tools=tools)
        after = prompt_of(template, ASKED, CALLED, found, tools=tools)
        assert after.startswith(before)
        assert after.count('"name": "later"') == 1
    assert "no tool 'f'" in refusal(
        ASKED, CALLED, result(content=[{"type": "tool_reference", "tool_name": "f"}]), tools=tools
    )


def test_examples_of_inputs_are_described() -> None:
    (tool,) = conversation_of(tools=[{**TOOL, "input_examples": [{"word": "ebb"}]}]).tools
    assert tool.declaration["function"]["description"] == (
        'Looks it up.\nAn example of its input: {"word": "ebb"}'
    )


def test_a_schema_that_cannot_be_kept_is_refused_where_it_must_be(caplog: pytest.LogCaptureFixture) -> None:
    schema = {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True}}}
    tool = {**TOOL, "input_schema": schema}
    chat_format = ChatFormat(tokenizer_of(TEMPLATES["hermes"]))
    with pytest.raises(RequestError, match=r"tools\[0\].input_schema.*uniqueItems"):
        conversation_of(tools=[{**tool, "strict": True}]).turn(chat_format)
    with caplog.at_level(logging.WARNING):
        turns = [conversation_of(tools=[tool]).turn(chat_format) for _ in range(2)]
    assert "uniqueItems" in caplog.text
    assert len(caplog.records) == 1
    # The model is told of the schema all the same.
    assert '"uniqueItems": true' in tokenizer_of(TEMPLATES["hermes"]).decode(turns[0].prompt_token_ids)
    assert turns[0].form is not None


@pytest.mark.parametrize(
    ("messages", "fields", "what"),
    [
        ([], {"messages": []}, "messages must hold"),
        ([{"role": "tool", "content": ""}], {}, "messages[0].role"),
        ([{"role": "user", "content": [{"type": "image", "source": {}}]}], {}, "messages[0].content[0].type 'image'"),
        ([ASKED, CALLED, result(content=[{"type": "document"}])], {}, "messages[2].content[0].content[0].type"),
        ([ASKED, CALLED, result(content={"type": "x"})], {}, "messages[2].content[0].content"),
        ([ASKED, {"role": "assistant", "content": [{"type": "server_tool_use"}]}, ASKED], {}, "server_tool_use"),
        ([{"role": "user", "content": [{"type": "text"}]}], {}, "messages[0].content[0].text"),
        ([ASKED, {"role": "assistant", "content": [{"type": "tool_use", "id": "a"}]}], {}, "content[0].name"),
        ([ASKED, result(content="")], {}, "'toolu_1' is of no tool_use"),
        ([ASKED, CALLED, {"role": "user", "content": [{"type": "tool_result"}]}], {}, "tool_use_id"),
        ([], {"tools": [{**TOOL, "name": "a b"}]}, "tools[0].name"),
        ([], {"tools": [TOOL, TOOL]}, "is taken by a tool before it"),
        ([], {"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ([], {"tools": [{"type": "bash_20250124", "name": "bash"}]}, "bash_20250124"),
        ([], {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "f"}}, "a call of 'f'; there are look_up"),
        ([], {"tool_choice": {"type": "any"}}, "no tools"),
        ([], {"tools": [TOOL], "tool_choice": {"type": "most"}}, "tool_choice.type"),
        ([], {"thinking": {"type": "between_tools"}}, "thinking.type"),
        ([], {"system": [{"type": "image", "source": {}}]}, "system[0].type"),
        ([], {"mcp_servers": [{"url": "https://example.com"}]}, "mcp_servers"),
        ([], {"container": "c"}, "container"),
        ([], {"output_config": {"task_budget": {}}}, "task_budget"),
        ([], {"context_management": {"edits": [{"type": "compact_20260112"}]}}, "compact_20260112"),
        ([], {"output_config": {"format": {"type": "text"}}}, "output_config.format"),
        (
            [],
            {"output_format": {"type": "json_schema"}, "output_config": {"format": {"type": "json_schema"}}},
            "output_format",
        ),
    ],
)  # fmt: skip
def test_what_is_not_here_is_refused(messages: list[Any], fields: dict[str, Any], what: str) -> None:
    assert what in refusal(*messages, **fields)


def test_too_many_tools_are_refused() -> None:
    with pytest.raises(RequestError, match="129 tools; at most 128"):
        conversation_of(tools=[{**TOOL, "name": f"f{i}"} for i in range(129)])
    with pytest.raises(RequestError, match="bytes; at most 262144"):
        conversation_of(tools=[{**TOOL, "description": "x" * 2**18}])


def test_kept_thoughts_and_cache_marks_change_nothing() -> None:
    edits = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    fields = {"context_management": edits, "cache_control": {"type": "ephemeral"}, "speed": "fast"}
    assert prompt_of(PLAIN, **fields) == prompt_of(PLAIN)


def test_members_that_nothing_reads_are_found() -> None:
    body = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a", "trace": 1}], "new": 1}],
        "tools": [{**TOOL, "input_schema": {"anything": {}}, "rank": 1}],
        "stream_options": {},
    }
    decode_body(json.dumps(body).encode(), CountRequest)
    assert set(find_unknown(body, CountRequest)) == {
        "messages[].content[].trace", "messages[].new", "tools[].rank", "stream_options"
    }  # fmt: skip
