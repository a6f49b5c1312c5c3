"""What the log says of requests, what it never says, and what it says where the event loop hangs."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import subprocess
import sys
import textwrap
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest

from api.watchdog import watch_loop
from engine.core.outputs import CompletionOutput
from engine.errors import ConfigError
from engine.logs import JsonFormatter, TextFormatter, configure
from tests.api.test_api_keys import NotingEngine, client_of, key_of
from tests.api.test_openapi import BODIES
from tests.helpers.scripted import ScriptedEngine

SECRET = "what nobody else may read"


class Log:
    """The lines that are logged meanwhile, in both formats."""

    def __init__(self) -> None:
        self.text, self.json = io.StringIO(), io.StringIO()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.json.getvalue().splitlines()]


@pytest.fixture
def log() -> Iterator[Log]:
    log, root = Log(), logging.getLogger()
    handlers = [logging.StreamHandler(log.text), logging.StreamHandler(log.json)]
    for handler, formatter in zip(handlers, (TextFormatter(), JsonFormatter()), strict=True):
        handler.setFormatter(formatter)
        root.addHandler(handler)
    level = root.level
    root.setLevel(logging.INFO)
    # The client's, in this process.
    for client in ("httpx", "httpx2"):
        logging.getLogger(client).setLevel(logging.WARNING)
    yield log
    for client in ("httpx", "httpx2"):
        logging.getLogger(client).setLevel(logging.NOTSET)
    root.setLevel(level)
    for handler in handlers:
        root.removeHandler(handler)


def access(log: Log) -> list[dict[str, Any]]:
    return [line for line in log.lines() if line["logger"] == "api.http"]


def test_each_answer_is_a_line_with_its_id_and_key(log: Log) -> None:
    client = client_of(NotingEngine(), key_of("one", requests_per_minute=1))
    headers = {"x-api-key": "one"}
    answer = client.post("/v1/completions", json=BODIES["/v1/completions"], headers=headers)
    given = {**headers, "x-request-id": "mine"}
    client.post("/v1/completions", json=BODIES["/v1/completions"], headers=given)
    client.post("/v1/completions", json=BODIES["/v1/completions"])
    for path in ("/health", "/docs"):
        client.get(path)
    served, limited, keyless = access(log)
    assert served["message"].startswith("POST /v1/completions 200 ")
    assert served["request_id"] == answer.json()["id"] == answer.headers["x-request-id"]
    assert (served["key"], served["level"], "code" in served) == ("one", "info", False)
    assert (limited["request_id"], limited["key"]) == ("mine", "one")
    assert limited["code"] == "rate_limit_exceeded"
    assert (keyless["code"], "key" in keyless) == ("invalid_api_key", False)
    assert f"[request_id={answer.json()['id']} key=one]\n" in log.text.getvalue()


def test_a_client_that_chose_its_id_finds_the_answers(log: Log) -> None:
    answer = client_of(NotingEngine()).post(
        "/v1/completions", json=BODIES["/v1/completions"], headers={"x-request-id": "mine"}
    )
    [line] = access(log)
    assert (line["request_id"], line["answer_id"]) == ("mine", answer.json()["id"])


@pytest.mark.parametrize("stream", [False, True])
def test_what_fails_is_logged_with_the_requests_id(log: Log, stream: bool) -> None:
    async def fails(prompt: list[int], params: object) -> AsyncGenerator[CompletionOutput, None]:
        yield CompletionOutput(0, "a", [97])
        raise ZeroDivisionError

    client = client_of(ScriptedEngine(fails))
    body = {**BODIES["/v1/completions"], "stream": stream}
    if stream:
        client.post("/v1/completions", json=body, headers={"x-request-id": "mine"})
        [failed] = [line for line in log.lines() if "ZeroDivisionError" in line.get("stack", "")]
        assert (failed["level"], failed["request_id"]) == ("error", "mine")
    else:
        with pytest.raises(ZeroDivisionError):
            client.post("/v1/completions", json=body, headers={"x-request-id": "mine"})
    assert {line["request_id"] for line in access(log)} == {"mine"}


@pytest.mark.parametrize("path", sorted(BODIES))
def test_what_prompts_and_outputs_say_is_not_logged(log: Log, path: str) -> None:
    async def speaks(prompt: list[int], params: object) -> AsyncGenerator[CompletionOutput, None]:
        yield CompletionOutput(0, SECRET, list(SECRET.encode()), finish_reason="stop")

    client = client_of(ScriptedEngine(speaks))
    body = json.loads(json.dumps(BODIES[path]).replace('"a"', json.dumps(SECRET)))
    client.post(path, json=body)
    for fields in ({"temperature": SECRET}, {"model": SECRET}, {"stop": [SECRET] * 99}, {"user": SECRET}):
        client.post(path, json={**body, **fields})
    assert len(access(log)) == 5
    assert SECRET not in log.json.getvalue() + log.text.getvalue()


def test_nobody_begins_a_line_for_others(log: Log) -> None:
    client_of(NotingEngine()).get("/v1/%0aPOST /v1/completions 200%0d%1b[31m")
    assert len(log.text.getvalue().splitlines()) == len(log.json.getvalue().splitlines()) == 1
    assert "\\nPOST" in log.text.getvalue()
    assert "\x1b" not in log.text.getvalue() + log.json.getvalue()


def test_there_are_two_formats() -> None:
    with pytest.raises(ConfigError, match="log_format must be one of text, json, got 'xml'"):
        configure("xml")


def test_a_loop_that_hangs_tells_where() -> None:
    """With the interpreter's lock held, as an extension holds it, and once for each hang."""
    script = """
        import asyncio, ctypes, logging, time
        from api.watchdog import watch_loop
        logging.basicConfig(format="%(message)s")
        late = []

        def hangs_here(seconds):
            ctypes.PyDLL(None).usleep(int(seconds * 1e6))

        async def main():
            watching = asyncio.create_task(watch_loop(late.append, tick=0.05, hang=0.2))
            for _ in range(2):
                await asyncio.sleep(0.1)
                hangs_here(0.9)
                await asyncio.sleep(0.1)
            watching.cancel()

        asyncio.run(main())
        print(sum(seconds > 0.2 for seconds in late))
    """
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert process.stdout == "2\n"
    assert process.stderr.count("in hangs_here") == 2
    assert process.stderr.count("the event loop was held up for") == 2


def test_a_loop_that_does_not_hang_is_measured(capfd: pytest.CaptureFixture[str]) -> None:
    async def check() -> list[float]:
        late: list[float] = []
        watching = asyncio.create_task(watch_loop(late.append, tick=0.01, hang=600))
        while len(late) < 3:
            await asyncio.sleep(0)
        watching.cancel()
        return late

    assert min(asyncio.run(check())) >= 0.0
    assert capfd.readouterr().err == ""
