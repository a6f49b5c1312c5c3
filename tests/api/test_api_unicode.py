"""Streams are the text's bytes, wherever tokens split them: text, log-probabilities and arguments of calls."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from api.app import create_app
from engine.core.outputs import RequestOutput
from engine.core.request import EngineOutput, Request, SampledToken
from engine.core.sampling_params import SamplingParams
from engine.frontend.chat_format import ChatFormat
from engine.frontend.output_processor import OutputProcessor
from engine.loading.resolve import resolve_model
from engine.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.scripted import ScriptedEngine

CHAT = {"messages": [{"role": "user", "content": "a"}]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
# Families, flags and skin tones are several code points; combining marks follow what they are on.
PIECES = [
    "👩‍👩‍👧",
    "🇫🇷",
    "👋🏽",
    "漢字",
    "かな",
    "e\u0301",
    "a\u0323\u0302",
    "ß",
    "𝔘",
    "\u200d",
    "a",
    " ",
    "\n",
    '"',
    "\\",
]
# The vocabulary lacks bytes of control characters and of planes that hold no characters.
CHARACTERS = st.characters(exclude_categories=["Cs", "Cc", "Cn"])
TEXTS = st.lists(st.sampled_from(PIECES) | CHARACTERS, max_size=12).map("".join)


class Speaking(ScriptedEngine):
    """Says some tokens, with the real tokenizer and what makes text of its tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(cast(Any, None))
        self.tokenizer = cast(Any, tokenizer)
        self.chat_format = ChatFormat(tokenizer)
        self.max_model_len = 8192
        self.says: list[int] = []

    async def generate(
        self,
        prompt: list[int],
        params: SamplingParams,
        request_id: str,
        priority: int = 0,
        *,
        cache_salt: str = "",
        owner: str = "",
    ) -> Any:
        request = Request(request_id=request_id, prompt_token_ids=prompt, params=params, seed=0)
        processor = OutputProcessor(request, None, cast(Any, self.tokenizer))
        for index, token_id in enumerate(self.says):
            reason = "length" if index + 1 == len(self.says) else None
            tokens = [SampledToken(token_id, -1.0, 1, [(token_id, -1.0)])]
            output = processor.process(
                EngineOutput(request_id=request_id, index=0, tokens=tokens, finish_reason=cast(Any, reason))
            )
            yield cast(RequestOutput, output)


@pytest.fixture(scope="module")
def engine() -> Speaking:
    return Speaking(load_tokenizer(resolve_model("llama")))


@pytest.fixture(scope="module")
def client(engine: Speaking) -> TestClient:
    return TestClient(create_app(cast(Any, engine), served_model_names=["scripted"]))


@pytest.fixture(scope="module")
def bytes_of(engine: Speaking) -> dict[bytes, int]:
    """The tokens that are one byte."""
    tokenizer = engine.tokenizer
    found = {tokenizer.token_bytes(token_id): token_id for token_id in range(tokenizer.vocab_size)}
    return {data: token_id for data, token_id in found.items() if len(data) == 1}


def split(data: st.DataObject, engine: Speaking, text: str, bytes_of: dict[bytes, int]) -> list[int]:
    """The text's tokens, each as it is or as its bytes."""
    token_ids: list[int] = []
    for token_id in engine.tokenizer.encode(text, add_special_tokens=False):
        piece = engine.tokenizer.token_bytes(token_id)
        single = [bytes_of.get(piece[index : index + 1]) for index in range(len(piece))]
        if None not in single and data.draw(st.booleans()):
            token_ids += cast("list[int]", single)
        else:
            token_ids.append(token_id)
    return token_ids


def chunks(client: TestClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = client.post(path, json={**body, "stream": True, "max_tokens": 1000})
    assert response.status_code == 200, response.text
    events = [line.removeprefix("data: ") for line in response.content.decode().split("\n\n") if line]
    return [choice for one in events[:-1] for choice in json.loads(one)["choices"]]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), text=TEXTS.filter(bool))
def test_text_and_logprobs(
    client: TestClient, engine: Speaking, bytes_of: dict[bytes, int], data: st.DataObject, text: str
) -> None:
    engine.says = split(data, engine, text, bytes_of)
    assert engine.tokenizer.decode(engine.says, skip_special_tokens=False) == text
    plain = chunks(client, "/v1/completions", {"prompt": "a"})
    assert "".join(choice["text"] for choice in plain) == text
    said = chunks(client, "/v1/chat/completions", CHAT)
    assert "".join(choice["delta"].get("content", "") for choice in said) == text
    chat = chunks(client, "/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 1})
    assert "".join(choice["delta"].get("content", "") for choice in chat) == text
    found = [entry for choice in chat if choice.get("logprobs") for entry in choice["logprobs"]["content"]]
    assert bytes(byte for entry in found for byte in entry["bytes"]) == text.encode()
    assert bytes(byte for entry in found for byte in entry["top_logprobs"][0]["bytes"]) == text.encode()


def events(client: TestClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of an endpoint whose events have types."""
    response = client.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    blocks = response.content.decode().split("\n\n")
    return [json.loads(block.partition("\ndata: ")[2]) for block in blocks if "\ndata: " in block]


def of_type(found: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [one for one in found if one["type"] == kind]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), text=TEXTS.filter(bool))
def test_text_of_messages_and_responses(
    client: TestClient, engine: Speaking, bytes_of: dict[bytes, int], data: st.DataObject, text: str
) -> None:
    engine.says = split(data, engine, text, bytes_of)
    found = events(client, "/v1/messages", {**CHAT, "max_tokens": 1000})
    assert "".join(one["delta"]["text"] for one in of_type(found, "content_block_delta")) == text
    whole = client.post("/v1/messages", json={**CHAT, "max_tokens": 1000}).json()
    assert whole["content"] == [{"type": "text", "text": text}]
    asked = {"input": "a", "top_logprobs": 1, "include": ["message.output_text.logprobs"]}
    found = events(client, "/v1/responses", asked)
    deltas = of_type(found, "response.output_text.delta")
    assert "".join(one["delta"] for one in deltas) == text
    [done] = of_type(found, "response.output_text.done")
    assert done["text"] == text
    assert [entry for one in deltas for entry in one["logprobs"]] == done["logprobs"]
    [end] = found[-1]["response"]["output"]
    [part] = end["content"]
    assert part["text"] == text
    assert bytes(byte for entry in part["logprobs"] for byte in entry["bytes"]) == text.encode()
    [output] = client.post("/v1/responses", json=asked).json()["output"]
    assert output["content"] == end["content"]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), text=TEXTS, escapes=st.booleans())
def test_arguments_of_calls_in_messages_and_responses(
    client: TestClient,
    engine: Speaking,
    bytes_of: dict[bytes, int],
    data: st.DataObject,
    text: str,
    escapes: bool,
) -> None:
    call = json.dumps({"name": "f", "arguments": {"x": text}}, ensure_ascii=escapes)
    engine.says = split(data, engine, f"<tool_call>\n{call}\n</tool_call>", bytes_of)
    schema = {"type": "object"}
    asked = {**CHAT, "max_tokens": 1000, "tools": [{"name": "f", "input_schema": schema}]}
    deltas = of_type(events(client, "/v1/messages", asked), "content_block_delta")
    assert json.loads("".join(one["delta"]["partial_json"] for one in deltas)) == {"x": text}
    [block] = client.post("/v1/messages", json=asked).json()["content"]
    assert block["input"] == {"x": text}
    asked = {"input": "a", "tools": [{"type": "function", "name": "f", "parameters": schema}]}
    found = events(client, "/v1/responses", asked)
    arguments = "".join(one["delta"] for one in of_type(found, "response.function_call_arguments.delta"))
    assert json.loads(arguments) == {"x": text}
    [done] = of_type(found, "response.function_call_arguments.done")
    [whole] = client.post("/v1/responses", json=asked).json()["output"]
    assert done["arguments"] == whole["arguments"] == arguments


@settings(max_examples=40, deadline=None)
@given(data=st.data(), text=TEXTS, escapes=st.booleans())
def test_arguments_of_calls(
    client: TestClient,
    engine: Speaking,
    bytes_of: dict[bytes, int],
    data: st.DataObject,
    text: str,
    escapes: bool,
) -> None:
    call = json.dumps({"name": "f", "arguments": {"x": text}}, ensure_ascii=escapes)
    said = f"<tool_call>\n{call}\n</tool_call>"
    engine.says = split(data, engine, said, bytes_of)
    assert engine.tokenizer.decode(engine.says, skip_special_tokens=False) == said
    found = chunks(client, "/v1/chat/completions", {**CHAT, "tools": [TOOL]})
    calls = [one for choice in found for one in choice["delta"].get("tool_calls", ())]
    arguments = "".join(one["function"].get("arguments", "") for one in calls)
    assert json.loads(arguments) == {"x": text}
    whole = client.post("/v1/chat/completions", json={**CHAT, "tools": [TOOL], "max_tokens": 1000}).json()
    [message] = whole["choices"][0]["message"]["tool_calls"]
    assert message["function"]["arguments"] == arguments
