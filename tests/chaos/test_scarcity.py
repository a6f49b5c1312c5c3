"""A server that has little of what it needs says so, and goes on."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.chaos.server import running_server, small_options

pytestmark = pytest.mark.process


def test_few_descriptors_bound_connections(small_model: Path) -> None:
    body = {"prompt": "Once", "max_tokens": 8, "temperature": 0}
    with running_server(small_options(small_model), most_files=64) as server:

        def answers() -> httpx.Response:
            return httpx.post(f"{server.base_url}/v1/completions", json=body, timeout=60, trust_env=False)

        expected = answers().json()["choices"]
        address = server.base_url.removeprefix("http://").split(":")
        with ExitStack() as stack:
            for _ in range(16):
                stack.enter_context(socket.create_connection((address[0], int(address[1]))))
            assert answers().status_code == 503
        response = answers()
        while response.status_code == 503:  # until the server has seen them go
            response = answers()
        assert response.json()["choices"] == expected
        said = server.last_words()
        assert "lets this process open 64 files, enough for 16 connections at once; raise the limit" in said
        assert "Traceback" not in said
