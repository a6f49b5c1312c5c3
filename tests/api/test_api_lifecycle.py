"""Start and end of the server, orderly and otherwise."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.api.conftest import STOP_SECONDS, ServerProcess, free_port, start_server

pytestmark = pytest.mark.process

STREAM = {"prompt": "Once upon a time", "max_tokens": 5000, "ignore_eos": True, "stream": True}


def test_a_taken_port_is_one_line(server: ServerProcess) -> None:
    command = [sys.executable, "-m", "engine.serve", "--port", str(server.port)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=STOP_SECONDS, check=False)
    assert result.returncode != 0
    [line] = result.stderr.strip().splitlines()
    assert f"port {server.port}" in line
    assert "--port" in line


def test_a_failed_start_is_the_last_thing_on_the_screen(tmp_path: Path) -> None:
    model = tmp_path / "empty"
    model.mkdir()
    command = [sys.executable, "-m", "engine.serve", "--model", str(model), "--port", str(free_port())]
    result = subprocess.run(command, capture_output=True, text=True, timeout=STOP_SECONDS, check=False)
    assert result.returncode != 0
    assert str(model) in result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_open_streams_with_an_error(
    tmp_path: Path, small_model: Path, number: signal.Signals
) -> None:
    with start_server(tmp_path, "--model", str(small_model), "--drain-timeout", "0") as server:
        server.wait_until_ready()
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json=STREAM, timeout=STOP_SECONDS
        ) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            children = server.children()
            server.process.send_signal(number)
            *_, error, done = lines
        assert "message" in json.loads(error.removeprefix("data: "))["error"]
        assert done == "data: [DONE]"
        assert server.process.wait(STOP_SECONDS) == 0
        assert not any(child.is_running() for child in children)


def test_sigterm_lets_open_requests_finish_and_a_second_signal_ends_them(
    tmp_path: Path, small_model: Path
) -> None:
    with start_server(tmp_path, "--model", str(small_model), "--drain-timeout", "1000") as server:
        server.wait_until_ready()
        url = f"{server.url}/v1/completions"
        short = {**STREAM, "max_tokens": 200}
        with (
            httpx.stream("POST", url, json=STREAM, timeout=STOP_SECONDS) as endless,
            httpx.stream("POST", url, json=short, timeout=STOP_SECONDS) as ending,
        ):
            endless_lines = (line for line in endless.iter_lines() if line)
            lines = (line for line in ending.iter_lines() if line)
            next(endless_lines), next(lines)
            server.process.send_signal(signal.SIGTERM)
            while (ready := httpx.get(f"{server.url}/ready")).status_code == 200:
                pass
            assert (ready.status_code, ready.json()["error"]["code"]) == (503, "draining")
            assert httpx.get(f"{server.url}/health").status_code == 200
            refused = httpx.post(url, json=short)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert int(refused.headers["retry-after"]) > 0
            *_, last, done = lines
            assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
            assert done == "data: [DONE]"
            assert httpx.get(f"{server.url}/health").status_code == 200
            server.process.send_signal(signal.SIGINT)
            *_, error, done = endless_lines
            assert "message" in json.loads(error.removeprefix("data: "))["error"]
            assert done == "data: [DONE]"
        assert server.process.wait(STOP_SECONDS) == 0


def test_a_server_ends_once_its_last_request_has(tmp_path: Path, small_model: Path) -> None:
    with start_server(tmp_path, "--model", str(small_model), "--drain-timeout", "1000") as server:
        server.wait_until_ready()
        body = {**STREAM, "max_tokens": 200}
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json=body, timeout=STOP_SECONDS
        ) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            *_, last, _ = lines
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(STOP_SECONDS) == 0


def test_a_stream_outlives_the_engine(tmp_path: Path, small_model: Path) -> None:
    body = {**STREAM, "max_tokens": 400, "temperature": 0.9, "seed": 1}
    with start_server(tmp_path, "--model", str(small_model)) as server:
        statuses = []
        while 200 not in statuses and server.process.poll() is None:
            try:
                statuses.append(httpx.get(f"{server.url}/health").status_code)
            except httpx.ConnectError:
                continue
        assert statuses[0] == 503
        undisturbed = httpx.post(
            f"{server.url}/v1/completions", json={**body, "stream": False}, timeout=STOP_SECONDS
        ).json()["choices"][0]
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json=body, timeout=STOP_SECONDS
        ) as response:
            lines = (line for line in response.iter_lines() if line)
            chunks = [next(lines) for _ in range(20)]
            engine = max(server.children(), key=lambda child: child.memory_info().rss)
            engine.kill()
            while (ready := httpx.get(f"{server.url}/ready")).status_code == 200:
                pass
            assert ready.json()["error"]["code"] == "restarting"
            assert "SIGKILL" in ready.json()["error"]["message"]
            assert "SIGKILL" in server.log.read_text()
            assert httpx.get(f"{server.url}/health").status_code == 200
            *more, done = lines
        choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in chunks + more]
        assert "".join(choice["text"] for choice in choices) == undisturbed["text"]
        assert choices[-1]["finish_reason"] == undisturbed["finish_reason"]
        assert done == "data: [DONE]"
        assert httpx.get(f"{server.url}/ready").status_code == 200


def test_a_server_whose_engine_dies_too_often_ends(tmp_path: Path, small_model: Path) -> None:
    with start_server(tmp_path, "--model", str(small_model), "--max-restarts", "0") as server:
        server.wait_until_ready()
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json=STREAM, timeout=STOP_SECONDS
        ) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            max(server.children(), key=lambda child: child.memory_info().rss).kill()
            *_, error, done = lines
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_dead"
        assert done == "data: [DONE]"
        assert server.process.wait(STOP_SECONDS) == 1
    assert "--max-restarts" in server.log.read_text().splitlines()[-1]
