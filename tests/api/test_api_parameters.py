"""Fields of requests that are neither sampling parameters nor forms, and what answers say besides the text."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator
from typing import Any, cast

import httpx
import pytest
from starlette.testclient import TestClient

from api.app import create_app
from api.errors import ApiError
from api.protocol import CompletionRequest
from api.request_fields import truncated
from engine.core.outputs import CompletionOutput
from engine.frontend.chat_format import ChatFormat
from tests.helpers.scripted import BytesTokenizer, ScriptedEngine

PROMPT = "The quick brown fox jumps over the lazy dog, and then it sleeps. " * 3
CHAT = [{"role": "user", "content": "Say hello."}]
ENDPOINTS = [("completions", {"prompt": "One,"}), ("chat/completions", {"messages": CHAT})]
GREEDY = {"temperature": 0, "max_tokens": 4}


def complete(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    return ok(http.post("/v1/completions", json={**GREEDY, "prompt": "One, two,", **fields}))


def chat(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    return ok(http.post("/v1/chat/completions", json={**GREEDY, "messages": CHAT, **fields}))


def ok(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def chunks(http: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = http.post(path, json={**GREEDY, **body, "stream": True})
    assert response.status_code == 200, response.text
    *data, done = (line.removeprefix("data: ") for line in response.text.splitlines() if line)
    assert done == "[DONE]"
    return [json.loads(one) for one in data]


def rendered(http: httpx.Client, messages: list[dict[str, Any]], **fields: Any) -> str:
    prompt: str = ok(http.post("/apply-template", json={"messages": messages, **fields}))["prompt"]
    return prompt


def test_null_is_not_given(http: httpx.Client) -> None:
    everything = ["mystery", "max_completion_tokens", "tools", "response_format", "stop", "n", "logit_bias"]
    call = {"id": "a", "type": None, "function": {"name": "f", "arguments": None, "x": None}, "custom": None}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": None}], "name": None},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "audio": None},
        {"role": "tool", "tool_call_id": "a", "content": "1", "tool_calls": None},
    ]
    nulls = chat(http, messages=messages, **dict.fromkeys(everything))
    bare = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f"}}]},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
    ]
    given = chat(http, messages=bare)
    assert nulls["choices"] == given["choices"]
    assert nulls["usage"]["prompt_tokens"] == given["usage"]["prompt_tokens"]
    nested = {
        "logit_bias": {"5": None},
        "response_format": {"type": "text", "json_schema": None},
        "stream_options": None,
    }
    assert complete(http, **nested)["choices"] == complete(http)["choices"]
    tool = {"type": "function", "function": {"name": "f", "description": None, "parameters": None, "x": None}}
    assert rendered(http, CHAT, tools=[{**tool, "custom": None}]) == rendered(
        http, CHAT, tools=[{"type": "function", "function": {"name": "f"}}]
    )
    assert chunks(
        http, "/v1/completions", {"prompt": "a", "stream_options": {"include_usage": True, "x": None}}
    )


def test_what_is_null_and_required_is_missing(http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", json={"messages": None})
    assert response.json()["error"]["message"] == "missing field: messages"


def test_custom_roles_and_members_reach_the_template(http: httpx.Client) -> None:
    messages = [{"role": "critic", "content": "Be brief.", "mood": "stern"}, *CHAT]
    assert "<|im_start|>critic\nBe brief.<|im_end|>" in rendered(http, messages)
    assert chat(http, messages=messages)["choices"]


@pytest.mark.parametrize(
    ("path", "body"), [("completions", {"prompt": "One,"}), ("chat/completions", {"messages": CHAT})]
)
def test_max_completion_tokens_goes_before_the_older_name(http: httpx.Client, path: str, body: dict) -> None:
    answer = ok(http.post(f"/v1/{path}", json={**body, "max_tokens": 9, "max_completion_tokens": 2}))
    assert answer["usage"]["completion_tokens"] == 2


def test_a_prompt_is_cut_to_its_last_tokens_or_its_first(http: httpx.Client) -> None:
    whole = ok(http.post("/tokenize", json={"prompt": PROMPT}))["tokens"]
    for fields, kept in (
        ({"truncate_prompt_tokens": 5}, whole[-5:]),
        ({"truncate_prompt_tokens": 5, "truncation_side": "right"}, whole[:5]),
        ({"truncate_prompt_tokens": len(whole) + 1}, whole),
    ):
        cut = complete(http, prompt=PROMPT, echo=True, return_token_ids=True, **fields)
        assert cut["usage"]["prompt_tokens"] == len(kept)
        assert cut["choices"][0]["prompt_token_ids"] == kept
        text = ok(http.post("/detokenize", json={"tokens": kept}))["prompt"]
        assert cut["choices"][0]["text"].startswith(text)
        assert complete(http, prompt=kept)["choices"][0]["text"] == cut["choices"][0]["text"].removeprefix(
            text
        )
    assert chat(http, truncate_prompt_tokens=3, return_token_ids=True)["usage"]["prompt_tokens"] == 3


def test_minus_one_cuts_to_what_fits_beside_the_answer() -> None:
    request = CompletionRequest(prompt="", truncate_prompt_tokens=-1)
    tokens = list(range(200))
    assert truncated(request, tokens, 100, 3) == tokens[-97:]
    assert truncated(request, tokens, 100, None) == tokens[-99:]
    assert truncated(request, tokens[:9], 100, 3) == tokens[:9]
    assert truncated(request, tokens, 100, 0) == tokens[-100:]
    whole = CompletionRequest(prompt="", truncate_prompt_tokens=100)
    assert truncated(whole, tokens, 100, 0) == tokens[-100:]
    with pytest.raises(ApiError, match="room for a prompt of 99"):
        truncated(whole, tokens, 100, 1)


class StartTokenizer(BytesTokenizer):
    """Adds a token in front of a text, which the tokenizer of the served model does not."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + super().encode(text)


@pytest.mark.parametrize(
    ("fields", "completion", "chat"),
    [
        ({}, [1, 97], [97]),
        ({"add_special_tokens": False}, [97], [97]),
        ({"add_special_tokens": True}, [1, 97], [1, 97]),
    ],
)
def test_special_tokens_are_added_where_asked_for(
    fields: dict[str, Any], completion: list[int], chat: list[int]
) -> None:
    async def ends(prompt: list[int], params: object) -> AsyncGenerator[CompletionOutput]:
        yield CompletionOutput(0, "b", [98], finish_reason="stop")

    engine = ScriptedEngine(ends)
    engine.tokenizer = StartTokenizer()
    engine.chat_format = ChatFormat(cast(Any, engine.tokenizer))
    http = TestClient(create_app(cast(Any, engine), served_model_names=["scripted"]))
    messages = [{"role": "user", "content": "a"}]
    shown = {"return_token_ids": True, **fields}
    answer = ok(http.post("/v1/completions", json={"prompt": "a", **shown}))
    assert answer["choices"][0]["prompt_token_ids"] == completion
    assert (
        ok(http.post("/v1/chat/completions", json={"messages": messages, **shown}))["prompt_token_ids"]
        == chat
    )
    assert ok(http.post("/tokenize", json={"prompt": "a", **fields}))["tokens"] == completion
    assert ok(http.post("/tokenize", json={"messages": messages, **fields}))["tokens"] == chat


def test_salts_keep_cached_blocks_apart(http: httpx.Client) -> None:
    prompt = uuid.uuid4().hex + PROMPT

    def num_cached(**fields: Any) -> int:
        details = complete(http, prompt=prompt, **fields)["usage"]["prompt_tokens_details"]
        return int(details["cached_tokens"])

    assert num_cached(cache_salt="a") == 0
    assert num_cached(cache_salt="a") > 0
    assert num_cached(cache_salt="b") == 0
    assert num_cached() == 0
    assert num_cached() > 0
    assert num_cached(cache_salt="b") > 0


@pytest.mark.parametrize(
    ("path", "body"), [("completions", {"prompt": "One,"}), ("chat/completions", {"messages": CHAT})]
)
def test_the_request_names_its_answer(http: httpx.Client, path: str, body: dict) -> None:
    fields = {**GREEDY, **body, "request_id": "mine-1"}
    whole = http.post(f"/v1/{path}", json=fields)
    assert (ok(whole)["id"], whole.headers["x-request-id"]) == ("mine-1", "mine-1")
    streamed = http.post(f"/v1/{path}", json={**fields, "stream": True})
    assert streamed.headers["x-request-id"] == "mine-1"
    assert {one["id"] for one in chunks(http, f"/v1/{path}", fields)} == {"mine-1"}
    # Two open requests may have the same: both prompts of a body are open together, and so are two bodies.
    with http.stream("POST", f"/v1/{path}", json={**fields, "stream": True, "max_tokens": 200}):
        assert ok(http.post(f"/v1/{path}", json=fields))["id"] == "mine-1"
    own = http.post(f"/v1/{path}", json=fields, headers={"x-request-id": "of the proxy".replace(" ", "-")})
    assert (ok(own)["id"], own.headers["x-request-id"]) == ("mine-1", "of-the-proxy")


def test_tokens_by_their_ids(http: httpx.Client) -> None:
    choice = complete(http, logprobs=2, return_tokens_as_token_ids=True, return_token_ids=True)["choices"][0]
    names = [f"token_id:{token_id}" for token_id in choice["token_ids"]]
    assert choice["logprobs"]["tokens"] == names
    for name, top in zip(names, choice["logprobs"]["top_logprobs"], strict=True):
        assert name in top
        assert all(one.startswith("token_id:") for one in top)
    fields = {"logprobs": True, "top_logprobs": 1, "return_token_ids": True}
    named = chat(http, **fields, return_tokens_as_token_ids=True)["choices"][0]
    plain = chat(http, **fields)["choices"][0]
    for token_id, one, other in zip(
        named["token_ids"], named["logprobs"]["content"], plain["logprobs"]["content"], strict=True
    ):
        assert one["token"] == one["top_logprobs"][0]["token"] == f"token_id:{token_id}"
        assert one["bytes"] == other["bytes"]


def test_the_prompts_token_ids_come_once(http: httpx.Client) -> None:
    ids = ok(http.post("/tokenize", json={"prompt": "One,"}))["tokens"]
    answer = complete(http, prompt=["One,", "Two,"], return_token_ids=True, n=2, seed=1)
    assert [choice["prompt_token_ids"] == ids for choice in answer["choices"]] == [True, True, False, False]
    streamed = chunks(http, "/v1/completions", {"prompt": "One,", "return_token_ids": True})
    assert [one["choices"][0].get("prompt_token_ids") for one in streamed] == [ids] + [None] * (
        len(streamed) - 1
    )
    ids = ok(http.post("/tokenize", json={"messages": CHAT}))["tokens"]
    assert chat(http, return_token_ids=True)["prompt_token_ids"] == ids
    streamed = chunks(http, "/v1/chat/completions", {"messages": CHAT, "return_token_ids": True})
    assert [one.get("prompt_token_ids") for one in streamed] == [ids] + [None] * (len(streamed) - 1)
    assert "prompt_token_ids" not in chat(http)


def test_continuous_usage_counts_what_has_been_sent(http: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    role, *others, last = chunks(http, "/v1/chat/completions", {"messages": CHAT, "stream_options": options})
    assert role["choices"][0]["delta"]["role"] == "assistant"
    assert role["usage"]["completion_tokens"] == 0
    assert role["usage"]["prompt_tokens"] == last["usage"]["prompt_tokens"]
    counts = [one["usage"]["completion_tokens"] for one in others]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] == last["usage"]["completion_tokens"] == 4


def test_a_stop_has_its_other_name(http: httpx.Client) -> None:
    choice = complete(http, prompt="One, two, three,", stop=[" four"])["choices"][0]
    assert choice["stop_reason"] == choice["matched_stop"] == " four"
    finish = chunks(http, "/v1/completions", {"prompt": "One, two, three,", "stop": [" four"]})[-1]
    assert finish["choices"][0]["matched_stop"] == " four"
    assert chat(http)["choices"][0]["matched_stop"] is None


@pytest.mark.parametrize("options", [None, {"include_usage": True}])
@pytest.mark.parametrize(
    ("path", "body"), [("completions", {"prompt": "One,"}), ("chat/completions", {"messages": CHAT})]
)
def test_answers_say_what_they_depend_on_and_took(
    http: httpx.Client, path: str, body: dict, options: dict | None
) -> None:
    whole = ok(http.post(f"/v1/{path}", json={**GREEDY, **body}))
    streamed = chunks(http, f"/v1/{path}", {**body, "stream_options": options})
    assert whole["system_fingerprint"].startswith("fp_")
    assert {one["system_fingerprint"] for one in streamed} == {whole["system_fingerprint"]}
    *first, last = streamed
    assert all("timings" not in one for one in first)
    for timings in (whole["timings"], last["timings"]):
        assert timings["predicted_n"] == whole["usage"]["completion_tokens"]
        assert timings["prompt_n"] + timings["cache_n"] == whole["usage"]["prompt_tokens"]
        assert timings["prompt_ms"] > 0
        assert timings["predicted_ms"] > 0
        assert timings["predicted_per_second"] == pytest.approx(
            1000 * timings["predicted_n"] / timings["predicted_ms"]
        )
        assert timings["prompt_per_token_ms"] == pytest.approx(timings["prompt_ms"] / timings["prompt_n"])


def test_tokens_and_text_and_back(http: httpx.Client) -> None:
    text = "Grüße 👋🏽 <|im_end|>"
    tokens = ok(http.post("/tokenize", json={"prompt": text, "return_token_strs": True}))
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    assert tokens["token_strs"][-1] == "<|im_end|>"
    assert tokens["max_model_len"] == ok(http.get("/v1/models/llama"))["max_model_len"]
    assert ok(http.post("/detokenize", json={"tokens": tokens["tokens"]}))["prompt"] == text
    error = http.post("/detokenize", json={"tokens": [10**6]})
    assert (error.status_code, error.json()["error"]["param"]) == (400, "tokens")


def test_a_chats_tokens_are_those_of_its_answer(http: httpx.Client) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    fields = {"messages": CHAT, "tools": tools}
    tokens = ok(http.post("/tokenize", json=fields))
    assert tokens["tokens"] == chat(http, tools=tools, return_token_ids=True)["prompt_token_ids"]
    assert "token_strs" not in tokens
    cut = ok(http.post("/tokenize", json={**fields, "truncate_prompt_tokens": 2}))
    assert cut["tokens"] == tokens["tokens"][-2:]
    refused = http.post("/apply-template", json={**fields, "truncate_prompt_tokens": 2})
    assert refused.json()["error"]["param"] == "truncate_prompt_tokens"
    text = rendered(http, CHAT, tools=tools)
    assert ok(http.post("/tokenize", json={"prompt": text, "add_special_tokens": False})) == tokens
    assert text.endswith("<|im_start|>assistant\n")


def test_ping_is_health(http: httpx.Client) -> None:
    assert ok(http.get("/ping")) == ok(http.post("/ping")) == ok(http.get("/health"))


def test_models_say_what_they_are(http: httpx.Client) -> None:
    [model] = ok(http.get("/v1/models"))["data"]
    assert (model["id"], model["root"]) == ("llama", "llama")
    assert model["max_model_len"] > 0
