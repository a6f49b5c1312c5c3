"""Log-probabilities of prompts over HTTP: `prompt_logprobs`, `echo` with `logprobs`, `best_of`."""

from __future__ import annotations

import json
from operator import itemgetter
from typing import Any

import httpx
import pytest

PROMPT = "The capital of France is Paris — 東京 is that of Japan."


def post(http: httpx.Client, path: str, **body: Any) -> Any:
    response = http.post(f"/v1/{path}", json={"model": "llama", "temperature": 0, **body})
    assert response.status_code == 200, response.text
    return response.json()


def complete(http: httpx.Client, **body: Any) -> Any:
    return post(http, "completions", **{"prompt": PROMPT, **body})


def stream(http: httpx.Client, path: str, **body: Any) -> list[Any]:
    response = http.post(f"/v1/{path}", json={"model": "llama", "temperature": 0, "stream": True, **body})
    assert response.status_code == 200, response.text
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def test_echo_has_the_legacy_form_from_the_first_token_on(http: httpx.Client) -> None:
    [choice] = complete(http, echo=True, logprobs=2, max_tokens=3)["choices"]
    assert choice["text"].startswith(PROMPT)
    logprobs = choice["logprobs"]
    assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert len({len(column) for column in logprobs.values()}) == 1
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
    pairs = zip(logprobs["tokens"], logprobs["text_offset"], strict=True)
    whole = [(token, offset) for token, offset in pairs if not token.startswith("bytes:")]
    assert len(whole) < len(logprobs["tokens"])
    assert all(choice["text"][offset : offset + len(token)] == token for token, offset in whole)
    for token, logprob, top in zip(
        *itemgetter("tokens", "token_logprobs", "top_logprobs")(logprobs), strict=True
    ):
        assert top is None or (top[token] == logprob and 2 <= len(top) <= 3)
    # What is generated has the numbers that it has without echo.
    [plain] = complete(http, logprobs=2, max_tokens=3)["choices"]
    assert choice["text"] == PROMPT + plain["text"]
    for name in ("tokens", "token_logprobs", "top_logprobs"):
        assert logprobs[name][-3:] == plain["logprobs"][name]
    assert logprobs["text_offset"][-3] == len(PROMPT)


def test_what_lm_eval_sends_gives_what_it_reads(http: httpx.Client) -> None:
    """Prompts as token ids; of each continuation the log-probability, and whether greedy decoding brings it."""
    start = [504, 3575, 282, 4649, 314]
    [drawn] = complete(http, prompt=[start], max_tokens=6, logprobs=1, return_token_ids=True)["choices"]
    prompts = [
        start + drawn["token_ids"],
        start + drawn["token_ids"][:3] + [5],
        start + drawn["token_ids"][:2],
    ]
    answer = complete(http, prompt=prompts, max_tokens=1, logprobs=1, echo=True, seed=1234)
    choices = sorted(answer["choices"], key=itemgetter("index"))
    found = []
    for choice, prompt in zip(choices, prompts, strict=True):
        assert len(choice["logprobs"]["tokens"]) == len(prompt) + 1
        values = choice["logprobs"]["token_logprobs"][len(start) : -1]
        tops = choice["logprobs"]["top_logprobs"][len(start) : -1]
        is_greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
        found.append((values, is_greedy))
    expected = drawn["logprobs"]["token_logprobs"]
    assert found[0] == (expected, True)
    assert (found[1][0][:3], found[1][1]) == (expected[:3], False)
    assert found[2] == (expected[:2], True)


@pytest.mark.parametrize("max_tokens", [0, 4])
def test_a_stream_brings_what_the_whole_has(http: httpx.Client, max_tokens: int) -> None:
    body = {
        "prompt": [PROMPT, "In 2024,"],
        "echo": True,
        "logprobs": 1,
        "prompt_logprobs": 2,
        "max_tokens": max_tokens,
        "n": 2,
        "seed": 1,
    }
    whole = complete(http, **body)["choices"]
    joined: list[dict[str, Any]] = [{"text": "", "tokens": [], "text_offset": []} for _ in whole]
    for chunk in stream(http, "completions", **body):
        [choice] = chunk["choices"]
        part = joined[choice["index"]]
        part["text"] += choice["text"]
        part["tokens"] += choice["logprobs"]["tokens"]
        part["text_offset"] += choice["logprobs"]["text_offset"]
        if "prompt_logprobs" in choice:
            assert "prompt_logprobs" not in part, "they come twice"
            part["prompt_logprobs"] = choice["prompt_logprobs"]
    for choice, part in zip(whole, joined, strict=True):
        assert part["text"] == choice["text"]
        assert part["prompt_logprobs"] == choice["prompt_logprobs"]
        assert all(part[name] == choice["logprobs"][name] for name in ("tokens", "text_offset"))


def test_without_tokens_there_is_the_prompt_alone(http: httpx.Client) -> None:
    answer = complete(http, echo=True, max_tokens=0)
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == (PROMPT, "length", None)
    assert answer["usage"]["completion_tokens"] == 0
    assert "prompt_logprobs" not in choice
    [choice] = complete(http, prompt_logprobs=0, max_tokens=0)["choices"]
    assert (choice["text"], choice["logprobs"]) == ("", None)
    assert [entries and len(entries) for entries in choice["prompt_logprobs"]][:2] == [None, 1]


def test_prompt_logprobs_are_vllms(http: httpx.Client) -> None:
    [choice] = complete(
        http, prompt=[504, 3575, 282], prompt_logprobs=1, echo=True, logprobs=3, max_tokens=1
    )["choices"]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    for token_id, entries, echoed in zip(
        ["3575", "282"], others, choice["logprobs"]["token_logprobs"][1:], strict=False
    ):
        assert set(entries[token_id]) == {"logprob", "rank", "decoded_token"}
        assert entries[token_id]["logprob"] == echoed
        assert 1 in [entry["rank"] for entry in entries.values()]
        assert len(entries) <= 2
    assert others[1]["282"] == {"logprob": pytest.approx(-0.3, abs=0.3), "rank": 1, "decoded_token": " of"}


@pytest.mark.parametrize("limit", [{"max_completion_tokens": 0}, {"max_tokens": 2}])
def test_chats_have_them_beside_the_choices(http: httpx.Client, limit: dict[str, int]) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], "prompt_logprobs": 1, "n": 2, **limit}
    answer = post(http, "chat/completions", **body)
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert answer["prompt_logprobs"][0] is None
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 2
    chunks = stream(http, "chat/completions", **body)
    assert [chunk["prompt_logprobs"] for chunk in chunks if "prompt_logprobs" in chunk] == [
        answer["prompt_logprobs"]
    ]


def test_the_best_of_some_samples(http: httpx.Client) -> None:
    body = {"prompt": ["Once", "In 2024,"], "temperature": 1, "max_tokens": 6, "seed": 4}
    every = complete(http, **body, n=5, logprobs=0)["choices"]
    answer = complete(http, **body, n=2, best_of=5)
    assert answer["usage"]["completion_tokens"] == sum(len(one["logprobs"]["tokens"]) for one in every)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    expected = []
    for start in (0, 5):
        means = [
            (sum(one["logprobs"]["token_logprobs"]) / len(one["logprobs"]["tokens"]), one["text"])
            for one in every[start : start + 5]
        ]
        expected += [text for _, text in sorted(means, reverse=True)[:2]]
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert all(choice["logprobs"] is None for choice in answer["choices"])
