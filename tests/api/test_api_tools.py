"""Tools in chats, through the official client: the default model calls what it must call."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "get_time"}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
QUESTION = {"role": "user", "content": "What is the weather in Paris?"}


def chat(client: openai.OpenAI, *messages: Any, **arguments: Any) -> Any:
    defaults = {"model": "llama", "temperature": 0, "max_completion_tokens": 40, "tools": [WEATHER, TIME]}
    return client.chat.completions.create(messages=list(messages) or [QUESTION], **{**defaults, **arguments})


def check(call: Any) -> None:
    assert call.type == "function"
    assert call.id
    assert call.function.name == "get_weather"
    jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])


def test_a_named_function_is_called_once(client: openai.OpenAI) -> None:
    [choice] = chat(client, tool_choice=NAMED).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    [call] = choice.message.tool_calls
    check(call)


def test_what_is_required_is_called(client: openai.OpenAI) -> None:
    [choice] = chat(client, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False).choices
    [call] = choice.message.tool_calls
    check(call)
    several = (
        chat(client, tools=[WEATHER], tool_choice="required", max_completion_tokens=90).choices[0].message
    )
    assert len(several.tool_calls) > 1
    assert len({call.id for call in several.tool_calls}) == len(several.tool_calls)


def test_only_allowed_tools_are_called(client: openai.OpenAI) -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_time"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    [called] = chat(client, tool_choice=choice, parallel_tool_calls=False).choices
    [call] = called.message.tool_calls
    assert call.function.name == "get_time"
    assert json.loads(call.function.arguments) == {}


def test_without_a_call_tools_change_the_prompt_alone(client: openai.OpenAI) -> None:
    plain = chat(client, tools=openai.omit)
    none = chat(client, tool_choice="none")
    auto = chat(client)
    assert none.choices[0].message == plain.choices[0].message
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens < auto.usage.prompt_tokens
    assert auto.choices[0].message.tool_calls is None
    assert auto.choices[0].message.content


def test_a_call_and_its_result_can_be_sent_back(client: openai.OpenAI) -> None:
    message = chat(client, tool_choice=NAMED).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "12 degrees, rain"}
    answer = chat(client, QUESTION, message, result, max_completion_tokens=8)
    assert answer.choices[0].message.content
    # As a dictionary with null content, as other clients send it.
    plain = {
        "role": "assistant",
        "content": None,
        "tool_calls": [call.model_dump() for call in message.tool_calls],
    }
    assert chat(client, QUESTION, plain, result, max_completion_tokens=8).choices == answer.choices


@pytest.mark.parametrize(
    "arguments",
    [{"tool_choice": NAMED}, {"tool_choice": "required", "n": 2, "seed": 1, "temperature": 1}, {}],
)
def test_deltas_joined_are_the_whole_answer(client: openai.OpenAI, arguments: dict[str, Any]) -> None:
    whole = chat(client, **arguments).choices
    streams: dict[int, dict[str, Any]] = {}
    for chunk in chat(client, **arguments, stream=True):
        [choice] = chunk.choices
        joined = streams.setdefault(choice.index, {"content": "", "calls": {}, "finish_reason": None})
        joined["content"] += choice.delta.content or ""
        joined["finish_reason"] = choice.finish_reason or joined["finish_reason"]
        for delta in choice.delta.tool_calls or []:
            if delta.id is not None:
                assert delta.index == len(joined["calls"])
                assert delta.type == "function"
                joined["calls"][delta.index] = [delta.function.name, ""]
            joined["calls"][delta.index][1] += delta.function.arguments
    assert len(streams) == len(whole)
    for choice in whole:
        joined = streams[choice.index]
        calls = choice.message.tool_calls or []
        assert joined["content"] == (choice.message.content or "")
        assert list(joined["calls"].values()) == [
            [call.function.name, call.function.arguments] for call in calls
        ]
        assert joined["finish_reason"] == choice.finish_reason


def test_arguments_stream(client: openai.OpenAI) -> None:
    deltas = [chunk.choices[0].delta.tool_calls for chunk in chat(client, tool_choice=NAMED, stream=True)]
    assert len([delta for delta in deltas if delta]) > 5


def test_functions_of_older_clients_are_called(client: openai.OpenAI) -> None:
    arguments = {
        "tools": openai.omit, "functions": [WEATHER["function"]], "function_call": {"name": "get_weather"}
    }  # fmt: skip
    [choice] = chat(client, **arguments).choices
    assert choice.finish_reason == "function_call"
    called = choice.message.function_call
    assert called.name == "get_weather"
    jsonschema.validate(json.loads(called.arguments), WEATHER["function"]["parameters"])
    chunks = [chunk.choices[0] for chunk in chat(client, **arguments, stream=True)]
    deltas = [chunk.delta.function_call for chunk in chunks if chunk.delta.function_call is not None]
    assert deltas[0].name == "get_weather"
    assert "".join(delta.arguments for delta in deltas) == called.arguments
    assert chunks[-1].finish_reason == "function_call"
    result = {"role": "function", "name": "get_weather", "content": "12 degrees"}
    answer = chat(client, QUESTION, choice.message, result, tools=openai.omit, max_completion_tokens=4)
    assert answer.choices[0].message.content


@pytest.mark.parametrize("syntax", ["lark", "regex"])
def test_custom_tools_take_texts(client: openai.OpenAI, syntax: str) -> None:
    definition = {"lark": 'start: DIGIT "+" DIGIT\nDIGIT: /[0-9]/', "regex": "[0-9]\\+[0-9]"}[syntax]
    grammar = {"type": "grammar", "grammar": {"syntax": syntax, "definition": definition}}
    tool = {"type": "custom", "custom": {"name": "add", "description": "Adds digits.", "format": grammar}}
    arguments = {"tools": [tool], "tool_choice": {"type": "custom", "custom": {"name": "add"}}}
    [choice] = chat(client, **arguments).choices
    [call] = choice.message.tool_calls
    assert (call.type, call.custom.name) == ("custom", "add")
    assert len(call.custom.input) == 3
    assert call.custom.input[1] == "+"
    result = {"role": "tool", "tool_call_id": call.id, "content": "5"}
    assert chat(client, QUESTION, choice.message, result, tools=[tool], max_completion_tokens=4).choices
    text = [
        delta["custom"]["input"]
        for chunk in chat(client, **arguments, stream=True)
        for delta in chunk.model_dump()["choices"][0]["delta"].get("tool_calls") or []
    ]
    assert "".join(text) == call.custom.input


def test_an_answer_may_have_a_form_or_be_a_call(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"sum": {"enum": [1, 2]}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema, "strict": True}}
    [choice] = chat(client, response_format=form, max_completion_tokens=60).choices
    if choice.message.content is not None:
        jsonschema.validate(json.loads(choice.message.content), schema)
    [choice] = chat(client, response_format=form, tool_choice="none").choices
    jsonschema.validate(json.loads(choice.message.content), schema)


def test_a_call_that_is_cut_off_says_length(client: openai.OpenAI) -> None:
    [choice] = chat(client, tool_choice=NAMED, max_completion_tokens=20).choices
    assert choice.finish_reason == "length"
    [call] = choice.message.tool_calls
    assert not call.function.arguments.endswith("}")


def test_tool_requests_are_alike_alone_and_in_company(client: openai.OpenAI) -> None:
    def ask(number: int) -> Any:
        choice = ("auto", "required", NAMED)[number % 3]
        question = {"role": "user", "content": f"How is it in Paris, {number}?"}
        arguments = {"tool_choice": choice, "temperature": 1, "seed": number, "max_completion_tokens": 16}
        answer = chat(client, question, **arguments, extra_body={"return_token_ids": True})
        return answer.model_dump()["choices"][0]["token_ids"]

    alone = [ask(number) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == alone


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


def test_openais_parse_reads_calls(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Weather)
    named = {"type": "function", "function": {"name": "Weather"}}
    arguments: dict[str, Any] = {
        "model": "llama",
        "messages": [QUESTION],
        "tools": [tool],
        "tool_choice": named,
        "temperature": 0,
        "max_completion_tokens": 60,
    }
    [call] = client.chat.completions.parse(**arguments).choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)
    with client.chat.completions.stream(**arguments) as stream:
        kinds = {event.type for event in stream}
        [streamed] = stream.get_final_completion().choices[0].message.tool_calls or []
    assert "tool_calls.function.arguments.delta" in kinds
    assert streamed.function.parsed_arguments == call.function.parsed_arguments


NEGATIVE = {"properties": {"a": {"not": {}}}}
BAD = [
    ({"functions": [{"name": "f"}, {"name": "f"}]}, "functions", "'f' is taken"),
    ({"functions": [{"name": f"f{i}"} for i in range(150)]}, "functions", "at most 128"),
    ({"tools": [{"type": "retrieval"}]}, "tools[0].type", "function or custom"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "missing"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "64"),
    ({"tools": [WEATHER, WEATHER]}, "tools", "'get_weather' is taken"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}] * 129}, "tools", "128"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
        "tools[0].function.parameters",
        "type object",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": NEGATIVE}}]},
        "tools[0].function.parameters",
        "'not' at $.properties.a",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "description": "word " * 60000}}]},
        "tools",
        "at most 262144",
    ),
    (
        {"tools": [{"type": "custom", "custom": {"name": "f", "format": {"type": "json"}}}]},
        "tools[0].custom.format",
        "lark",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "paramaters": {}}}]},
        "tools[0].function.paramaters",
        "unknown field",
    ),
    (
        {"tools": [{"type": "custom", "custom": {"name": "f", "parameters": {}}}]},
        "tools[0].custom.parameters",
        "unknown field",
    ),
    ({"tools": [{**WEATHER, "strict": True}]}, "tools[0].strict", "unknown field"),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"tools": [WEATHER], "tool_choice": "always"}, "tool_choice", "'always'"),
    (
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        "tool_choice",
        "'f'",
    ),
    ({"tools": [WEATHER], "functions": [WEATHER["function"]]}, "functions", "older name"),
    ({"functions": [WEATHER["function"]], "function_call": {"name": "f"}}, "function_call", "'f'"),
    ({"function_call": {"name": "f"}}, "function_call", "no functions"),
    ({"reasoning_effort": "extreme"}, "reasoning_effort", "one of none"),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools", "must not hold"),
    ({"tools": [WEATHER], "continue_final_message": True}, "continue_final_message", "at the end"),
    ({"messages": [QUESTION, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id", "missing"),
    (
        {"messages": [QUESTION, {"role": "tool", "content": "x", "tool_call_id": "c"}]},
        "messages[1].tool_call_id",
        "'c' is of no call",
    ),
    (
        {"messages": [{**QUESTION, "tool_calls": [{"id": "c", "function": {"name": "f"}}]}]},
        "messages[0].tool_calls",
        "assistant's",
    ),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{"}}],
                },
                {"role": "tool", "tool_call_id": "c", "content": "x"},
            ]
        },
        "messages",
        "no JSON object",
    ),
]


@pytest.mark.parametrize(("change", "param", "words"), BAD)
def test_bad_tools_are_named(http: httpx.Client, change: dict[str, Any], param: str, words: str) -> None:
    body = {"model": "llama", "messages": [QUESTION], "max_tokens": 1, **change}
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
