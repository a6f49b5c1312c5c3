"""python -m engine.batch -i in.jsonl -o out.jsonl: requests from a file, in the form of OpenAI's batches.

A line of the input is {"custom_id", "method": "POST", "url", "body"}, with the body that the server takes at that
path; a line of the output has the answer. Requests share steps, and answers stand in the order in which they came.
What is in the output already is not asked again: an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import uuid
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from engine.arguments import USAGE, add_engine_options
from engine.config import EngineConfig
from engine.errors import ConfigError, EngineDeadError, EngineError
from engine.installation import check_api, missing_package

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages")
"""Paths that a line may ask."""

MAX_OPEN = 512
"""Requests that are open at a time: the engine batches by itself, and memory stays bounded."""

Application = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Line:
    """A request, or what is wrong with the line that should be one.

    Attributes:
        problem: Why it is not asked; None if it is.
    """

    custom_id: str
    url: str = ""
    body: Any = None
    problem: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Asks what is not answered yet. Returns 0 if all is answered, 1 if a request failed, 130 if interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(
        prog="python -m engine.batch",
        usage=USAGE,
        description="Answer the requests of a file in the form of OpenAI's batches.",
    )
    parser.add_argument("-i", "--input", type=Path, required=True, help="file of requests, one JSON a line")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file of answers, added to")
    add_engine_options(parser)
    options = vars(parser.parse_args(arguments))
    source, target = options.pop("input"), options.pop("output")
    try:
        lines, done = read_lines(source), read_answered(target)
        left = [line for line in lines if line.custom_id not in done]
        num_failed = sum(done.get(line.custom_id) is False for line in lines)
        if left:
            num_failed += _run(EngineConfig(**options), left, target)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one was", file=sys.stderr)
        return 130
    except EngineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"{len(lines) - num_failed} of {len(lines)} answered in {target}", file=sys.stderr)
    return 1 if num_failed else 0


def read_lines(path: Path) -> list[Line]:
    """The requests of a file.

    Raises:
        ConfigError: There is no such file, or two lines have one custom_id.
    """
    try:
        texts = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a file of requests with -i") from None
    lines = [_read_line(text, number) for number, text in enumerate(texts, start=1) if text.strip()]
    seen: set[str] = set()
    for line in lines:
        if line.custom_id in seen:
            raise ConfigError(
                f"{path}: custom_id {line.custom_id!r} stands twice; answers are told apart by it"
            )
        seen.add(line.custom_id)
    return lines


def _read_line(text: bytes, number: int) -> Line:
    where = f"line-{number}"
    try:
        said = msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        return Line(where, problem=f"line {number} is no JSON object: {error}")
    custom_id, method, url, body = (said.get(name) for name in ("custom_id", "method", "url", "body"))
    if not isinstance(custom_id, str):
        return Line(where, problem=f"line {number}: custom_id must be text, got {custom_id!r}")
    if method != "POST" or url not in URLS:
        known = f"POST and one of {', '.join(URLS)}"
        return Line(custom_id, problem=f"method and url must be {known}, got {method} {url}")
    if not isinstance(body, dict):
        return Line(custom_id, problem=f"body must be an object, got {body!r}")
    if body.get("stream"):
        return Line(custom_id, problem="body.stream: a line of a batch is answered whole")
    return Line(custom_id, url, body)


def read_answered(path: Path) -> dict[str, bool]:
    """By custom_id, whether what the output holds is an answer; failures of the server's own are asked again.

    A last line that was cut off is taken away.

    Raises:
        ConfigError: The file holds something else.
    """
    try:
        if not path.exists():
            # Found out now, and not once the model is there.
            path.touch()
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a file that can be written with -o") from None
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        path.write_bytes(whole)
    answered = {}
    for number, text in enumerate(whole.splitlines(), start=1):
        try:
            said = msgspec.json.decode(text)
            status = 400 if said["response"] is None else said["response"]["status_code"]
            if status < 500:
                answered[said["custom_id"]] = status == 200
        except (msgspec.MsgspecError, KeyError, TypeError):
            raise ConfigError(
                f"{path}: line {number} is no answer of a batch; give another file with -o"
            ) from None
    return answered


def _run(config: EngineConfig, lines: Sequence[Line], target: Path) -> int:
    """Asks, and writes each answer as it comes. Returns the number of failures.

    Raises:
        EngineError: The engine cannot start, or has died too often.
    """
    check_api()
    try:
        import uvloop

        from engine.frontend.child import launch
    except ModuleNotFoundError as error:
        raise missing_package(error, "serve") from error

    async def run() -> int:
        # The engine's process loads torch while this one loads the application.
        child = await launch()
        try:
            from api import create_app
            from engine.router.restarting import RestartingEngine

            engine = RestartingEngine(config, child=child)
            try:
                await engine.start()
                application = create_app(engine, served_model_names=["*"])
                with target.open("ab") as file, tqdm(total=len(lines), unit="request") as progress:
                    return await _ask_all(application, lines, file.write, file.flush, progress)
            finally:
                await engine.shutdown()
        finally:
            await child.end()

    return uvloop.run(run())


async def _ask_all(
    application: Application,
    lines: Sequence[Line],
    write: Callable[[bytes], object],
    flush: Callable[[], object],
    progress: tqdm[Any],
) -> int:
    places, num_failed = asyncio.Semaphore(MAX_OPEN), 0

    async def ask(line: Line) -> None:
        nonlocal num_failed
        async with places:
            answer = await answer_line(application, line)
        num_failed += answer["response"] is None or answer["response"]["status_code"] != 200
        write(msgspec.json.encode(answer) + b"\n")
        flush()
        progress.update()

    try:
        async with asyncio.TaskGroup() as tasks:
            for line in lines:
                tasks.create_task(ask(line))
    except BaseExceptionGroup as group:
        # The first ends the others.
        raise group.exceptions[0] from None
    return num_failed


async def answer_line(application: Application, line: Line) -> dict[str, Any]:
    """The line of the output.

    Raises:
        EngineDeadError: There is no engine any more.
    """
    answer: dict[str, Any] = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.custom_id}
    if line.problem is not None:
        return {**answer, "response": None, "error": {"code": "invalid_line", "message": line.problem}}
    status, headers, body = await post(application, line.url, msgspec.json.encode(line.body))
    said = msgspec.json.decode(body)
    if status == 503:
        raise EngineDeadError(said["error"]["message"])
    request_id = headers.get(b"x-request-id", b"").decode()
    return {
        **answer,
        "response": {"status_code": status, "request_id": request_id, "body": said},
        "error": None,
    }


async def post(application: Application, path: str, body: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, headers and body of what an application answers, asked without a network (ASGI 3.0)."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        "client": None,
        "server": None,
    }
    is_sent = False
    start: dict[str, Any] = {}
    parts: list[bytes] = []

    async def receive() -> dict[str, Any]:
        nonlocal is_sent
        if is_sent:
            # Nobody hangs up.
            await asyncio.Event().wait()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
        else:
            parts.append(message.get("body", b""))

    await application(scope, receive, send)
    return start["status"], dict(start["headers"]), b"".join(parts)


if __name__ == "__main__":
    sys.exit(main())
