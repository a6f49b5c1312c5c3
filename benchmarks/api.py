"""Processor time of the server's own process: `python -m benchmarks.api --help`.

The server is the real one, with the tokenizer of --model; its engine is `benchmarks.token_source`, which computes
nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import logging
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import uvloop

from benchmarks.machine import describe_run
from benchmarks.prompts import WORDS
from benchmarks.report import format_table, write_json
from benchmarks.servers import processor_seconds

STREAM_TOKENS = 200
PROMPT_TOKENS = 200
NUM_REQUESTS = 200
"""One after another, in a repetition."""

BARS = {"µs a streamed token": 100.0, "ms a chat request": 3.0}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table. Returns the exit status: 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="llama", help="whose tokenizer and chat template (default: %(default)s)"
    )
    parser.add_argument("--clients", type=int, default=64, help="streams at a time (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions (default: %(default)s)")
    parser.add_argument(
        "--profile", type=Path, help="file for a profile of the server, as cProfile writes it"
    )
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        _serve(options.model, options.profile)
        return 0
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "benchmarks.api", "--serve", "--model", options.model]
        if options.profile is not None:
            command += ["--profile", str(options.profile)]
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            found = asyncio.run(_measure(server.pid, _url(server, log), options))
        finally:
            server.terminate()
            server.wait()
    rows = [
        [name, f"{median(values):.1f}" if "µs" in name else f"{median(values):.2f}", str(BARS.get(name, ""))]
        for name, values in found.items()
    ]
    print(format_table(["processor time of the server's process", "median", "bar"], rows))
    if options.output is not None:
        write_json(options.output, {**describe_run(sys.argv), "results": found})
    return int(any(median(found[name]) > bar for name, bar in BARS.items()))


def _serve(model: str, profile: Path | None) -> None:
    """The server, in a process of its own."""
    from api import serve
    from engine.config import EngineConfig
    from engine.router.restarting import RestartingEngine

    logging.basicConfig(level=logging.INFO, format="%(message)s")

    async def run() -> None:
        engine = RestartingEngine(
            EngineConfig(model=model, max_restarts=0),
            command=[sys.executable, "-m", "benchmarks.token_source"],
        )
        await serve(engine, "127.0.0.1", 0, served_model_names=[model])

    profiler = cProfile.Profile(time.thread_time) if profile is not None else None
    if profiler is not None:
        profiler.enable()
    uvloop.run(run())
    if profiler is not None:
        profiler.dump_stats(str(profile))


def _url(server: subprocess.Popen[bytes], log: Any) -> str:
    """Where the server listens, once its log says so."""
    while server.poll() is None:
        log.seek(0)
        found = re.search(r"http://\S+(?=/v1)", log.read())
        if found:
            return found[0]
        time.sleep(0.05)
    log.seek(0)
    sys.exit(f"the server did not start:\n{log.read()}")


async def _measure(pid: int, url: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """By what is measured, the value of each repetition."""
    found: dict[str, list[float]] = {**{name: [] for name in BARS}, "ms a whole answer of 200 tokens": []}
    async with httpx.AsyncClient(
        base_url=url, timeout=600, limits=httpx.Limits(max_connections=None, keepalive_expiry=1)
    ) as client:
        # So many words have about so many tokens: the number in the answer is the one that counts.
        text = " ".join(WORDS[index % len(WORDS)] for index in range(PROMPT_TOKENS - 10))
        for is_counted in [False] + [True] * options.repeat:
            before = processor_seconds([pid])
            streams = [_stream(client, f"{index} {text}") for index in range(options.clients)]
            num_tokens = sum(await asyncio.gather(*streams))
            streamed = processor_seconds([pid])
            for index in range(NUM_REQUESTS):
                await _chat(client, f"{index} {text}", 1)
            asked = processor_seconds([pid])
            await asyncio.gather(*(_chat(client, f"{index} {text}", 200) for index in range(options.clients)))
            answered = processor_seconds([pid])
            if is_counted:
                found["µs a streamed token"].append(1e6 * (streamed - before) / num_tokens)
                found["ms a chat request"].append(1e3 * (asked - streamed) / NUM_REQUESTS)
                found["ms a whole answer of 200 tokens"].append(1e3 * (answered - asked) / options.clients)
    return found


def _body(text: str, max_tokens: int, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, **fields}


async def _stream(client: httpx.AsyncClient, text: str) -> int:
    """The number of tokens of a streamed chat."""
    options = {"include_usage": True}
    body = _body(text, STREAM_TOKENS, stream=True, stream_options=options)
    tail = b""
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for data in response.aiter_raw():
            tail = (tail + data)[-4096:]
    last = json.loads(tail.split(b"data: ")[-2])
    return int(last["usage"]["completion_tokens"])


async def _chat(client: httpx.AsyncClient, text: str, max_tokens: int) -> None:
    response = await client.post("/v1/chat/completions", json=_body(text, max_tokens))
    response.raise_for_status()


if __name__ == "__main__":
    sys.exit(main())
