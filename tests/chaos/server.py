"""A server in processes of its own, what it holds, and who kills parts of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from tests.chaos.client import Log

START_SECONDS = 600


def small_options(model: Path, num_threads: int = 1) -> list[str]:
    """The options of a server of a small model, that starts soon and takes little."""
    return [
        *("--model", str(model), "--quant", "int8", "--kv-cache-memory", "64MiB"),
        *("--num-threads", str(num_threads)),
    ]


@dataclass(frozen=True, slots=True)
class Held:
    """What a server holds.

    Attributes:
        num_processes: The server's and its children's.
        num_descriptors: Those of the API process.
        private_bytes: Of the API process's memory.
        shared_files: In /dev/shm.
    """

    num_processes: int
    num_descriptors: int
    private_bytes: int
    shared_files: frozenset[str]


@dataclass(slots=True)
class Server:
    """
    Attributes:
        start_seconds: From the start of the process to its readiness.
    """

    process: psutil.Process
    base_url: str
    start_seconds: float
    said: IO[str]

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.base_url}/ready", trust_env=False, timeout=60).status_code == 200
        except httpx.TransportError:
            return False

    def parts(self) -> dict[str, list[psutil.Process]]:
        """The processes of engines and those of other ranks; a second generation belongs to the engine."""
        found: dict[str, list[psutil.Process]] = {"engine": [], "rank": []}
        for child in self.process.children(recursive=True):
            try:
                command = " ".join(child.cmdline())
            except psutil.NoSuchProcess:
                continue
            for part, module in (("engine", "engine_process"), ("rank", "rank_process")):
                if module in command:
                    found[part].append(child)
        return found

    def metric(self, name: str) -> float:
        """The sum of a metric's samples.

        Raises:
            LookupError: There is none.
        """
        text = httpx.get(f"{self.base_url}/metrics", trust_env=False, timeout=60).text
        values = [
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name
        ]
        if not values:
            raise LookupError(f"/metrics has no {name}")
        return sum(values)

    def held(self) -> Held:
        memory = self.process.memory_full_info()
        return Held(
            1 + len(self.process.children(recursive=True)),
            self.process.num_fds(),
            memory.uss,
            frozenset(os.listdir("/dev/shm")),
        )

    def last_words(self) -> str:
        self.said.seek(0)
        return self.said.read()[-4000:]


@contextmanager
def running_server(options: Sequence[str], most_files: int | None = None) -> Iterator[Server]:
    """`engine.serve` on a free port, with these options.

    Args:
        most_files: How many files the system lets it open.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "engine.serve", "--port", str(port), *options]
    if most_files is not None:
        command = ["sh", "-c", f'ulimit -n {most_files}; exec "$@"', "sh", *command]
    with tempfile.TemporaryFile("w+") as said:
        began = time.monotonic()
        process = subprocess.Popen(
            command,
            stdout=said,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).parents[2],
        )
        server = Server(psutil.Process(process.pid), f"http://127.0.0.1:{port}", 0.0, said)
        try:
            while not server.is_ready():
                assert process.poll() is None, server.last_words()
                assert time.monotonic() - began < START_SECONDS, server.last_words()
                time.sleep(0.02)
            server.start_seconds = time.monotonic() - began
            yield server
        finally:
            children = server.process.children(recursive=True) if process.poll() is None else []
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                for one in children:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()
                process.kill()


@dataclass(frozen=True, slots=True)
class Death:
    """One kill and what followed it, in seconds of `time.monotonic`.

    Attributes:
        noticed: /ready said that there is no engine.
        recovered: /ready said that there is one.
        open_names: The requests that were open.
    """

    part: str
    at: float
    noticed: float
    recovered: float
    open_names: tuple[str, ...]


@dataclass(slots=True)
class Killer:
    """Kills engines and ranks under open requests.

    A request in whose step two engines die, with no token between, is failed, as is right; so a kill waits until
    every stream that was open at the one before has an event since, or has ended.
    """

    server: Server
    logs: Mapping[str, Log]
    chance: random.Random
    tokens_between: int = 40
    deaths: list[Death] = field(default_factory=list)

    async def kill(self, number: int) -> None:
        """Kills so often, or until it is cancelled."""
        before: dict[str, int] = {}
        base = 0
        for _ in range(number):
            while not self._has_gone_on(before, base):
                await asyncio.sleep(0.005)
            self.deaths.append(await self._kill_one())
            before = {name: len(self.logs[name].events) for name in self.deaths[-1].open_names}
            base = self._num_events()

    def _num_events(self) -> int:
        return sum(len(log.events) for log in self.logs.values())

    def _has_gone_on(self, before: Mapping[str, int], base: int) -> bool:
        goes_on = all(
            not self.logs[name].is_open or len(self.logs[name].events) > num for name, num in before.items()
        )
        is_open = any(log.is_open and log.events for log in self.logs.values())
        return goes_on and is_open and self._num_events() >= base + self.tokens_between

    async def _kill_one(self) -> Death:
        parts = await asyncio.to_thread(self.server.parts)
        part = self.chance.choice([part for part, processes in parts.items() if processes])
        victim = self.chance.choice(parts[part])
        open_names = tuple(name for name, log in self.logs.items() if log.is_open)
        at = time.monotonic()
        victim.send_signal(signal.SIGKILL)
        noticed = await self._until(ready=False)
        return Death(part, at, noticed, await self._until(ready=True), open_names)

    async def _until(self, *, ready: bool) -> float:
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            while True:
                response = await client.get(f"{self.server.base_url}/ready")
                if (response.status_code == 200) == ready:
                    return time.monotonic()
                await asyncio.sleep(0.01)
