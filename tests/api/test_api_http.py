"""What HTTP itself asks for, as clients of other languages use it."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import AsyncGenerator
from itertools import pairwise

import httpx
import pytest
from starlette.testclient import TestClient

from api.app import create_app
from api.connection import HttpProtocol
from engine.core.outputs import CompletionOutput
from engine.core.sampling_params import SamplingParams
from tests.api.conftest import API_KEY, ServerProcess
from tests.helpers.scripted import ScriptedEngine

COMPLETION = {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
JAVA_HEADERS = (
    "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"
)


def exchange(port: int, *parts: bytes) -> bytes:
    """What the server answers on one connection, which it is asked to close."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for part in parts:
            connection.sendall(part)
        answer = b""
        while data := connection.recv(1 << 16):
            answer += data
    return answer


def post(headers: str, body: bytes, length: str | None = None) -> bytes:
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {API_KEY}\r\n"
        f"Content-Type: application/json\r\n{headers}{length or f'Content-Length: {len(body)}'}\r\n\r\n"
    )
    return head.encode() + body


@pytest.mark.parametrize("pieces", [1, 7, 1000])
def test_a_request_to_upgrade_is_answered_as_if_it_did_not_ask(server: ServerProcess, pieces: int) -> None:
    body = json.dumps(COMPLETION).encode()
    first = post(JAVA_HEADERS, body)
    # The same connection serves an ordinary request afterwards, and a chunked one that asks once more.
    second = post("", body)
    chunked = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    third = post(JAVA_HEADERS + "Connection: close\r\n", chunked, "Transfer-Encoding: chunked")
    size = -(-len(first) // pieces)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        for request in (first, second, third):
            for start in range(0, len(request), size):
                connection.sendall(request[start : start + size])
            answer = b""
            while b"usage" not in answer:
                data = connection.recv(1 << 16)
                assert data, answer
                answer += data
            assert answer.startswith(b"HTTP/1.1 200")
            assert b" Paris." in answer


def test_only_the_heads_line_is_left_out_wherever_it_is_cut() -> None:
    request = (
        b"POST / HTTP/1.1\r\nHost: x\r\nUPGRADE: h2c\r\nUpgrade-Insecure-Requests: 1\r\nConnection: Upgrade\r\n\r\n"
        b"a\r\nupgrade: no\r\n\r\n"
    )
    expected = request.replace(b"\r\nUPGRADE: h2c", b"")
    cuts = [[0, cut, len(request)] for cut in range(1, len(request))] + [list(range(len(request) + 1))]
    for cut in cuts:
        passed: list[bytes] = []
        protocol = HttpProtocol.__new__(HttpProtocol)
        for first, last in pairwise(cut):
            data = request[first:last]
            passed.append(data if b"\r\n\r\n" in b"".join(passed) else protocol._without_upgrade(data))
        assert b"".join(passed) == expected


def test_what_is_no_request_is_answered_at_once(server: ServerProcess) -> None:
    assert exchange(server.port, b"nonsense\r\n").startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("path", ["/health", "/version", "/metrics", "/v1/models", "/v1/models/llama"])
def test_head_is_get_without_the_content(http: httpx.Client, path: str) -> None:
    get, head = http.get(path), http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    assert path == "/metrics" or head.headers["content-length"] == get.headers["content-length"]
    assert http.head("/nowhere").status_code == 404


@pytest.mark.parametrize("given", ["bearer {}", "BEARER   {}", "BeArEr {}"])
def test_the_scheme_of_the_key_may_be_in_any_case(server: ServerProcess, given: str) -> None:
    headers = {"authorization": given.format(API_KEY)}
    assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200
    headers = {"authorization": given.format(API_KEY + "x")}
    assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip"])
def test_a_compressed_body_is_refused_by_name(http: httpx.Client, encoding: str) -> None:
    response = http.post("/v1/completions", content=b"...", headers={"content-encoding": encoding})
    assert response.status_code == 415
    assert encoding in response.json()["error"]["message"]
    identity = http.post("/v1/completions", json=COMPLETION, headers={"content-encoding": "identity"})
    assert identity.status_code == 200


def test_a_clients_request_id_is_returned(http: httpx.Client) -> None:
    for path, status in (("/health", 200), ("/nowhere", 404)):
        response = http.get(path, headers={"x-request-id": "mine-1"})
        assert (response.status_code, response.headers["x-request-id"]) == (status, "mine-1")
    completion = http.post("/v1/completions", json=COMPLETION, headers={"x-request-id": "mine-2"})
    assert completion.headers["x-request-id"] == "mine-2"
    own = http.post("/v1/completions", json=COMPLETION)
    assert own.headers["x-request-id"] == own.json()["id"]
    for unusable in ("a b", "x" * 129):
        answer = http.get("/health", headers={"x-request-id": unusable})
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a " * 9000, "max_tokens": 5}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a " * 9000}]}),
    ],
)
def test_a_prompt_that_is_too_long_has_the_code_that_agents_know(
    http: httpx.Client, path: str, body: dict[str, object]
) -> None:
    response = http.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


async def silent(prompt: list[int], params: SamplingParams) -> AsyncGenerator[CompletionOutput, None]:
    for output in ():
        yield output


def test_pages_may_ask_only_where_that_was_said() -> None:
    origin = "http://localhost:3000"
    asked = {"origin": origin, "access-control-request-method": "POST"}
    for origins, allowed in (((), None), ((origin,), origin), (("http://else.where",), None), (("*",), "*")):
        app = create_app(
            ScriptedEngine(silent), served_model_names=["scripted"], api_key="k", cors_origins=origins
        )
        with TestClient(app) as client:
            preflight = client.options("/v1/completions", headers=asked)
            assert preflight.headers.get("access-control-allow-origin") == allowed
            # What is refused for want of a key must be readable, too.
            answer = client.get("/v1/models", headers={"origin": origin})
            assert answer.status_code == 401
            assert answer.headers.get("access-control-allow-origin") == allowed
