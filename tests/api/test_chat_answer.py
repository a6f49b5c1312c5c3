"""Messages of texts, whole and streamed; the same in whatever pieces the text comes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET, to_builtins

from api.chat_answer import ChatAnswerWriter
from api.errors import ApiError
from api.openai_messages import read_conversation
from api.protocol import ChatCompletionRequest, decode_request
from engine.frontend.chat_format import ChatFormat, ChatTurn
from engine.frontend.tool_formats import TOOL_FORMATS
from tests.frontend.test_tool_formats import WRITERS, answers, cut
from tests.helpers.chat_templates import PLAIN, TEMPLATES, THINKING, tokenizer_of

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
ASKED = {"role": "user", "content": "How is the weather?"}


def message(turn: ChatTurn, text: str, is_legacy: bool = False, has_reasoning: bool = True) -> dict[str, Any]:
    """A whole answer; ids of calls, which are random, left out."""
    whole = to_builtins(ChatAnswerWriter(turn, is_legacy, has_reasoning).message(text))
    for call in whole.get("tool_calls", []):
        del call["id"]
    return whole


def streamed(turn: ChatTurn, texts: list[str], is_legacy: bool = False) -> dict[str, Any]:
    """Deltas joined as clients do it."""
    writer = ChatAnswerWriter(turn, is_legacy, has_reasoning=True)
    joined: dict[str, Any] = {"content": "", "role": "assistant", "refusal": None}
    for index, text in enumerate(texts):
        delta = to_builtins(writer.write(text, is_last=index == len(texts) - 1))
        for name in ("content", "reasoning_content"):
            if name in delta:
                joined[name] = joined.get(name, "") + delta[name]
        for call in delta.get("tool_calls", []):
            calls = joined.setdefault("tool_calls", [])
            if "id" in call:
                assert call["index"] == len(calls)
                calls.append({"type": call["type"], call["type"]: dict.fromkeys(call[call["type"]], "")})
            begun = calls[call["index"]]
            for name, value in call[begun["type"]].items():
                begun[begun["type"]][name] = begun[begun["type"]].get(name, "") + value
        for name, value in delta.get("function_call", {}).items():
            called = joined.setdefault("function_call", {"name": "", "arguments": ""})
            called[name] += value
    if not joined["content"] and ("tool_calls" in joined or "function_call" in joined):
        joined["content"] = None
    return joined


@pytest.mark.parametrize("name", TOOL_FORMATS)
@settings(max_examples=20)
@given(data=st.data())
def test_deltas_joined_are_the_message(name: str, data: st.DataObject) -> None:
    turn = ChatTurn([], None, False, TOOL_FORMATS[name].parse)
    text = WRITERS[name](*data.draw(answers(name)))
    places = data.draw(st.lists(st.integers(min_value=0, max_value=10**4), max_size=6))
    whole = message(turn, text)
    assert streamed(turn, cut(text, places)) == whole
    assert streamed(turn, [*text, ""]) == whole


def test_answers_that_are_content_alone_need_no_parser() -> None:
    """They are what a parser makes of them, marks of calls and all."""
    plain = turn_of(PLAIN)
    assert plain.is_plain
    assert not turn_of(TEMPLATES["hermes"], tools=[TOOL]).is_plain
    assert not turn_of(THINKING).is_plain
    pieces = ["", "a", CALL, "\U0001f468\u200d", ""]
    parsed = replace(plain, is_plain=False)
    for last in ("b", ""):
        assert streamed(plain, [*pieces, last]) == streamed(parsed, [*pieces, last])
        assert message(plain, "".join(pieces) + last) == message(parsed, "".join(pieces) + last)
    unread = replace(plain, parse=TOOL_FORMATS["hermes"].parse)
    assert message(unread, CALL)["content"] == CALL


CALL = '<tool_call>\n{"name": "f", "arguments": {"input": "a\\nb"}}\n</tool_call>'


def turn_of(template: str, **fields: Any) -> ChatTurn:
    body = {"messages": [ASKED], **fields}
    request = decode_request(json.dumps(body).encode(), ChatCompletionRequest)
    return read_conversation(request, None).turn(ChatFormat(tokenizer_of(template)))


def test_inputs_of_custom_tools_are_texts() -> None:
    turn = turn_of(PLAIN, tools=[{"type": "custom", "custom": {"name": "f"}}])
    whole = message(turn, CALL)
    assert whole["tool_calls"] == [{"type": "custom", "custom": {"name": "f", "input": "a\nb"}}]
    assert streamed(turn, [*CALL, ""]) == whole
    assert message(turn, CALL[:40])["tool_calls"] == [
        {"type": "custom", "custom": {"name": "f", "input": ""}}
    ]


@pytest.mark.parametrize("escaped", ["a\\n", "a\\u00e9", "a\\ud83d\\ude00", 'a\\"'])
def test_the_input_of_a_call_that_is_cut_off_goes_as_far_as_it_does(escaped: str) -> None:
    turn = turn_of(PLAIN, tools=[{"type": "custom", "custom": {"name": "f"}}])
    begun = '<tool_call>\n{"name": "f", "arguments": {"input": "'
    for end in range(1, len(escaped)):
        (call,) = message(turn, begun + escaped[:end])["tool_calls"]
        assert call["custom"]["input"] == "a"
    (call,) = message(turn, begun + escaped)["tool_calls"]
    assert call["custom"]["input"] == json.loads(f'"{escaped}"')


def test_older_clients_get_a_function_call() -> None:
    turn = turn_of(PLAIN, functions=[{"name": "f"}])
    whole = message(turn, f"Now:\n{CALL}", is_legacy=True)
    assert whole["content"] == "Now:"
    assert whole["function_call"] == {"name": "f", "arguments": '{"input": "a\\nb"}'}
    assert streamed(turn, [*f"Now:\n{CALL}", ""], is_legacy=True) == whole


def test_reasoning_is_a_part_of_its_own_or_left_out() -> None:
    turn = turn_of(THINKING)
    text = "<think>\nHm.\n</think>\n\nIt rains."
    whole = message(turn, text)
    assert (whole["reasoning_content"], whole["content"]) == ("Hm.", "It rains.")
    assert streamed(turn, [*text, ""]) == whole
    without = ChatAnswerWriter(turn, is_legacy=False, has_reasoning=False).message(text)
    assert (without.reasoning_content, without.content) == (UNSET, "It rains.")


def test_the_reason_of_an_end_is_a_call_only_where_it_stopped() -> None:
    turn = turn_of(PLAIN, tools=[{"type": "function", "function": {"name": "f"}}])
    for text, reason, expected in (
        (CALL, "stop", "tool_calls"),
        (CALL, "length", "length"),
        ("Hm.", "stop", "stop"),
        (CALL, None, None),
        # A stop string has cut it; or stands behind it.
        (CALL[: CALL.index("}")], "stop", "stop"),
        (CALL.removesuffix("</tool_call>"), "stop", "tool_calls"),
    ):
        writer = ChatAnswerWriter(turn, is_legacy=False, has_reasoning=True)
        writer.write(text, is_last=True)
        assert writer.finish_reason(reason) == expected  # type: ignore[arg-type]


def test_effort_and_thinking_go_to_the_template() -> None:
    template = "{{ reasoning_effort }} {{ enable_thinking }}"

    def rendered(**fields: Any) -> str:
        return tokenizer_of(template).decode(turn_of(template, **fields).prompt_token_ids)

    assert rendered() == " "
    assert rendered(reasoning_effort="high") == "high "
    assert rendered(reasoning_effort="none") == "none False"
    assert rendered(enable_thinking=True) == " True"
    assert rendered(chat_template_kwargs={"enable_thinking": False}) == " False"


def test_verbosity_and_documents_go_to_the_template() -> None:
    template = "{{ verbosity }}{% for one in documents or () %} {{ one.title }}: {{ one.text }}{% endfor %}"

    def rendered(**fields: Any) -> str:
        return tokenizer_of(template).decode(turn_of(template, **fields).prompt_token_ids)

    assert rendered() == ""
    assert rendered(verbosity="low") == "low"
    documents = [{"title": "Rain", "text": "wet"}, {"title": "Sun", "text": "dry"}]
    assert rendered(documents=documents) == " Rain: wet Sun: dry"
    assert rendered(verbosity="high", documents=documents[1:]) == "high Sun: dry"


def test_a_call_with_arguments_that_are_no_json_is_refused() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}}
    for template in (PLAIN, TEMPLATES["mistral"]):
        with pytest.raises(Exception, match="no JSON object"):
            turn_of(template, messages=[ASKED, {"role": "assistant", "tool_calls": [call]}])
    with pytest.raises(ApiError, match=r"messages\[1\].tool_calls\[0\].id"):
        turn_of(PLAIN, messages=[ASKED, {"role": "assistant", "tool_calls": [{**call, "id": None}]}])
