"""The Responses API of the real server with the default model, through the official client."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema
import openai
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, Field

from tests.helpers.strict import parse_strictly

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": True},
    {
        "type": "custom",
        "name": "vote",
        "format": {"type": "grammar", "syntax": "regex", "definition": "yes|no"},
    },
]


class City(BaseModel):
    name: str = Field(max_length=12)
    inhabitants: int = Field(ge=1, le=9999)


def test_a_text_is_the_same_when_it_is_streamed(client: openai.OpenAI, http: httpx.Client) -> None:
    body = {"model": "llama", "input": "Name a city.", "temperature": 0, "max_output_tokens": 12}
    whole = http.post("/v1/responses", json=body).json()
    parse_strictly(whole, Response)
    answer = http.post("/v1/responses", json={**body, "stream": True}).text
    events = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: ")]
    for event in events:
        parse_strictly(event, ResponseStreamEvent)
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == whole["output"][0]["content"][0]["text"]
    assert text
    with client.responses.stream(**body) as stream:  # type: ignore[call-overload]
        stream.until_done()


def test_a_form(client: openai.OpenAI) -> None:
    response = client.responses.parse(
        model="llama", input="Name a city.", text_format=City, temperature=0, max_output_tokens=80
    )
    assert isinstance(response.output_parsed, City)


def test_tools(client: openai.OpenAI) -> None:
    common: dict[str, Any] = {"model": "llama", "tools": TOOLS, "temperature": 0, "max_output_tokens": 60}
    asked = "What is the weather in Paris?"
    first = client.responses.create(
        input=asked, tool_choice={"type": "function", "name": "get_weather"}, **common
    )
    (called,) = first.output
    assert called.type == "function_call"
    jsonschema.validate(json.loads(called.arguments), SCHEMA)
    result: Any = {"type": "function_call_output", "call_id": called.call_id, "output": '{"degrees": 20}'}
    second = client.responses.create(
        input=[result], previous_response_id=first.id, tool_choice="none", **common
    )
    assert second.output_text
    third = client.responses.create(
        input=[result],
        previous_response_id=first.id,
        tool_choice={"type": "custom", "name": "vote"},
        **common,
    )
    (vote,) = third.output
    assert vote.type == "custom_tool_call"
    assert vote.input in ("yes", "no")
    assert third.usage is not None
    assert first.usage is not None
    # What was said before is there, to the block's end.
    assert third.usage.input_tokens_details.cached_tokens > first.usage.input_tokens - 16
