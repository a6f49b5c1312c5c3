"""Answers in a form, through the official client: every field that asks for one, whole and streamed."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "city": {"enum": ["日本", "Zürich", "😀🤖 town"]},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
SCHEMA_FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
MESSAGES: Any = [{"role": "user", "content": "Describe a person."}]

Asked = tuple[dict[str, Any], dict[str, Any]]
"""Arguments of the client, and further fields of the body."""

FORMS: dict[str, Asked] = {
    "response_format json_schema": ({"response_format": SCHEMA_FORMAT}, {}),
    "response_format json_object": ({"response_format": {"type": "json_object"}}, {}),
    "structured_outputs json": ({}, {"structured_outputs": {"json": SCHEMA, "whitespace_pattern": " ?"}}),
    "structured_outputs json_object": ({}, {"structured_outputs": {"json_object": True}}),
    "structured_outputs regex": ({}, {"structured_outputs": {"regex": "[a-f]{3}-[0-9]{2}"}}),
    "structured_outputs choice": ({}, {"structured_outputs": {"choice": ["tea 🍵", "coffee"]}}),
    "structured_outputs grammar": ({}, {"structured_outputs": {"grammar": 'start: "a" /b{2,4}/ "日本"'}}),
    "guided_json": ({}, {"guided_json": json.dumps(SCHEMA), "guided_whitespace_pattern": " ?"}),
    "guided_regex": ({}, {"guided_regex": "[a-f]{3}-[0-9]{2}"}),
    "guided_choice": ({}, {"guided_choice": ["tea 🍵", "coffee"]}),
    "guided_grammar": ({}, {"guided_grammar": 'root ::= "a" [b]+ "c"'}),
}


def check(name: str, text: str, reason: str | None) -> None:
    """The text has the form, unless it was cut off."""
    if reason == "length":
        assert "json" in name or "grammar" in name
        return
    assert reason == "stop"
    if "json" in name:
        value = json.loads(text)
        assert isinstance(value, dict)
        if "object" not in name:
            jsonschema.validate(value, SCHEMA)
    elif "regex" in name:
        assert re.fullmatch("[a-f]{3}-[0-9]{2}", text)
    elif "choice" in name:
        assert text in ("tea 🍵", "coffee")
    elif name == "guided_grammar":
        assert re.fullmatch("ab+c", text)
    else:
        assert re.fullmatch("ab{2,4}日本", text)


def ask(client: openai.OpenAI, asked: Asked, **arguments: Any) -> Any:
    fields, extra = asked
    arguments = {"model": "llama", "seed": 7, "temperature": 1, "max_tokens": 50, **fields, **arguments}
    return client.chat.completions.create(messages=MESSAGES, extra_body=extra, **arguments)


@pytest.mark.parametrize("name", FORMS)
def test_chats_have_the_form_whole_and_streamed(client: openai.OpenAI, name: str) -> None:
    whole = ask(client, FORMS[name], n=2)
    texts = {choice.index: choice.message.content for choice in whole.choices}
    for choice in whole.choices:
        check(name, texts[choice.index], choice.finish_reason)
    pieces: dict[int, str] = dict.fromkeys(texts, "")
    reasons = {}
    for chunk in ask(client, FORMS[name], n=2, stream=True):
        for choice in chunk.choices:
            pieces[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert pieces == texts
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}


@pytest.mark.parametrize("name", ["structured_outputs json", "guided_regex", "response_format json_schema"])
def test_completions_have_the_form(client: openai.OpenAI, name: str) -> None:
    fields, extra = FORMS[name]
    arguments: dict[str, Any] = {
        "model": "llama",
        "prompt": ["A person: ", "Another: "],
        "max_tokens": 70,
        "seed": 5,
    }
    whole = client.completions.create(**arguments, extra_body=extra | fields)
    for choice in whole.choices:
        check(name, choice.text, choice.finish_reason)
    streamed = dict.fromkeys(range(2), "")
    for chunk in client.completions.create(**arguments, extra_body=extra | fields, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert [streamed[index] for index in range(2)] == [choice.text for choice in whole.choices]


def test_text_and_null_ask_for_nothing(client: openai.OpenAI) -> None:
    plain = ask(client, ({}, {}), temperature=0, max_tokens=8)
    for asked in (({"response_format": {"type": "text"}}, {}), ({}, {"structured_outputs": None})):
        assert ask(client, asked, temperature=0, max_tokens=8).choices == plain.choices


def test_a_form_goes_with_the_other_parameters(client: openai.OpenAI) -> None:
    form = FORMS["structured_outputs json"]
    answer = ask(client, form, stop=["age"], logprobs=True, top_logprobs=2, presence_penalty=0.5).choices[0]
    assert answer.finish_reason == "stop"
    assert answer.stop_reason == "age"
    assert answer.message.content.startswith("{")
    assert "age" not in answer.message.content
    assert len(answer.logprobs.content[0].top_logprobs) == 2
    # Log-probabilities are the model's own: what it would have liked to say stands beside what it had to.
    assert answer.logprobs.content[0].token.startswith("{")
    assert answer.logprobs.content[0].logprob < answer.logprobs.content[0].top_logprobs[0].logprob
    short = ask(client, form, max_tokens=3).choices[0]
    assert short.finish_reason == "length"


def test_refusals_come_before_any_token(client: openai.OpenAI) -> None:
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"uniqueItems": True}}}
    with pytest.raises(openai.BadRequestError, match="'uniqueItems' at") as caught:
        ask(client, ({"response_format": bad}, {}), stream=True)
    assert caught.value.param == "response_format"


class Event(BaseModel):
    name: str = Field(max_length=20)
    day: Literal["Monday", "Sunday"]
    guests: list[Literal["Ann", "Bob", "Zoë"]] = Field(max_length=3)


def test_the_clients_parse_gives_objects(client: openai.OpenAI) -> None:
    completion = client.chat.completions.parse(
        model="llama", messages=MESSAGES, response_format=Event, seed=1, max_tokens=200
    )
    assert isinstance(completion.choices[0].message.parsed, Event)
