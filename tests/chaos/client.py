"""Clients that note all they are told, and when."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.chaos.load import Planned

PAUSE_SECONDS = 0.05
"""Before each read of a slow reader."""


@dataclass(slots=True)
class Log:
    """What one client has seen.

    Attributes:
        times: When each event came, in seconds of `time.monotonic`.
        events: The JSON of each; a whole answer is one.
        num_dones: How often it was said that the stream has ended.
        error: What broke the connection.
    """

    began: float = 0.0
    status: int | None = None
    times: list[float] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    num_dones: int = 0
    error: str | None = None
    is_open: bool = False

    def note(self, event: dict[str, Any]) -> None:
        self.times.append(time.monotonic())
        self.events.append(event)


async def ask(client: httpx.AsyncClient, planned: Planned, log: Log) -> None:
    """Sends one request and reads its answer as its client does."""
    log.began, log.is_open = time.monotonic(), True
    try:
        async with client.stream("POST", "/v1/completions", json=planned.body) as response:
            log.status = response.status_code
            if response.status_code != 200 or not planned.body["stream"]:
                log.note(json.loads(await response.aread()))
                return
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    log.num_dones += 1
                    continue
                log.note(json.loads(line.removeprefix("data: ")))
                if planned.behaviour == "leaves" and len(log.events) >= planned.enough:
                    return
                if planned.behaviour == "slow":
                    await asyncio.sleep(PAUSE_SECONDS)
    except httpx.HTTPError as error:
        log.error = f"{type(error).__name__}: {error}"
    finally:
        log.is_open = False


async def ask_all(
    base_url: str,
    requests: Sequence[Planned],
    most_open: int,
    logs: dict[str, Log],
    on_end: Callable[[], object] = lambda: None,
) -> None:
    """Sends requests as they are planned, a bounded number at once; `logs` fills meanwhile."""
    open_requests = asyncio.Semaphore(most_open)
    began = time.monotonic()

    async def send(client: httpx.AsyncClient, planned: Planned) -> None:
        async with open_requests:
            with contextlib.suppress(asyncio.CancelledError):
                await ask(client, planned, logs.setdefault(planned.name, Log()))
        on_end()

    limits = httpx.Limits(max_connections=2 * most_open)
    async with httpx.AsyncClient(base_url=base_url, timeout=600, limits=limits, trust_env=False) as client:
        tasks = []
        for planned in requests:
            await asyncio.sleep(max(0.0, began + planned.arrival - time.monotonic()))
            # Who comes when the house is full waits at the door, so that the order stays that of the plan.
            while open_requests.locked():
                await asyncio.sleep(0.01)
            tasks.append(asyncio.create_task(send(client, planned)))
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
