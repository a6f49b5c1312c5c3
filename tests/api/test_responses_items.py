"""From items and tools of the Responses API to messages and tools, without a server."""

from __future__ import annotations

from typing import Any, cast

import pytest

from api.errors import ApiError
from api.kept_reasoning import keep_reasoning, recall_reasoning
from api.responses.endpoint import Reading
from api.responses.items import Transcript, listed_item
from api.responses.protocol import ReasoningConfig, ResponseRequest, TextConfig
from api.responses.tools import Toolbox, read_choice
from engine.errors import RequestError
from engine.frontend.chat_format import ChatFormat
from engine.frontend.tools import ToolChoice
from tests.helpers.chat_templates import tokenizer_of
from tests.helpers.scripted import BytesTokenizer


def messages_of(*items: dict[str, Any], instructions: str | None = None) -> list[dict[str, Any]]:
    transcript = Transcript(instructions, Toolbox(True))
    for index, item in enumerate(items):
        transcript.add(item, f"input[{index}]")
    assert transcript.unknown == []
    return transcript.finish()


def called(call_id: str, name: str, arguments: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


USER = {"role": "user", "content": "Hello"}
CALL = {"type": "function_call", "call_id": "a", "name": "f", "arguments": '{"x": 1}'}
RESULT = {"type": "function_call_output", "call_id": "a", "output": "one"}


def test_an_answers_items_are_one_message() -> None:
    reasoning = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I call."}]}
    patch = {
        "type": "custom_tool_call",
        "call_id": "b",
        "name": "patch",
        "input": "+a\n",
        "namespace": "edit",
    }
    done = {"type": "custom_tool_call_output", "call_id": "b", "output": "two"}
    assert messages_of(USER, reasoning, said, CALL, patch, RESULT, done, instructions="Be kind.") == [
        {"role": "system", "content": "Be kind."},
        USER,
        {
            "role": "assistant",
            "content": "I call.",
            "reasoning_content": "Hm.",
            "tool_calls": [called("a", "f", '{"x": 1}'), called("b", "edit__patch", {"input": "+a\n"})],
        },
        {"role": "tool", "tool_call_id": "a", "content": "one"},
        {"role": "tool", "tool_call_id": "b", "content": "two"},
    ]


def test_two_answers_are_two_messages() -> None:
    said = {"role": "assistant", "content": "Yes."}
    assert messages_of(USER, said, said)[1:] == [said, said]
    calls, after = messages_of(USER, CALL, said)[1:]
    assert (calls["content"], after) == (None, said)


def test_reasoning_alone_is_an_answer() -> None:
    word = keep_reasoning("Grüße 👋")
    reasoning = {"type": "reasoning", "summary": [], "encrypted_content": word}
    assert messages_of(USER, reasoning, USER)[1] == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "Grüße 👋",
    }
    assert messages_of(USER, {**reasoning, "encrypted_content": "gAAAA…"}, USER) == [USER, USER]


@pytest.mark.parametrize("word", ["", "gAAAAABm", "reasoning:*", "reasoning:/w=="])
def test_what_another_server_has_encrypted_is_not_read(word: str) -> None:
    assert recall_reasoning(word) == ""


def test_parts_of_a_result_are_parts() -> None:
    parts = [{"type": "input_text", "text": "one"}, {"type": "input_text", "text": "two"}]
    content = messages_of(USER, CALL, {**RESULT, "output": parts})[-1]["content"]
    assert content == [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert messages_of(USER, CALL, {**RESULT, "output": parts[:1]})[-1]["content"] == "one"
    assert messages_of(USER, CALL, {**RESULT, "output": []})[-1]["content"] == ""


def test_what_agents_tell_each_other() -> None:
    message = {
        "type": "agent_message",
        "author": "/root",
        "recipient": "/root/list",
        "content": [
            {"type": "input_text", "text": "A task: "},
            {"type": "encrypted_content", "encrypted_content": "list the files"},
        ],
    }
    (said,) = messages_of(message)
    assert said["role"] == "user"
    assert [part["text"] for part in said["content"]] == ["A task: ", "list the files"]


def test_calls_of_built_in_tools_are_calls_of_functions() -> None:
    shell = {
        "type": "local_shell_call",
        "id": "lsh_1",
        "call_id": "a",
        "status": "completed",
        "action": {"type": "exec", "command": ["ls"], "env": {}},
    }
    done = {"type": "local_shell_call_output", "id": "a", "output": "x.py"}
    search = {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"query": "q"}}
    calls, result, searched = messages_of(USER, shell, done, search)[1:]
    assert calls["tool_calls"] == [called("a", "local_shell", {"action": shell["action"]})]
    assert result == {"role": "tool", "tool_call_id": "a", "content": "x.py"}
    assert searched["tool_calls"] == [called("ws_1", "web_search", {"action": {"query": "q"}})]


def test_items_bring_tools() -> None:
    tool = {"type": "function", "name": "g", "parameters": {"type": "object"}}
    search = {"type": "tool_search_call", "call_id": "s", "execution": "client", "arguments": {"query": "g"}}
    found = {"type": "tool_search_output", "call_id": "s", "tools": [tool], "execution": "client"}
    more = {"type": "additional_tools", "role": "developer", "tools": [tool, {**tool, "name": "h"}]}
    box = Toolbox(True)
    transcript = Transcript(None, box)
    for index, item in enumerate([USER, search, found, more]):
        transcript.add(item, f"input[{index}]")
    assert [(one.name, one.is_listed) for one in box.tools] == [("g", False), ("h", False)]
    _, calls, result, told = transcript.finish()
    assert calls["tool_calls"] == [called("s", "tool_search", {"query": "g"})]
    # Where they are found: the prompt before stays as it was.
    assert '"name": "g"' in result["content"]
    assert told["role"] == "system"
    assert '"name": "h"' in told["content"]
    assert '"name": "g"' not in told["content"]


@pytest.mark.parametrize(
    ("items", "param"),
    [
        ([RESULT], "input[0].call_id"),
        ([CALL, {**RESULT, "call_id": "b"}], "input[1].call_id"),
        ([{"type": 1}], "input[0].type"),
        ([{"type": "function_call", "call_id": "a", "name": "f"}], "input[0].arguments"),
        ([{**USER, "content": [{"type": "input_text"}]}], "input[0].content[0].text"),
        ([{**USER, "content": [{"type": "input_file"}]}], "input[0].content[0].type"),
        ([{**USER, "content": 1}], "input[0].content"),
    ],
)
def test_what_an_item_must_be(items: list[dict[str, Any]], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        messages_of(*items)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_items_as_they_are_listed() -> None:
    item = listed_item({"role": "assistant", "content": "Yes.", "phase": None})
    assert item.pop("id").startswith("msg_")
    assert item == {
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "annotations": [], "text": "Yes."}],
    }
    assert listed_item({**RESULT, "id": "fco_1"})["id"] == "fco_1"


def toolbox_of(*tools: dict[str, Any], keeps: bool = True) -> Toolbox:
    box = Toolbox(keeps)
    for index, tool in enumerate(tools):
        box.add(tool, f"tools[{index}]")
    return box


LARK = {"type": "grammar", "syntax": "lark", "definition": 'start: "a"'}


def test_a_grammar_that_cannot_be_kept_is_shown() -> None:
    kept, shown = (
        toolbox_of(
            {"type": "custom", "name": "patch", "description": "Edits.", "format": LARK}, keeps=keeps
        ).tools[0]
        for keeps in (True, False)
    )
    assert (kept.grammar, shown.grammar) == ('start: "a"', None)
    assert shown.is_custom
    assert kept.declaration == shown.declaration


def test_tools_of_a_namespace() -> None:
    tools = [{"type": "function", "name": "f"}, {"type": "custom", "name": "c"}, {"type": "web_search"}]
    box = toolbox_of({"type": "namespace", "name": "n", "tools": tools})
    assert [(name.name, name.namespace) for name in box.names.values()] == [("f", "n"), ("c", "n")]
    assert list(box.names) == [tool.name for tool in box.tools] == ["n__f", "n__c"]
    assert box.unknown == ["tools[].type web_search"]
    choice = {"type": "custom", "name": "c", "namespace": "n"}
    assert read_choice(choice, box) == ToolChoice("required", frozenset(["n__c"]), is_named=True)


def test_too_many_tools() -> None:
    with pytest.raises(RequestError, match="at most 128"):
        toolbox_of(*({"type": "function", "name": f"f{index}"} for index in range(129))).check()
    with pytest.raises(RequestError, match="bytes"):
        toolbox_of({"type": "function", "name": "f", "description": "a" * 2**18}).check()


@pytest.mark.parametrize(
    ("limit", "kept"),
    [(100, "sys.aaaaRaaa.bbbbSbbb.cccc"), (26, "sys.aaaaRaaa.bbbbSbbb.cccc"), (25, "sys.bbbbSbbb.cccc"),
     (17, "sys.bbbbSbbb.cccc"), (16, "sys.cccc"), (8, "sys.cccc"), (7, "sys.aaaaRaaa.bbbbSbbb.cccc")],
)  # fmt: skip
def test_the_beginning_goes_where_a_conversation_is_too_long(limit: int, kept: str) -> None:
    """As much as must, up to a user's message; all stays where nothing helps."""
    chat_format = ChatFormat(cast(Any, BytesTokenizer()))
    items = [
        {"role": role, "content": text}
        for role, text in (
            ("developer", "sys."), ("user", "aaaa"), ("assistant", "Raaa."), ("user", "bbbb"),
            ("assistant", "Sbbb."), ("user", "cccc"),
        )
    ]  # fmt: skip
    reading = Reading(ResponseRequest(truncation="auto"), [], items)
    turn, _ = reading.turn(chat_format, limit)
    assert bytes(turn.prompt_token_ids).decode() == kept
    whole, _ = Reading(ResponseRequest(), [], items).turn(chat_format, limit)
    assert len(whole.prompt_token_ids) == 26


def test_effort_and_verbosity_go_to_the_template() -> None:
    tokenizer = tokenizer_of("{{ reasoning_effort }} {{ enable_thinking }} {{ verbosity }}")
    items = [{"role": "user", "content": "Hello"}]

    def rendered(**fields: Any) -> str:
        turn, _ = Reading(ResponseRequest(**fields), [], items).turn(ChatFormat(tokenizer), 99)
        return tokenizer.decode(turn.prompt_token_ids)

    assert rendered() == "  "
    assert rendered(reasoning=ReasoningConfig(effort="high")) == "high  "
    assert rendered(reasoning=ReasoningConfig(effort="none")) == "none False "
    assert rendered(text=TextConfig(verbosity="low")) == "  low"
