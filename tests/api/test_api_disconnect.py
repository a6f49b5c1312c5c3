"""Clients that hang up."""

from __future__ import annotations

import json
import socket
import time

import httpx
import pytest

from tests.api.conftest import API_KEY, ServerProcess
from tests.api.test_api_service import metrics

LONG = {"model": "llama", "prompt": "Once upon a time", "max_tokens": 5000, "ignore_eos": True}


def send(server: ServerProcess, body: dict) -> socket.socket:
    """A connection on which a completion has been asked for."""
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {API_KEY}\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def wait_for_metrics(http: httpx.Client, name: str, value: float) -> dict[str, float]:
    deadline = time.monotonic() + 60
    while (now := metrics(http)).get(name, 0) != value:
        assert time.monotonic() < deadline, f"{name} is {now.get(name)} and not {value}"
        time.sleep(0.05)
    return now


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_aborts_the_request(server: ServerProcess, http: httpx.Client, stream: bool) -> None:
    before = metrics(http)
    connection = send(server, {**LONG, "stream": stream})
    wait_for_metrics(http, "num_requests_running", 1)
    connection.close()
    aborted = before.get("request_success_total:abort", 0)
    after = wait_for_metrics(http, "request_success_total:abort", aborted + 1)
    assert after["generation_tokens_total"] - before["generation_tokens_total"] < LONG["max_tokens"]
    idle = wait_for_metrics(http, "num_requests_running", 0)
    assert idle["kv_cache_usage_perc"] == 0
