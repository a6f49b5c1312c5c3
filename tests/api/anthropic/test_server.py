"""Messages from the default model, through Anthropic's client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import jsonschema
import pytest

from tests.api.conftest import API_KEY, ServerProcess, server

__all__ = ["server"]

WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}
QUESTION: Any = {"role": "user", "content": "What is the weather in Paris? " + "Say it in few words. " * 20}


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key=API_KEY, max_retries=0, timeout=600) as client:
        yield client


def arguments(**given: Any) -> dict[str, Any]:
    # The temperature is none of the client's parameters any more.
    extra = {"temperature": given.pop("temperature", 0)}
    return {"model": "llama", "max_tokens": 40, "messages": [QUESTION], "extra_body": extra, **given}


def test_a_tool_is_called_and_its_result_sent_back(client: anthropic.Anthropic) -> None:
    choice: Any = {"type": "tool", "name": "get_weather"}
    message = client.messages.create(**arguments(tools=[WEATHER], tool_choice=choice))
    with client.messages.stream(**arguments(tools=[WEATHER], tool_choice=choice)) as stream:
        streamed = stream.get_final_message()
    assert message.stop_reason == streamed.stop_reason == "tool_use"
    (call,) = message.content
    jsonschema.validate(call.input, WEATHER["input_schema"])
    assert streamed.content[0].input == call.input
    result = {
        "type": "tool_result",
        "tool_use_id": call.id,
        "content": [{"type": "text", "text": "12 degrees"}],
    }
    messages = [
        QUESTION,
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": [result]},
    ]
    answer = client.messages.create(**arguments(tools=[WEATHER], messages=messages))
    assert answer.content
    # Streamed after it, the whole prompt but its last block was there.
    assert streamed.usage.cache_read_input_tokens > 0.8 * message.usage.input_tokens


def test_usage_says_what_the_cache_had(client: anthropic.Anthropic) -> None:
    messages = [{"role": "user", "content": "A question that nobody asked before. " * 30}]
    counted = client.messages.count_tokens(model="llama", messages=messages)
    first = client.messages.create(**arguments(messages=messages)).usage
    second = client.messages.create(**arguments(messages=messages)).usage
    assert first.cache_read_input_tokens == first.cache_creation_input_tokens == 0
    assert first.input_tokens == second.input_tokens + second.cache_read_input_tokens == counted.input_tokens
    assert second.input_tokens <= 16


def test_it_says_what_a_chat_says(client: anthropic.Anthropic, server: ServerProcess) -> None:
    fields = arguments(stop_sequences=["\n"], system="You are a sailor.")
    message = client.messages.create(**fields)
    with client.messages.stream(**fields) as stream:
        streamed = "".join(stream.text_stream)
    chat = httpx.post(
        f"{server.url}/v1/chat/completions",
        json={
            "messages": [{"role": "system", "content": "You are a sailor."}, QUESTION],
            "max_tokens": 40,
            "temperature": 0,
            "stop": ["\n"],
        },
        headers={"x-api-key": API_KEY},
        timeout=600,
    ).json()["choices"][0]["message"]["content"]
    assert message.content[0].text == streamed == chat


def test_an_answer_has_a_form(client: anthropic.Anthropic) -> None:
    schema = {
        "type": "object",
        "properties": {"sum": {"enum": [1, 2]}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    form: Any = {"format": {"type": "json_schema", "schema": schema}}
    message = client.messages.create(**arguments(output_config=form, max_tokens=60))
    jsonschema.validate(json.loads(message.content[0].text), schema)
    form["format"]["schema"] = {"not": {}}
    with pytest.raises(anthropic.BadRequestError, match=r"output_config\.format.*not"):
        client.messages.create(**arguments(output_config=form))
    with pytest.raises(anthropic.BadRequestError, match=r"output_config\.format.*not"):
        client.messages.create(**arguments(output_config=form, stream=True))


def test_the_key_is_asked_for(server: ServerProcess, client: anthropic.Anthropic) -> None:
    assert [model.id for model in client.models.list()] == ["llama"]
    with pytest.raises(anthropic.AuthenticationError, match="key"):
        client.with_options(api_key="wrong").messages.create(**arguments())
