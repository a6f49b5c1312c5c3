"""Attacks on a server, each beside a stream that must not feel them.

`make chaos` runs all of them and prints what they cost; tests/chaos/ runs them with counts alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from benchmarks.client import ServerError
from benchmarks.machine import describe_run
from benchmarks.report import format_table, write_json
from benchmarks.servers import running_engine

OPTIONS = ("--model", "llama", "--quant", "int8", "--kv-cache-memory", "256MiB")
CONTROL_TOKENS = 400
CONTROL = {
    "prompt": "The history of the sea begins",
    "max_tokens": CONTROL_TOKENS,
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
}
"""The stream that must not feel the others: greedy, so that its bytes are known."""

SLICE_BYTES = 2**16

ANSWER_SECONDS = 600.0
"""When an attacker gives up: nothing takes so long."""

CLOSED, SILENCE = 0, -1
"""In the place of a status: the server closed the connection without an answer, or did nothing at all."""

LONGEST_GAP = 0.5
MOST_MEMORY = 200.0
"""The bars: seconds between two tokens of the control stream, and MiB that a server's first process grows by."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server to attack."""

    port: int
    api_key: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def key_line(self) -> str:
        return "" if self.api_key is None else f"Authorization: Bearer {self.api_key}\r\n"

    async def send(self, *pieces: bytes, patience: float = ANSWER_SECONDS) -> int:
        """Sends bytes as they are, on a connection of their own, and returns the status of what is answered.

        Args:
            patience: Seconds to wait for it after the last piece.
        """
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            answer = asyncio.ensure_future(reader.readline())
            with suppress(ConnectionError):
                for piece in pieces:
                    # In slices: asyncio moves what it has not sent yet with each that it has.
                    for start in range(0, len(piece), SLICE_BYTES):
                        if answer.done():
                            break
                        writer.write(piece[start : start + SLICE_BYTES])
                        await writer.drain()
            line = await asyncio.wait_for(answer, patience)
            return int(line.split()[1]) if line else CLOSED
        except ConnectionError:
            return CLOSED
        except TimeoutError:
            return SILENCE
        finally:
            writer.close()

    async def post(self, path: str, body: bytes | dict[str, Any]) -> int:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{self.key_line}Content-Length: {len(content)}\r\n\r\n"
        return await self.send(head.encode(), content)


Run = Callable[[], Awaitable[Sequence[int]]]


@dataclass(frozen=True, slots=True)
class Attack:
    """What one client does to stop others.

    Attributes:
        prepare: Makes what is sent, and returns what sends it and returns the statuses of the answers.
        statuses: Those that are right.
        is_work: Whether the server has so much to do for it that other streams must have tokens meanwhile.
    """

    name: str
    prepare: Callable[[Target], Run]
    statuses: frozenset[int]
    is_work: bool = False


ATTACKS: list[Attack] = []


def attack(
    *statuses: int, is_work: bool = False
) -> Callable[[Callable[[Target], Run]], Callable[[Target], Run]]:
    """Lists a function as an attack."""

    def add(prepare: Callable[[Target], Run]) -> Callable[[Target], Run]:
        name = prepare.__name__.removeprefix("_").replace("_", " ")
        ATTACKS.append(Attack(name, prepare, frozenset(statuses), is_work))
        return prepare

    return add


WORDS = "a sentence of seven words, or so. "


async def _each(target: Target, bodies: Sequence[bytes]) -> Sequence[int]:
    return await asyncio.gather(*(target.post("/v1/completions", body) for body in bodies))


async def _times(number: int, send: Callable[[], Awaitable[int]]) -> list[int]:
    return await asyncio.gather(*(send() for _ in range(number)))


@attack(400)
def _text_that_cannot_fit(target: Target) -> Run:
    body = json.dumps({"prompt": WORDS * 50_000, "max_tokens": 1}).encode()
    return lambda: _times(4, lambda: target.post("/v1/completions", body))


@attack(400, is_work=True)
def _text_that_might_fit(target: Target) -> Run:
    body = json.dumps({"prompt": WORDS * 19_000, "max_tokens": 1}).encode()
    return lambda: _times(4, lambda: target.post("/v1/completions", body))


@attack(200, is_work=True)
def _text_to_count(target: Target) -> Run:
    body = json.dumps({"prompt": WORDS * 19_000}).encode()
    return lambda: _times(4, lambda: target.post("/tokenize", body))


@attack(200, is_work=True)
def _long_message(target: Target) -> Run:
    messages = [{"role": "user", "content": WORDS * 19_000}]
    fields = {"messages": messages, "max_tokens": 1, "truncate_prompt_tokens": 8}
    body = json.dumps(fields).encode()
    return lambda: _times(4, lambda: target.post("/v1/chat/completions", body))


@attack(400)
def _messages_without_end(target: Target) -> Run:
    body = json.dumps({"messages": [{"role": "user", "content": ""}] * 30_000, "max_tokens": 1}).encode()
    return lambda: _times(4, lambda: target.post("/v1/chat/completions", body))


@attack(400, is_work=True)
def _many_messages(target: Target) -> Run:
    body = json.dumps({"messages": [{"role": "user", "content": ""}] * 8_000, "max_tokens": 1}).encode()
    return lambda: _times(4, lambda: target.post("/v1/chat/completions", body))


@attack(400)
def _tools_with_many_members(target: Target) -> Run:
    """Each a grammar to compile, and all of them too long for the context."""
    members = {f"member_{i}": {"type": "string", "pattern": "a{1,40}b"} for i in range(30)}
    function = {"parameters": {"type": "object", "properties": members}}
    tools = [{"type": "function", "function": {**function, "name": f"f{i}"}} for i in range(120)]
    body = json.dumps({"messages": [{"role": "user", "content": "x"}], "tools": tools}).encode()
    return lambda: _times(2, lambda: target.post("/v1/chat/completions", body))


@attack(400)
def _many_tools(target: Target) -> Run:
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
    tools = [{"type": "function", "function": {**function, "name": f"f{i}"}} for i in range(2_000)]
    body = json.dumps({"messages": [{"role": "user", "content": "x"}], "tools": tools}).encode()
    return lambda: _times(2, lambda: target.post("/v1/chat/completions", body))


@attack(400)
def _prompts_of_one_request(target: Target) -> Run:
    body = json.dumps({"prompt": ["x"] * 2_000, "n": 64, "max_tokens": 1}).encode()
    return lambda: _times(4, lambda: target.post("/v1/completions", body))


@attack(413, CLOSED)
def _body_without_end(target: Target) -> Run:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n%sTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + b"1," * 2**15 + b"\r\n"
    first = b'2\r\n{"\r\n'
    pieces = [head % target.key_line.encode(), first, *[chunk] * 1000]
    return lambda: _times(2, lambda: target.send(*pieces, patience=3))


@attack(400, 503)
def _token_ids(target: Target) -> Run:
    body = b'{"max_tokens": 1, "prompt": [%s1]}' % (b"1," * 1_000_000)
    return lambda: _times(8, lambda: target.post("/v1/completions", body))


@attack(200, 503)
def _ignored_members(target: Target) -> Run:
    body = b'{"prompt": "x", "max_tokens": 1, "metadata": [%s[]]}' % (b"[]," * 690_000)
    return lambda: _times(8, lambda: target.post("/v1/completions", body))


@attack(400, 503)
def _members_of_a_message(target: Target) -> Run:
    many = b"[]," * 690_000
    body = b'{"messages": [{"role": "user", "content": "x", "tool_calls": [%s[]]}]}' % many
    return lambda: _times(8, lambda: target.post("/v1/chat/completions", body))


@attack(408, 503, CLOSED, SILENCE)
def _bodies_that_do_not_end(target: Target) -> Run:
    """Each sends most of its body, and waits; what has not been answered is left."""
    size = 2_000_000
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{target.key_line}Content-Length: {size}\r\n\r\n".encode()

    return lambda: _times(32, lambda: target.send(head, b" " * (size - 1), patience=3))


@attack(431, CLOSED)
def _header_without_end(target: Target) -> Run:
    """Before any key is asked for."""
    pieces = [b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: ", *[b"a" * 2**16] * 1024]
    return lambda: _times(4, lambda: target.send(*pieces, patience=3))


@attack(431, 400, CLOSED)
def _headers_without_end(target: Target) -> Run:
    pieces = [b"GET /health HTTP/1.1\r\nHost: x\r\n", *[b"X-Short: a\r\n" * 5_000] * 1024]
    return lambda: _times(4, lambda: target.send(*pieces, patience=3))


@attack(401, 405, 431, CLOSED)
def _trailers_without_end(target: Target) -> Run:
    head = b"POST /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
    pieces = [head, *[b"X-Short: a\r\n" * 5_000] * 1024]
    return lambda: _times(4, lambda: target.send(*pieces, patience=3))


@attack(200, 400, CLOSED)
def _pipelined_requests(target: Target) -> Run:
    pieces = [b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n" * 5_000] * 20
    return lambda: _times(4, lambda: target.send(*pieces, patience=3))


@attack(400)
def _large_parameters(target: Target) -> Run:
    values: list[dict[str, Any]] = [
        {"logit_bias": {str(token_id): 1 for token_id in range(49_000)}},
        {"stop_token_ids": list(range(49_000)) * 5},
        {"stop": ["word"] * 100_000},
        {"stop": ["x" * 1_000_000]},
        {"bad_words": ["word"] * 100_000},
        {"n": 128, "best_of": 128},
        {"guided_choice": [f"choice {i}" for i in range(100_000)]},
        {"guided_json": {"enum": list(range(250_000))}},
        {"guided_regex": "a" * 1_500_000},
    ]
    bodies = [json.dumps({"prompt": "x", "max_tokens": 1, **value}).encode() for value in values]
    return lambda: _each(target, bodies)


@dataclass(slots=True)
class ControlStream:
    """The stream, again and again, and what came of it.

    Attributes:
        expected: The whole text, undisturbed.
        tokens: When each came, in seconds of `time.perf_counter`.
        problem: What was wrong with it, if anything was.
    """

    target: Target
    expected: str = ""
    tokens: list[float] = field(default_factory=list)
    problem: str | None = None

    async def measure(self, client: httpx.AsyncClient) -> str:
        """One stream; its text."""
        text = ""
        async with client.stream("POST", f"{self.target.url}/v1/completions", json=CONTROL) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise ServerError(str(event["error"]))
                text += event["choices"][0]["text"]
                self.tokens.append(time.perf_counter())
                if self.expected and not self.expected.startswith(text):
                    raise ServerError(f"the stream changed: {text!r}")
        return text

    async def again_and_again(self, client: httpx.AsyncClient) -> None:
        try:
            while True:
                if await self.measure(client) != self.expected:
                    raise ServerError("the stream ended early")
        except (ServerError, httpx.HTTPError) as error:
            self.problem = f"{type(error).__name__}: {error}"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The stream runs, and has had its first tokens, while the block does."""
        headers = {} if self.target.api_key is None else {"authorization": f"Bearer {self.target.api_key}"}
        async with httpx.AsyncClient(headers=headers, timeout=ANSWER_SECONDS, trust_env=False) as client:
            if not self.expected:
                self.expected = await self.measure(client)
            self.tokens, self.problem = [], None
            task = asyncio.create_task(self.again_and_again(client))
            try:
                while len(self.tokens) < 3 and not task.done():
                    await asyncio.sleep(0.01)
                yield
                reached = len(self.tokens)
                # What the attack has left behind is felt by the tokens after it.
                while len(self.tokens) < reached + 3 and not task.done():
                    await asyncio.sleep(0.01)
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an attack came to.

    Attributes:
        statuses: Of its answers.
        num_tokens: What the control stream got between the attack's beginning and its last answer.
        longest_gap: Seconds between two tokens of the control stream, at most; beginnings of streams count, too.
        seconds: How long it took.
        problem: What was wrong with the control stream, if anything was.
    """

    statuses: Sequence[int]
    num_tokens: int
    longest_gap: float
    seconds: float
    problem: str | None


async def carry_out(one: Attack, control: ControlStream) -> Outcome:
    """The attack, beside the control stream."""
    run = one.prepare(control.target)
    async with control.running():
        began = time.perf_counter()
        statuses = await run()
        ended = time.perf_counter()
    times = control.tokens
    num_tokens = sum(began < moment < ended for moment in times)
    gaps = [after - before for before, after in pairwise(times)]
    return Outcome(statuses, num_tokens, max(gaps, default=0.0), ended - began, control.problem)


def resident_mebibytes(pid: int) -> float:
    """Memory that a process holds."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


async def _highest(pid: int, found: list[float]) -> None:
    while True:
        found.append(resident_mebibytes(pid))
        await asyncio.sleep(0.02)


async def _probe(url: str, found: list[float]) -> None:
    """Asks for what the event loop alone answers, again and again, and notes how long each took."""
    async with httpx.AsyncClient(timeout=ANSWER_SECONDS, trust_env=False) as client:
        while True:
            began = time.perf_counter()
            await client.get(f"{url}/health")
            found.append(time.perf_counter() - began)
            await asyncio.sleep(0.02)


async def _longest_step(url: str, seconds: float) -> float:
    """Seconds of the engine's longest step in the last ones."""
    async with httpx.AsyncClient(timeout=ANSWER_SECONDS, trust_env=False) as client:
        trace = await client.get(f"{url}/debug/trace", params={"seconds": min(seconds, 600.0)})
    steps = [event["dur"] for event in trace.json()["traceEvents"] if event.get("name") == "step"]
    return max(steps, default=0.0) / 1e6


async def _main(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    result: dict[str, Any] = {"benchmark": "attacks", **describe_run(arguments), "options": OPTIONS}
    chosen = [one for one in ATTACKS if options.only in one.name]
    rows = []
    is_fine = True
    async with running_engine("engine", [*OPTIONS, *options.option]) as server:
        assert server.pid is not None
        control = ControlStream(Target(int(server.base_url.rpartition(":")[2])))
        for one in chosen:
            async with control.running():
                before = resident_mebibytes(server.pid)
            memory: list[float] = []
            waits: list[float] = []
            watching = [
                asyncio.create_task(_highest(server.pid, memory)),
                asyncio.create_task(_probe(server.base_url, waits)),
            ]
            outcome = await carry_out(one, control)
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
            step = await _longest_step(server.base_url, outcome.seconds)
            growth = max(memory) - before
            wrong = sorted({status for status in outcome.statuses if status not in one.statuses})
            holds = outcome.longest_gap <= LONGEST_GAP and growth <= MOST_MEMORY
            is_fine &= holds and not wrong and outcome.problem is None
            rows.append(
                [
                    one.name,
                    " ".join(map(str, sorted(set(outcome.statuses)))),
                    f"{outcome.seconds:.2f}",
                    str(outcome.num_tokens),
                    f"{outcome.longest_gap:.3f}",
                    f"{max(waits, default=0.0):.3f}",
                    f"{step:.3f}",
                    f"{growth:.0f}",
                    outcome.problem or (f"not {wrong}" if wrong else "" if holds else "above a bar"),
                ]
            )
            print(*rows[-1], sep=" | ", flush=True)
    header = ["attack", "answers", "s", "tokens", "longest gap s", "loop s", "step s", "MiB more", ""]
    print(format_table(header, rows))
    print("loop: the longest that the event loop took to answer a probe; step: the engine's longest step")
    if options.output is not None:
        write_json(
            options.output,
            {**result, **{row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}},
        )
    return 0 if is_fine else 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attacks", description=__doc__)
    parser.add_argument("--only", default="", help="attacks whose names hold this")
    parser.add_argument("--option", nargs="*", default=[], help="further options of engine.serve")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    words = sys.argv[1:] if arguments is None else arguments
    try:
        return asyncio.run(_main(parser.parse_args(words), words))
    except ServerError as error:
        print(f"ServerError: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
