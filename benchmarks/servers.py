"""Servers under measurement: their start, the processes they consist of, what these use."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.client import CompletionsClient, ServerError
from benchmarks.scenarios import PlannedRequest

_START_SECONDS = 600.0
_LOG_CHARACTERS = 2000
# What llama.cpp calls a field that the engine and vLLM have under the name on the left; vLLM overlooks these.
_SYNONYMS = {"repetition_penalty": "repeat_penalty"}


class PeerClient(CompletionsClient):
    """Says to a server of others what has another name there.

    Args:
        eos_token_ids: Given to one that does not know `ignore_eos`: a bias against them keeps it from ending early.
    """

    def __init__(self, base_url: str, model: str | None, eos_token_ids: Iterable[int] | None = None) -> None:
        super().__init__(base_url, model, api_key=None, ignore_eos=eos_token_ids is None)
        self._bias = {str(token_id): -100 for token_id in eos_token_ids or ()}

    def body(self, request: PlannedRequest) -> bytes:
        fields = json.loads(super().body(request))
        fields |= {other: fields[name] for name, other in _SYNONYMS.items() if name in fields}
        return json.dumps(fields | ({"logit_bias": self._bias} if self._bias else {})).encode()


@dataclass(slots=True)
class Server:
    """A running server.

    Attributes:
        pid: Its first process; None if it was not told.
        start_seconds: From the start of that process until it was ready; None if it ran before.
    """

    name: str
    base_url: str
    client: CompletionsClient
    pid: int | None
    start_seconds: float | None = None

    @property
    def is_ours(self) -> bool:
        return self.start_seconds is not None


@asynccontextmanager
async def running_engine(name: str, options: Sequence[str]) -> AsyncIterator[Server]:
    """A server of ours on a free port, with the options of engine.serve.

    Raises:
        ServerError: It ended or did not become ready.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "engine.serve", "--port", str(port), *options]
    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            base_url = f"http://127.0.0.1:{port}"
            with httpx.Client(trust_env=False) as client:
                while not _is_ready(client, f"{base_url}/health"):
                    if process.poll() is not None or time.perf_counter() - start > _START_SECONDS:
                        log.seek(0)
                        said = log.read()[-_LOG_CHARACTERS:]
                        raise ServerError(f"{name} did not become ready: {' '.join(command)}\n{said}")
                    await asyncio.sleep(0.02)
            seconds = time.perf_counter() - start
            async with CompletionsClient(base_url, None, None, ignore_eos=True) as requester:
                await requester.find_model()
                yield Server(name, base_url, requester, process.pid, seconds)
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def running_hogs(number: int, niceness: int = 0) -> Iterator[list[int]]:
    """Programs that compute without an end, each on one thread, while the block runs; their ids."""
    command = ["nice", "-n", str(niceness), sys.executable, "-c", "while True: pass"]
    hogs = [subprocess.Popen(command) for _ in range(number)]
    try:
        yield [hog.pid for hog in hogs]
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


def _is_ready(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == 200
    except httpx.TransportError:
        return False


def server_version(base_url: str) -> str | None:
    """The version that a server tells, at any of the places where servers tell it."""
    for path, key in (("/version", "version"), ("/props", "build_info")):
        try:
            return str(httpx.get(base_url + path, trust_env=False).json()[key])
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            continue
    return None


def process_tree(root: int) -> list[int]:
    """`root` and all its descendants that live now."""
    children: dict[int, list[int]] = {}
    for process in Path("/proc").glob("[0-9]*"):
        if fields := _stat(int(process.name)):
            children.setdefault(int(fields[1]), []).append(int(process.name))
    tree = [root]
    for pid in tree:  # grows as it is read
        tree += children.get(pid, [])
    return tree


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name, which may hold spaces; none if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def processor_seconds(pids: Iterable[int]) -> float:
    """User and system time that the processes have used so far."""
    ticks = sum(int(fields[11]) + int(fields[12]) for pid in pids if (fields := _stat(pid)))
    return ticks / os.sysconf("SC_CLK_TCK")


def machine_seconds() -> float:
    """Time that all processors together have been at work so far, whoever they worked for; none off Linux."""
    try:
        user, nice, system, _idle, _waiting, *others = (
            Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        )
    except OSError:
        return 0.0
    return sum(map(int, (user, nice, system, *others))) / os.sysconf("SC_CLK_TCK")


def proportional_memory(pids: Iterable[int]) -> float:
    """MiB of memory that the processes hold; what several hold is shared out among them."""
    kibibytes = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # it has just ended
        kibibytes += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return kibibytes / 1024
