"""Refusals: the status, OpenAI's error shape, the field at fault, and its limit."""

from __future__ import annotations

import httpx
import openai
import pytest

from api.limits import default_max_body_bytes
from tests.api.conftest import ServerProcess

COMPLETION = {"model": "llama", "prompt": "hello", "max_tokens": 1}
CHAT = {"model": "llama", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
EMBEDDING = {"model": "llama", "input": "hello"}

# (changed fields, param, words of the message)
BAD_COMPLETIONS = [
    ({"mystery": 1}, "mystery", "unknown field"),
    ({"stream": True, "stream_options": {"mystery": 1}}, "stream_options.mystery", "unknown field"),
    (
        {"stream": True, "stream_options": {"include_use": True}},
        "stream_options.include_use",
        "the nearest that is known is include_usage",
    ),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"max_token": 1}, "max_token", "the nearest that is known is max_tokens"),
    ({"prompt": None}, "prompt", "missing field"),
    ({"prompt": []}, "prompt", "prompt must be"),
    ({"prompt": [1, "a"]}, "prompt", "prompt must be"),
    ({"prompt": [[1, "a"]]}, "prompt[0][1]", "expected int"),
    ({"prompt": ["a"] * 3000}, "prompt", "2048"),
    ({"prompt": [10**6]}, "prompt", "1000000"),
    ({"prompt": [-1]}, "prompt", "-1"),
    ({"prompt": [[]]}, "prompt", "prompt"),
    ({"prompt": "word " * 20000}, "prompt", "the context holds"),
    ({"max_tokens": "3"}, "max_tokens", "expected int"),
    ({"max_tokens": 0}, "max_tokens", "at least 1, got 0"),
    ({"max_tokens": 9000}, "max_tokens", "max_tokens is 9000 and the prompt has 1 tokens; the context holds"),
    ({"min_tokens": 1, "stop_token_ids": list(range(49152))}, "stop_token_ids", "at most 1024"),
    ({"max_tokens": 2**70}, "max_tokens", "9223372036854775807"),
    ({"temperature": 2.5}, "temperature", "between 0.0 and 2.0, got 2.5"),
    ({"top_p": -0.1}, "top_p", "between 0 and 1, got -0.1"),
    ({"top_k": -2}, "top_k", "at least 0"),
    ({"min_p": 1.5}, "min_p", "between"),
    ({"n": 0}, "n", "between 1 and 128"),
    ({"n": 129}, "n", "between 1 and 128"),
    ({"presence_penalty": 3}, "presence_penalty", "between -2.0 and 2.0"),
    ({"frequency_penalty": -3}, "frequency_penalty", "between -2.0 and 2.0"),
    ({"repetition_penalty": 0}, "repetition_penalty", "between 0.01 and 10"),
    ({"seed": 2**64}, "seed", "9223372036854775807"),
    ({"stop": [""]}, "stop", "non-empty"),
    ({"stop": ["a"] * 65}, "stop", "64"),
    ({"n": 65}, "n", "--max-num-seqs"),
    ({"stop": [1]}, "stop[0]", "expected str"),
    ({"logprobs": 21}, "logprobs", "between 0 and 20"),
    ({"logprobs": True}, "logprobs", "expected int"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "between -100 and 100"),
    ({"logit_bias": {"word": 1}}, "logit_bias", "expected int"),
    ({"logit_bias": {"1000000": 1}}, "logit_bias", "1000000"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids", "1000000"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "at least one"),
    ({"allowed_token_ids": [10**6]}, "allowed_token_ids", "1000000"),
    ({"allowed_token_ids": [7042], "bad_words": ["Paris"]}, "allowed_token_ids", "all of allowed_token_ids"),
    ({"bad_words": [""]}, "bad_words", "non-empty"),
    ({"bad_words": ["a"] * 65}, "bad_words", "at most 64 strings"),
    ({"bad_words": ["a" * 1025]}, "bad_words", "got one of 1025"),
    ({"bad_words": "a"}, "bad_words", "expected array"),
    ({"min_tokens": 2}, "min_tokens", "max_tokens"),
    ({"best_of": 2, "n": 3}, "best_of", "between n (3) and 128, got 2"),
    ({"best_of": 200}, "best_of", "between n (1) and 128, got 200"),
    ({"best_of": 2, "stream": True}, "best_of", "streamed"),
    ({"suffix": "end"}, "suffix", "not supported"),
    ({"prompt_logprobs": -1}, "prompt_logprobs", "between 0 and 20"),
    ({"prompt_logprobs": -1, "echo": True, "logprobs": 1}, "prompt_logprobs", "between 0 and 20"),
    ({"echo": True, "logprobs": 21}, "logprobs", "between 0 and 20"),
    ({"structured_outputs": {"jsonn": {}}}, "structured_outputs", "structured_outputs.jsonn is not known"),
    ({"structured_outputs": {}}, "structured_outputs", "found none"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "found regex and choice"),
    ({"structured_outputs": {"regex": 3}}, "structured_outputs", "must be a non-empty string"),
    ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs", "look-ahead"),
    ({"max_completion_tokens": 9000}, "max_completion_tokens", "max_tokens is 9000 and the prompt has"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "-1 or at least 1, got 0"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "-1 or at least 1, got -2"),
    (
        {"truncate_prompt_tokens": 8192},
        "truncate_prompt_tokens",
        "is 8192; the context has room for a prompt of 8191",
    ),
    ({"truncation_side": "top"}, "truncation_side", "Invalid enum value"),
    ({"request_id": "two words"}, "request_id", "visible characters"),
    ({"request_id": "x" * 129}, "request_id", "1 to 128"),
    ({"cache_salt": ""}, "cache_salt", "non-empty"),
    ({"use_beam_search": True}, "use_beam_search", "not supported"),
    ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
    ({"guided_choice": []}, "guided_choice", "found none"),
    ({"guided_choice": [""]}, "guided_choice", "non-empty strings"),
    ({"guided_grammar": "start: x"}, "guided_grammar", "unknown name"),
    ({"guided_grammar": "start: <|nobody|>"}, "guided_grammar", "unknown special token"),
    ({"guided_grammar": "root ::= x"}, "guided_grammar", "the GBNF grammar cannot be read"),
    ({"guided_json": "{"}, "guided_json", "not valid JSON"),
    ({"guided_json": {"x-guidance": {"lenient": True}}}, "guided_json", "'x-guidance' at $"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_regex", "guided_regex and guided_choice both"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "guided_json alone"),
    (
        {"guided_json": {"properties": {"a": {"items": {"type": "string", "format": "x"}}}}},
        "guided_json",
        "the keyword 'format' at $.properties.a.items cannot be kept",
    ),
]
BAD_CHATS = [
    ({"mystery": 1}, "mystery", "unknown field"),
    ({"messages": []}, "messages", "at least one"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "missing"),
    ({"messages": [{"role": "user", "content": "x", "name": 1}]}, "messages[0].name", "expected str"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type",
        "not supported",
    ),
    ({"messages": [{"role": "user", "content": "word " * 20000}]}, "messages", "the context holds"),
    ({"max_tokens": 9000}, "max_tokens", "the context holds"),
    ({"max_completion_tokens": 9000}, "max_completion_tokens", "is 9000 and the prompt has"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "at least 1, got 0"),
    ({"top_logprobs": 3}, "top_logprobs", "logprobs: true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "between 0 and 20"),
    ({"logprobs": 3}, "logprobs", "expected bool"),
    ({"response_format": {"type": "yaml"}}, "response_format", "json_schema, got 'yaml'"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "with a schema"),
    ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema", "unknown field"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
        "response_format",
        "the keyword 'not' at $ cannot be kept",
    ),
    ({"verbosity": "loud"}, "verbosity", "one of low, medium, high, got 'loud'"),
    ({"chat_template": "{{ messages }}"}, "chat_template", "not supported"),
    ({"audio": {"voice": "a", "format": "wav"}}, "audio", "not supported"),
    ({"continue_final_message": True}, "continue_final_message", "assistant"),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
        "add_generation_prompt",
    ),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", "must not hold"),
]
BAD_EMBEDDINGS = [
    ({"mystery": 1}, "mystery", "unknown field"),
    ({"input": None}, "input", "missing field: input"),
    ({"input": []}, "input", "input must be"),
    ({"input": [1, "a"]}, "input", "input must be"),
    ({"input": [[]]}, "input", "at least one token"),
    ({"input": ["a"] * 2049}, "input", "2048"),
    ({"input": [10**6]}, "input", "1000000"),
    ({"input": "word " * 20000}, "input", "the context holds"),
    ({"encoding_format": "int8"}, "encoding_format", "Invalid enum value 'int8'"),
    ({"dimensions": 0}, "dimensions", "at least 1, got 0"),
    ({"dimensions": 577}, "dimensions", "at most 576"),
    ({"pooling": "cls"}, "pooling", "'last' or 'mean', got 'cls'"),
    ({"normalize": "yes"}, "normalize", "expected bool"),
]
CASES = [("/v1/completions", COMPLETION, *case) for case in BAD_COMPLETIONS]
CASES += [("/v1/chat/completions", CHAT, *case) for case in BAD_CHATS]
CASES += [("/v1/embeddings", EMBEDDING, *case) for case in BAD_EMBEDDINGS]


def error_of(response: httpx.Response, status: int) -> dict[str, str | None]:
    assert response.status_code == status, response.text
    error: dict[str, str | None] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(("path", "body", "change", "param", "words"), CASES)
def test_bad_fields_are_named(
    http: httpx.Client, path: str, body: dict, change: dict, param: str, words: str
) -> None:
    error = error_of(http.post(path, json={**body, **change}), 400)
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert error["param"] == param
    assert param.split("[")[0].split(".")[-1] in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"prompt":',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "top_p": NaN}',
        b'{"user": ' + b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_malformed_json_is_400(http: httpx.Client, body: bytes) -> None:
    error_of(http.post("/v1/completions", content=body), 400)


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
def test_an_unknown_model_is_404(http: httpx.Client, path: str, body: dict) -> None:
    error = error_of(http.post(path, json={**body, "model": "gpt-9"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "gpt-9" in error["message"]
    assert "llama" in error["message"]


def test_a_bad_field_of_a_stream_is_an_ordinary_400(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={**COMPLETION, "prompt": "word " * 20000, "stream": True})
    assert error_of(response, 400)["param"] == "prompt"


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": "test-key"}])
@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/models"), ("POST", "/v1/completions")])
def test_v1_needs_the_key(server: ServerProcess, headers: dict[str, str], method: str, path: str) -> None:
    response = httpx.request(method, server.url + path, headers=headers)
    assert error_of(response, 401)["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ["/health", "/ready", "/ping"])
def test_other_paths_need_no_key(server: ServerProcess, path: str) -> None:
    assert httpx.get(server.url + path).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("POST", "/v1/nowhere", 404), ("GET", "/v1/completions", 405)],
)
def test_other_paths_and_methods_are_refused(http: httpx.Client, method: str, path: str, status: int) -> None:
    assert path in str(error_of(http.request(method, path), status)["message"])


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large_is_413(http: httpx.Client, declared: bool) -> None:
    limit = default_max_body_bytes(8192)
    body = b" " * (limit + 1)
    parts = (body[start : start + 2**20] for start in range(0, len(body), 2**20))
    response = http.post("/v1/completions", content=body if declared else parts)
    assert str(limit) in str(error_of(response, 413)["message"])
    assert http.post("/v1/completions", json=COMPLETION).status_code == 200


def test_the_official_client_raises_its_own_errors(server: ServerProcess, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="llama", prompt="a", temperature=9)
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.completions.create(model="gpt-9", prompt="a")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
