"""Messages as Anthropic's client sends and reads them, from an engine that follows a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import BaseModel

from api.anthropic import endpoint
from engine.core.outputs import CompletionOutput
from engine.core.sampling_params import SamplingParams
from engine.errors import EngineDeadError
from engine.frontend.chat_format import ChatFormat
from tests.helpers.chat_templates import THINKING, tokenizer_of
from tests.helpers.scripted import Script, ScriptedEngine, serving
from tests.helpers.strict import parse_strictly

pytestmark = pytest.mark.anyio

ASKED: Any = {"role": "user", "content": "What is a tide?"}
TOOL: Any = {
    "name": "look_up",
    "input_schema": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
}
CALL = '<tool_call>\n{"name": "look_up", "arguments": {"word": "tide ☾"}}\n</tool_call>'


def says(text: str, step: int = 3, **end: Any) -> Script:
    """Says the text in pieces."""

    async def script(prompt: list[int], params: SamplingParams) -> AsyncGenerator[CompletionOutput, None]:
        pieces = [text[start : start + step] for start in range(0, len(text), step)]
        for piece in pieces[:-1]:
            yield CompletionOutput(0, piece, [1])
        yield CompletionOutput(0, pieces[-1], [1], **{"finish_reason": "stop", **end})

    return script


@asynccontextmanager
async def server_of(
    script: Script, template: str | None = None
) -> AsyncIterator[tuple[anthropic.AsyncAnthropic, httpx.AsyncClient]]:
    engine = ScriptedEngine(script)
    engine.max_model_len = 4096
    if template is not None:
        engine.tokenizer = tokenizer_of(template)
        engine.chat_format = ChatFormat(engine.tokenizer)
    async with serving(engine) as client:
        url = str(client.base_url)
        async with anthropic.AsyncAnthropic(base_url=url, api_key="k", max_retries=0) as official:
            yield official, client


def read_events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, each of which must be just what the official types say."""
    read = []
    for one in text.strip().split("\n\n"):
        head, data = one.split("\n")
        body = json.loads(data.removeprefix("data: "))
        assert head == f"event: {body['type']}"
        if body["type"] not in ("ping", "error"):
            parse_strictly(body, RawMessageStreamEvent)
        read.append(body)
    return read


def body_of(**fields: Any) -> dict[str, Any]:
    return {"model": "scripted", "max_tokens": 64, "messages": [ASKED], **fields}


HIDDEN = {"type": "adaptive", "display": "omitted"}
ANSWERS = [
    ("Water that comes and goes.", {}, ["text"]),
    (CALL, {"tools": [TOOL]}, ["tool_use"]),
    (f"I look it up.\n{CALL}\n{CALL}", {"tools": [TOOL]}, ["text", "tool_use", "tool_use"]),
    ("<think>\nThe moon ☾.\n</think>\n\nWater.", {}, ["thinking", "text"]),
    ("<think>\nThe moon ☾.\n</think>\n\nWater.", {"thinking": HIDDEN}, ["thinking", "text"]),
    (f"<think>\nHm.\n</think>\n\n{CALL}", {"tools": [TOOL]}, ["thinking", "tool_use"]),
]  # fmt: skip


@pytest.mark.parametrize("step", [1, 7])
@pytest.mark.parametrize(("text", "fields", "kinds"), ANSWERS)
async def test_streams_add_up_to_the_whole_message(
    text: str, fields: dict[str, Any], kinds: list[str], step: int
) -> None:
    async with server_of(says(text, step), THINKING) as (client, http):
        response = await http.post("/v1/messages", json=body_of(**fields))
        whole = parse_strictly(response.json(), Message)
        async with client.messages.stream(**body_of(**fields)) as stream:
            seen = [event.type async for event in stream]
            streamed = await stream.get_final_message()
        events = read_events((await http.post("/v1/messages", json=body_of(stream=True, **fields))).text)
    assert [block.type for block in whole.content] == kinds
    assert whole.stop_reason == ("tool_use" if "tool_use" in kinds else "end_turn")

    def plain(message: Message) -> dict[str, Any]:
        read = message.model_dump(exclude={"id"}, exclude_none=True, exclude_unset=True)
        for block in read["content"]:
            block.pop("id", None)  # of a call: random
            block.pop("parsed_output", None)
        return read

    assert plain(streamed) == plain(whole)
    assert {
        "message_start",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    } <= set(seen)
    check_order([event["type"] for event in events])


def check_order(types: list[str]) -> None:
    """One block after the other, between the message's beginning and its end."""
    assert types[0] == "message_start"
    assert types[1] == "ping"
    assert types[-2:] == ["message_delta", "message_stop"]
    is_open = False
    for kind in types[2:-2]:
        match kind:
            case "content_block_start" | "content_block_stop":
                is_open = not is_open
                assert is_open == (kind == "content_block_start")
            case "content_block_delta":
                assert is_open
            case _:
                assert kind == "ping"
    assert not is_open


async def test_thoughts_are_shown_or_ride_in_the_signature() -> None:
    async with server_of(says("<think>\nThe moon.\n</think>\n\nWater."), THINKING) as (client, _):
        shown = await client.messages.create(**body_of())
        hidden = await client.messages.create(**body_of(thinking=HIDDEN))
    assert (shown.content[0].thinking, shown.content[0].signature) == ("The moon.", "")
    assert hidden.content[0].thinking == ""
    assert hidden.content[0].signature.startswith("reasoning:")
    assert hidden.content[1].text == "Water."


async def test_a_stop_sequence_is_named() -> None:
    async def script(prompt: list[int], params: SamplingParams) -> AsyncGenerator[CompletionOutput, None]:
        assert params.stop == ("END", "\n\n")
        yield CompletionOutput(0, "Water.", [1], finish_reason="stop", stop_reason="END")

    async with server_of(script) as (client, _):
        fields = body_of(stop_sequences=["END", "\n\n"])
        whole = await client.messages.create(**fields)
        async with client.messages.stream(**fields) as stream:
            streamed = await stream.get_final_message()
    for message in (whole, streamed):
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "END")


async def test_max_tokens_is_clipped_to_the_context() -> None:
    given = []

    async def script(prompt: list[int], params: SamplingParams) -> AsyncGenerator[CompletionOutput, None]:
        given.append((len(prompt), params.max_tokens))
        yield CompletionOutput(0, "W", [1], finish_reason="length")

    async with server_of(script) as (client, _):
        clipped = await client.messages.create(**body_of(max_tokens=32000), timeout=600)
        short = await client.messages.create(**body_of(max_tokens=8))
        with pytest.raises(anthropic.BadRequestError, match="prompt is too long: 5000 tokens > 4095 maximum"):
            await client.messages.create(**body_of(messages=[{"role": "user", "content": "a" * 5000}]))
        with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
            await client.messages.create(**body_of(max_tokens=-1))
    assert given == [(15, 4081), (15, 8)]
    assert clipped.stop_reason == "model_context_window_exceeded"
    assert short.stop_reason == "max_tokens"


async def test_no_tokens_fill_the_cache_alone() -> None:
    async with server_of(says("W")) as (client, _):
        whole = await client.messages.create(**body_of(max_tokens=0))
        async with client.messages.stream(**body_of(max_tokens=0)) as stream:
            streamed = await stream.get_final_message()
    for message in (whole, streamed):
        assert (message.content, message.stop_reason, message.usage.output_tokens) == ([], "max_tokens", 0)


async def test_a_call_that_is_cut_off_has_no_input() -> None:
    async with server_of(says(CALL[:60], finish_reason="length")) as (client, _):
        message = await client.messages.create(**body_of(tools=[TOOL]))
    assert (message.content[0].type, message.content[0].input) == ("tool_use", {})
    assert message.stop_reason == "max_tokens"


async def test_a_stream_begins_before_the_prompt_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "PING_SECONDS", 0.01)
    computed = asyncio.Event()

    async def script(prompt: list[int], params: SamplingParams) -> AsyncGenerator[CompletionOutput, None]:
        await computed.wait()
        yield CompletionOutput(0, "Water.", [1], finish_reason="stop")

    async with (
        server_of(script) as (_, http),
        http.stream("POST", "/v1/messages", json=body_of(stream=True)) as response,
    ):
        lines = response.aiter_lines()
        seen = []
        async for line in lines:
            seen.append(line)
            if seen.count('data: {"type":"ping"}') == 4:
                computed.set()
                break
        seen += [line async for line in lines]
    events = read_events("\n".join(seen))
    check_order([event["type"] for event in events])
    assert [event["type"] for event in events[:5]] == ["message_start", "ping", "ping", "ping", "ping"]


async def test_what_is_refused_is_no_stream() -> None:
    async with server_of(says("W")) as (client, http):
        for fields, what in (
            ({"temperature": 9}, "temperature"),
            ({"stop_sequences": [""]}, "stop_sequences"),
            ({"messages": []}, "messages"),
            ({"output_config": {"effort": "bogus"}}, "output_config.effort"),
            ({"thinking": {"type": "enabled", "display": "omited"}}, "thinking.display"),
            ({"cache_salt": ""}, "cache_salt"),
            ({"messages": [{"role": "user", "content": "a" * 5000}]}, "too long"),
            ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "f"}}, "tool_choice"),
        ):  # fmt: skip
            response = await http.post("/v1/messages", json=body_of(stream=True, **fields))
            assert response.status_code == 400, fields
            error = response.json()
            assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")
            assert what in error["error"]["message"]
        with pytest.raises(anthropic.NotFoundError, match="'gpt-9' does not exist"):
            await client.messages.create(**body_of(model="gpt-9"))
        response = await http.post("/v1/messages", json={"model": "scripted", "messages": [ASKED]})
        assert "missing field: max_tokens" in response.text


async def test_a_failure_amid_a_stream_is_an_event() -> None:
    async def dies(prompt: list[int], params: SamplingParams) -> AsyncGenerator[CompletionOutput, None]:
        yield CompletionOutput(0, "Wa", [1])
        raise EngineDeadError("the engine process was killed by signal 9")

    async with server_of(dies) as (client, http):
        events = read_events((await http.post("/v1/messages", json=body_of(stream=True))).text)
        with pytest.raises(anthropic.APIStatusError, match="the engine has ended"):
            async with client.messages.stream(**body_of()) as stream:
                await stream.get_final_message()
        with pytest.raises(anthropic.APIStatusError, match="the engine has ended"):
            await client.messages.create(**body_of())
    assert events[-1] == {
        "type": "error",
        "error": {
            "type": "overloaded_error",
            "message": "the engine has ended; the server's log has the cause",
        },
    }


async def test_who_hangs_up_while_the_prompt_is_computed_aborts() -> None:
    async def never(prompt: list[int], params: SamplingParams) -> AsyncGenerator[CompletionOutput, None]:
        await asyncio.Event().wait()
        yield

    engine = ScriptedEngine(never)
    async with serving(engine) as http:
        async with http.stream("POST", "/v1/messages", json=body_of(stream=True)) as response:
            async for line in response.aiter_lines():
                if line == 'data: {"type":"ping"}':
                    break
        await engine.closed.wait()
    assert engine.num_opened == engine.num_closed == 1


class Tide(BaseModel):
    height: int


async def test_an_answer_has_a_form() -> None:
    forms = []

    async def script(prompt: list[int], params: SamplingParams) -> AsyncGenerator[CompletionOutput, None]:
        forms.append(params.structured_outputs.schema)
        yield CompletionOutput(0, '{"height": 3}', [1], finish_reason="stop")

    async with server_of(script) as (client, http):
        message = await client.messages.parse(**body_of(), output_format=Tide)
        schema = {"type": "object", "properties": {"height": {"type": "integer"}}}
        await http.post(
            "/v1/messages?beta=true", json=body_of(output_format={"type": "json_schema", "schema": schema})
        )
    assert message.parsed_output == Tide(height=3)
    assert forms[0]["properties"]["height"]["type"] == "integer"
    assert forms[1] == schema


async def test_the_tool_runner_of_the_client_finishes() -> None:
    words = []

    @anthropic.beta_async_tool
    async def look_up(word: str) -> str:
        """Looks a word up.

        Args:
            word: The word.
        """
        words.append(word)
        return "Water that comes and goes."

    async def script(prompt: list[int], params: SamplingParams) -> AsyncGenerator[CompletionOutput, None]:
        text = "It is water." if b"comes and goes" in bytes(prompt) else CALL
        yield CompletionOutput(0, text, [1], finish_reason="stop")

    async with server_of(script) as (client, _):
        runner = client.beta.messages.tool_runner(**body_of(), tools=[look_up])
        last = await runner.until_done()
    assert words == ["tide ☾"]
    assert last.content[0].text == "It is water."


async def test_tokens_are_counted_without_an_answer() -> None:
    async with server_of(says("W")) as (client, _):
        counted = await client.messages.count_tokens(model="scripted", messages=[ASKED])
        with_tools = await client.messages.count_tokens(model="scripted", messages=[ASKED], tools=[TOOL])
        message = await client.messages.create(**body_of(tools=[TOOL]))
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.count_tokens(model="gpt-9", messages=[ASKED])
    assert counted.input_tokens == len("What is a tide?")
    assert with_tools.input_tokens == message.usage.input_tokens > counted.input_tokens


async def test_models_have_the_members_that_each_client_reads() -> None:
    async with server_of(says("W")) as (client, http):
        listed = [model async for model in client.models.list()]
        one = await client.models.retrieve("scripted")
        plain = (await http.get("/v1/models")).json()
        both = (await http.get("/v1/models", headers={"anthropic-version": "2023-06-01"})).json()
    assert listed == [one]
    assert (one.id, one.type, one.display_name, one.max_input_tokens) == (
        "scripted",
        "model",
        "scripted",
        4095,
    )
    assert (both["first_id"], both["last_id"], both["has_more"]) == ("scripted", "scripted", False)
    assert plain["data"][0].items() <= both["data"][0].items()
    assert both["object"] == "list"


async def test_unknown_members_and_headers_are_accepted_and_counted() -> None:
    async with server_of(says("W")) as (client, http):
        assert (await client.messages.create(**body_of()))._request_id.startswith("msg_")
        headers = {"anthropic-beta": "made-up-2030-01-01,other", "anthropic-version": "2030-01-01"}
        extra = {"made_up": {"a": 1}, "messages": [{**ASKED, "made_up": 1}]}
        await client.messages.create(**body_of(), extra_body=extra, extra_headers=headers)
        metrics = (await http.get("/metrics")).text
    assert (
        'engine_unknown_request_members_total{endpoint="/v1/messages",model_name="scripted"} 2.0' in metrics
    )
