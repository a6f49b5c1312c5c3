"""The Responses API through the official client, with an engine whose drawn tokens a script says."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.response_item_list import ResponseItemList
from pydantic import BaseModel

from tests.agents.scripted_engine import CONTEXT, ScriptedEngine, agent_server_in_thread
from tests.helpers.strict import parse_strictly

pytestmark = pytest.mark.process

SPAWN = {
    "type": "function",
    "name": "spawn",
    "parameters": {"type": "object", "properties": {"task": {"type": "string"}}, "required": ["task"]},
}
NAMESPACE = {"type": "namespace", "name": "agents", "description": "Agents.", "tools": [SPAWN]}
PATCH = {
    "type": "custom",
    "name": "patch",
    "format": {"type": "grammar", "syntax": "lark", "definition": 'start: ("+" /[^\\n]*/ "\\n")+'},
}
GREETING = "Grüße, κόσμε 👩‍👩‍👧!"


def call(name: str, **arguments: Any) -> str:
    return (
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ScriptedEngine, str]]:
    directory = tmp_path_factory.mktemp("scripted")
    with agent_server_in_thread(directory, lambda prompt: "", reasoning_format="think") as running:
        yield running


@pytest.fixture
def engine(server: tuple[ScriptedEngine, str]) -> ScriptedEngine:
    return server[0]


@pytest.fixture
def client(server: tuple[ScriptedEngine, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server[1]}/v1", api_key="one", max_retries=0) as client:
        yield client


@pytest.fixture
def http(server: tuple[ScriptedEngine, str]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server[1], headers={"authorization": "Bearer one"}, timeout=600) as client:
        yield client


def ask(http: httpx.Client, **body: Any) -> dict[str, Any]:
    """The response, whose body the client's types take, and all of it."""
    answer = http.post("/v1/responses", json={"input": "Hello", **body})
    assert answer.status_code == 200, answer.text
    parse_strictly(answer.json(), Response)
    return answer.json()


def stream(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    """The events, each taken by the client's types, numbered from 0, named as they are typed."""
    answer = http.post("/v1/responses", json={"input": "Hello", "stream": True, **body})
    assert answer.status_code == 200, answer.text
    events = []
    for block in answer.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        parse_strictly(event, ResponseStreamEvent)
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def kinds(events: list[dict[str, Any]]) -> list[str]:
    """The types of events, those of neighbours that are alike once."""
    found = [event["type"].removeprefix("response.") for event in events]
    return [kind for index, kind in enumerate(found) if index == 0 or found[index - 1] != kind]


def without_ids(value: Any) -> Any:
    if isinstance(value, list):
        return [without_ids(one) for one in value]
    if not isinstance(value, dict):
        return value
    changing = ("id", "call_id", "created_at", "completed_at")
    return {name: without_ids(member) for name, member in value.items() if name not in changing}


TEXT_EVENTS = [
    "output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
    "output_item.done",
]  # fmt: skip
REASONING_EVENTS = [
    "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done",
    "content_part.done", "output_item.done",
]  # fmt: skip
BEGINNING = ["created", "in_progress"]


def test_a_text(engine: ScriptedEngine, client: openai.OpenAI, http: httpx.Client) -> None:
    engine.script = lambda prompt: GREETING
    response = client.responses.create(
        model="scripted", input="Hello", instructions="Be kind.", metadata={"a": "b"}, temperature=0.5
    )
    assert response.output_text == GREETING
    assert (response.status, response.instructions, response.metadata) == (
        "completed",
        "Be kind.",
        {"a": "b"},
    )
    assert response.temperature == 0.5
    assert engine.turns[-1].prompt.index("Be kind.") < engine.turns[-1].prompt.index("Hello")
    usage = response.usage
    assert usage is not None
    assert usage.input_tokens == engine.turns[-1].num_prompt_tokens
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    ask(http)


def test_streamed_it_is_the_same(engine: ScriptedEngine, http: httpx.Client) -> None:
    engine.script = lambda prompt: (
        f"<think>\nI think of {GREETING}\n</think>\n\n{GREETING}{call('spawn', task='a')}"
    )
    body = {"tools": [SPAWN], "include": ["reasoning.encrypted_content"]}
    events, whole = stream(http, **body), ask(http, **body)
    assert kinds(events) == [
        *BEGINNING, *REASONING_EVENTS, *TEXT_EVENTS, "output_item.added", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done", "completed",
    ]  # fmt: skip
    last = events[-1]["response"]
    # The second prompt is in the cache.
    for one in (last, whole):
        del one["usage"]["input_tokens_details"]
    assert without_ids(last) == without_ids(whole)
    assert last["output"] == [event["item"] for event in events if event["type"].endswith("item.done")]
    for kind, text in (("reasoning_text", f"I think of {GREETING}"), ("output_text", GREETING)):
        assert "".join(e["delta"] for e in events if e["type"] == f"response.{kind}.delta") == text
    reasoning, message, called = last["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": f"I think of {GREETING}"}]
    assert reasoning["encrypted_content"]
    assert message["content"][0]["text"] == GREETING
    assert json.loads(called["arguments"]) == {"task": "a"}
    assert 0 < last["usage"]["output_tokens_details"]["reasoning_tokens"] < last["usage"]["output_tokens"]


def test_the_stream_helper(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.script = lambda prompt: GREETING
    with client.responses.stream(model="scripted", input="Hello") as events:
        snapshots = [event.snapshot for event in events if event.type == "response.output_text.delta"]
        response = events.get_final_response()
    assert snapshots[-1] == response.output_text == GREETING


class Weather(BaseModel):
    city: str
    days: int


def test_parse(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.script = lambda prompt: '{"city": "Köln", "days": 2}'
    weather = Weather(city="Köln", days=2)
    response = client.responses.parse(model="scripted", input="Hello", text_format=Weather)
    assert response.output_parsed == weather
    with client.responses.stream(model="scripted", input="Hello", text_format=Weather) as events:
        assert events.get_final_response().output_parsed == weather
    free = client.responses.create(model="scripted", input="Hello", text={"format": {"type": "json_object"}})
    assert json.loads(free.output_text) == weather.model_dump()


def test_a_form_is_kept(engine: ScriptedEngine, http: httpx.Client) -> None:
    """By the engine: what it does not let be said is a failure, before and within a stream."""
    engine.script = lambda prompt: "Köln"
    text = {"format": {"type": "json_schema", "name": "w", "schema": Weather.model_json_schema()}}
    answer = http.post("/v1/responses", json={"input": "Hello", "text": text})
    assert answer.status_code == 500
    events = stream(http, text=text)
    assert kinds(events) == [*BEGINNING, "failed"]
    assert events[-1]["response"]["status"] == "failed"
    assert events[-1]["response"]["error"]["code"] == "server_error"


def test_tools_are_called_and_answered(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.script = lambda prompt: call("spawn", task="ä") + "\n" + call("agents__spawn", task="b")
    tools: Any = [SPAWN, NAMESPACE]
    first = client.responses.create(model="scripted", input="Hello", tools=tools)
    one, other = first.output
    assert (one.name, one.namespace, json.loads(one.arguments)) == ("spawn", None, {"task": "ä"})
    assert (other.name, other.namespace, json.loads(other.arguments)) == ("spawn", "agents", {"task": "b"})
    engine.script = lambda prompt: "Both are done."
    results: Any = [
        {"type": "function_call_output", "call_id": one.call_id, "output": "done"},
        {
            "type": "function_call_output",
            "call_id": other.call_id,
            "output": [{"type": "input_text", "text": "done"}, {"type": "input_text", "text": "too"}],
        },
    ]
    given: Any = [{"role": "user", "content": "Hello"}, *first.output, *results]
    second = client.responses.create(model="scripted", input=given, tools=tools)
    third = client.responses.create(
        model="scripted", input=results, tools=tools, previous_response_id=first.id
    )
    assert second.output_text == third.output_text == "Both are done."
    assert engine.turns[-1].prompt == engine.turns[-2].prompt
    assert third.usage is not None
    assert third.usage.input_tokens_details.cached_tokens >= third.usage.input_tokens - 16
    assert second.usage is not None
    assert second.usage.input_tokens_details.cached_tokens >= engine.turns[-3].num_prompt_tokens - 16


def test_a_custom_tool(engine: ScriptedEngine, http: httpx.Client, client: openai.OpenAI) -> None:
    text = f"+{GREETING}\n+\n"
    engine.script = lambda prompt: f'<tool_call>\n{{"name": "patch"}}\n{text}\n</tool_call>'
    events = stream(http, tools=[PATCH])
    assert kinds(events) == [
        *BEGINNING, "output_item.added", "custom_tool_call_input.delta", "custom_tool_call_input.done",
        "output_item.done", "completed",
    ]  # fmt: skip
    (item,) = events[-1]["response"]["output"]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "patch", text)
    engine.script = lambda prompt: "Patched."
    result = {"type": "custom_tool_call_output", "call_id": item["call_id"], "output": "ok"}
    given: Any = [{"role": "user", "content": "Hello"}, item, result]
    tools: Any = [PATCH]
    assert client.responses.create(model="scripted", input=given, tools=tools).output_text == "Patched."


@pytest.mark.parametrize(
    ("choice", "is_called"),
    [
        ("none", False),
        ("auto", True),
        ("required", True),
        ({"type": "function", "name": "spawn"}, True),
        ({"type": "function", "name": "spawn", "namespace": "agents"}, False),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "spawn"}]},
            True,
        ),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "custom", "name": "patch"}]}, False),
    ],
)
def test_tool_choice(engine: ScriptedEngine, http: httpx.Client, choice: Any, is_called: bool) -> None:
    """What the choice forbids is not drawn: the script fails, or its text is no call."""
    engine.script = lambda prompt: call("spawn", task="a")
    body = {"input": "Hello", "tools": [SPAWN, NAMESPACE, PATCH], "tool_choice": choice}
    answer = http.post("/v1/responses", json=body)
    output = answer.json()["output"] if answer.status_code == 200 else []
    assert any(item["type"] == "function_call" for item in output) == is_called


def test_one_call_at_most(engine: ScriptedEngine, http: httpx.Client) -> None:
    engine.script = lambda prompt: call("spawn", task="a") + "\n" + call("spawn", task="b")
    assert len(ask(http, tools=[SPAWN])["output"]) == 2
    assert len(ask(http, tools=[SPAWN], parallel_tool_calls=False)["output"]) == 1


def test_an_answer_is_cut_off(engine: ScriptedEngine, http: httpx.Client, client: openai.OpenAI) -> None:
    engine.script = lambda prompt: GREETING
    events = stream(http, max_output_tokens=3)
    response = events[-1]["response"]
    assert events[-1]["type"] == "response.incomplete"
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete"
    assert response["usage"]["output_tokens"] == 3
    assert GREETING.startswith(response["output"][0]["content"][0]["text"])
    # What the context leaves is all that there is to have.
    assert ask(http, max_output_tokens=10**7)["status"] == "completed"


def test_a_call_that_a_stop_string_cuts_is_incomplete(engine: ScriptedEngine, http: httpx.Client) -> None:
    engine.script = lambda prompt: call("spawn", task="look around")
    for stop, status in ((" around", "incomplete"), ("</tool_call>", "completed")):
        response = ask(http, tools=[SPAWN], stop=stop)
        assert response["output"][-1]["status"] == status
        assert response["status"] == "completed"


def test_salts_keep_cached_blocks_apart(engine: ScriptedEngine, http: httpx.Client) -> None:
    engine.script = lambda prompt: "Yes."
    asked = "of salts: " + "again and again " * 20
    cached = [
        ask(http, input=asked, store=False, **fields)["usage"]["input_tokens_details"]["cached_tokens"]
        for fields in ({}, {}, {"cache_salt": "a"}, {"cache_salt": "a"})
    ]
    # What all prompts begin with others may have computed, but for those with a salt.
    assert cached[1] == cached[3] > cached[0]
    assert cached[2] == 0


def test_an_empty_input(engine: ScriptedEngine, http: httpx.Client) -> None:
    engine.script = lambda prompt: GREETING
    for given in ("", [], None):
        assert ask(http, input=given, max_output_tokens=1)["status"] == "incomplete"


def test_logprobs(engine: ScriptedEngine, http: httpx.Client) -> None:
    engine.script = lambda prompt: f"<think>\nHm.\n</think>\n\n{GREETING}"
    events = stream(http, include=["message.output_text.logprobs"], top_logprobs=2)
    part = events[-1]["response"]["output"][1]["content"][0]
    tokens = b"".join(bytes(one["bytes"]) for one in part["logprobs"])
    assert tokens.decode().strip() == GREETING
    assert all(len(one["top_logprobs"]) == 2 for one in part["logprobs"])
    deltas = [e["logprobs"] for e in events if e["type"] == "response.output_text.delta"]
    (done,) = (e["logprobs"] for e in events if e["type"] == "response.output_text.done")
    assert [one for delta in deltas for one in delta] == done
    assert [one["logprob"] for one in done] == [one["logprob"] for one in part["logprobs"]]


def test_messages_stay_where_they_are(engine: ScriptedEngine, http: httpx.Client) -> None:
    engine.script = lambda prompt: GREETING
    roles = ("user", "developer", "assistant", "system", "user")
    items = [{"role": role, "content": f"word {index}"} for index, role in enumerate(roles)]
    ask(http, input=items)
    places = [engine.turns[-1].prompt.index(f"word {index}") for index in range(len(roles))]
    assert places == sorted(places)


def test_responses_are_stored(engine: ScriptedEngine, client: openai.OpenAI, http: httpx.Client) -> None:
    engine.script = lambda prompt: GREETING
    items: Any = [{"role": "user", "content": f"word {index}"} for index in range(5)]
    response = client.responses.create(model="scripted", input=items)
    assert client.responses.retrieve(response.id) == response
    pages = client.responses.input_items.list(response.id, limit=2, order="asc")
    assert [item.content[0].text for item in pages] == [f"word {index}" for index in range(5)]
    path = f"/v1/responses/{response.id}/input_items"
    page = http.get(path, params={"limit": 2}).json()
    parse_strictly(page, ResponseItemList)
    assert [item["content"][0]["text"] for item in page["data"]] == ["word 4", "word 3"]
    assert page["has_more"]
    rest = http.get(path, params={"after": page["last_id"]}).json()
    assert (len(rest["data"]), rest["has_more"]) == (3, False)
    assert http.get(path, params={"limit": 0}).status_code == 400
    # An item is known by its id.
    referred = ask(http, input=[{"type": "item_reference", "id": page["last_id"]}])
    assert "word 3" in engine.turns[-1].prompt
    assert referred["status"] == "completed"
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_it_goes_on_from_a_response(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.script = lambda prompt: GREETING
    first = client.responses.create(model="scripted", input="one " * 50, instructions="Be kind.")
    second = client.responses.create(
        model="scripted", input="two", previous_response_id=first.id, instructions="Be kind."
    )
    third = client.responses.create(model="scripted", input="three", previous_response_id=second.id)
    assert engine.turns[-2].prompt.count("Be kind.") == 1
    assert "Be kind." not in engine.turns[-1].prompt
    assert engine.turns[-1].prompt.count(GREETING) == 2
    assert second.usage is not None
    assert second.usage.input_tokens_details.cached_tokens >= engine.turns[-3].num_prompt_tokens - 16
    assert third.previous_response_id == second.id


def test_who_may_see_a_response(
    server: tuple[ScriptedEngine, str], engine: ScriptedEngine, client: openai.OpenAI
) -> None:
    engine.script = lambda prompt: GREETING
    response = client.responses.create(model="scripted", input="Hello")
    hidden = client.responses.create(model="scripted", input="Hello", store=False)
    with openai.OpenAI(base_url=f"{server[1]}/v1", api_key="two", max_retries=0) as other:
        for asker, response_id in ((other, response.id), (client, hidden.id), (client, "resp_none")):
            with pytest.raises(openai.NotFoundError):
                asker.responses.retrieve(response_id)
            with pytest.raises(openai.NotFoundError):
                asker.responses.delete(response_id)
            with pytest.raises(openai.BadRequestError) as caught:
                asker.responses.create(model="scripted", input="Hello", previous_response_id=response_id)
            assert caught.value.code == "previous_response_not_found"
            assert caught.value.param == "previous_response_id"
    assert client.responses.retrieve(response.id).id == response.id
    # The same key in the other header is the same key.
    answer = httpx.get(f"{server[1]}/v1/responses/{response.id}", headers={"x-api-key": "one"})
    assert answer.status_code == 200


def test_a_prompt_that_does_not_fit(engine: ScriptedEngine, http: httpx.Client) -> None:
    engine.script = lambda prompt: GREETING
    items = [{"role": "system", "content": "Be kind."}]
    items += [{"role": "user", "content": f"part {index}" + " a" * (CONTEXT // 4)} for index in range(5)]
    answer = http.post("/v1/responses", json={"input": items})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert answer.json()["error"]["param"] == "input"


UNKNOWN = {
    "input": [
        {"role": "user", "mood": 1, "content": [{"type": "input_text", "text": "Hello", "tone": 2}]},
        {"type": "hologram", "data": "…"},
    ],
    "tools": [{**SPAWN, "color": "red"}, {"type": "web_search"}, {"type": "image_generation"}, NAMESPACE],
    "reasoning": {"effort": "low", "depth": 3},
    "flavor": {"salt": True},
    "include": ["something.new"],
}
NAMES = (
    "flavor", "reasoning.depth", "include[] something.new", "input[].mood", "input[].content[].tone",
    "input[].type hologram", "tools[].description", "tools[].color",
    "tools[].type web_search", "tools[].type image_generation",
)  # fmt: skip


def test_unknown_members_are_accepted(
    engine: ScriptedEngine, http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    engine.script = lambda prompt: GREETING

    def count() -> float:
        name = 'engine_unknown_request_members_total{endpoint="/v1/responses",model_name="scripted"} '
        lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith(name)]
        return float(lines[0].removeprefix(name)) if lines else 0.0

    before = count()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert http.post("/v1/responses", json=UNKNOWN).status_code == 200
    assert count() == before + 2 * len(NAMES)
    logged = [record.getMessage() for record in caplog.records]
    for name in NAMES:
        assert sum(f"reads {name};" in line for line in logged) <= 1
    assert "web_search" not in engine.turns[-1].prompt
    assert "spawn" in engine.turns[-1].prompt


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"truncation": "some"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"metadata": {"a": 1}}, "metadata[...]"),
        ({"reasoning": {"effort": "lots"}}, "reasoning.effort"),
        ({"text": {"verbosity": "chatty"}}, "text.verbosity"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}}, "text.format"),
        ({"tools": [{"name": "a"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [NAMESPACE, NAMESPACE]}, "tools[1]"),
        ({"tools": [{**PATCH, "format": {"type": "grammar", "syntax": "ebnf"}}]}, "tools[0].format"),
        ({"tools": [{**SPAWN, "strict": True, "parameters": {"not": {}}}]}, "tools[0].parameters"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [SPAWN], "tool_choice": {"type": "function", "name": "kill"}}, "tool_choice"),
        ({"input": [{"role": "wizard", "content": "Hello"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": ""}]}, "input[0].call_id"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].id"),
        ({"input": [{"type": "hologram", "id": 5}]}, "input[0].id"),
        ({"input": [{"type": "hologram", "id": {"a": 1}}]}, "input[0].id"),
        ({"tools": [{**NAMESPACE, "name": "a b"}]}, "tools[0]"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"model": "another"}, "model"),
    ],
)  # fmt: skip
def test_what_is_known_and_cannot_be_had_is_refused(
    http: httpx.Client, body: dict[str, Any], param: str
) -> None:
    answer = http.post("/v1/responses", json={"input": "Hello", **body})
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param
    assert answer.json()["error"]["message"]


def test_codexs_list_of_models(http: httpx.Client, client: openai.OpenAI) -> None:
    body = http.get("/v1/models").json()
    (model,) = body["models"]
    assert model["slug"] == body["data"][0]["id"] == "scripted"
    assert model["context_window"] == CONTEXT
    assert model["apply_patch_tool_type"] == "freeform"
    assert [one.id for one in client.models.list()] == ["scripted"]
