"""The real server with the real default model, started once for all tests of this directory."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest

API_KEY = "test-key"
OPTIONS = ("--model", "llama", "--quant", "int8", "--kv-cache-memory", "256MiB")
START_SECONDS = STOP_SECONDS = 600
"""When a test gives up: nothing takes so long, on a machine however slow."""


@dataclass(frozen=True)
class ServerProcess:
    """A running `python -m engine.serve`.

    Attributes:
        log: File with its standard output and error.
    """

    process: subprocess.Popen[bytes]
    url: str
    port: int
    log: Path

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        pytest.fail(f"the server did not become ready:\n{self.log.read_text()}")

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@contextmanager
def start_server(directory: Path, *options: str) -> Iterator[ServerProcess]:
    """The default model on a free port; at the end it is terminated and must leave no process behind."""
    port = free_port()
    log = directory / f"server-{port}.log"
    command = [sys.executable, "-m", "engine.serve", *OPTIONS, "--port", str(port), *options]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    server = ServerProcess(process, f"http://127.0.0.1:{port}", port, log)
    children: list[psutil.Process] = []
    try:
        yield server
        if process.poll() is None:
            children = server.children()
            process.terminate()
        process.wait(STOP_SECONDS)
    finally:
        process.kill()
        process.wait()
        _, left = psutil.wait_procs(children, timeout=STOP_SECONDS)
        for child in left:
            child.kill()
    assert not left, f"left behind: {left}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with start_server(tmp_path_factory.mktemp("server"), "--api-key", API_KEY) as running:
        running.wait_until_ready()
        yield running
        assert running.process.poll() is None, running.log.read_text()
    assert running.process.returncode == 0, running.log.read_text()


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    """For what the official client would not send."""
    headers = {"authorization": f"Bearer {API_KEY}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=STOP_SECONDS) as client:
        yield client


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
