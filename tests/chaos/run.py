"""The same requests to one server twice: undisturbed, and under kills."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tests.chaos.client import Log, ask_all
from tests.chaos.history import find_faults
from tests.chaos.load import Planned
from tests.chaos.server import Death, Held, Killer, Server


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    Attributes:
        faults: What clients were told otherwise than without kills.
        before: What the server held after the undisturbed run.
        after: What it held at the end.
    """

    faults: list[str]
    deaths: list[Death]
    logs: dict[str, Log]
    before: Held
    after: Held

    def gaps(self) -> list[float]:
        """For each death and stream that was open then, its longest time without an event around it, in seconds."""
        gaps = []
        for death in self.deaths:
            for name in death.open_names:
                times = self.logs[name].times
                around = [
                    later - earlier
                    for earlier, later in pairwise(times)
                    if earlier <= death.recovered and later >= death.at
                ]
                gaps += [max(around)] if around else []
        return gaps

    def figures(self) -> dict[str, Any]:
        """Every number, in seconds and bytes, as JSON values."""
        return {
            "num_requests": len(self.logs),
            "faults": self.faults,
            "deaths": [
                {
                    "part": death.part,
                    "noticed": round(death.noticed - death.at, 3),
                    "recovered": round(death.recovered - death.at, 3),
                    "num_open": len(death.open_names),
                }
                for death in self.deaths
            ],
            "gaps": [round(gap, 3) for gap in sorted(self.gaps())],
            **{
                f"{name}_more": getattr(self.after, name) - getattr(self.before, name)
                for name in ("num_processes", "num_descriptors", "private_bytes")
            },
        }

    def __str__(self) -> str:
        noticed = [death.noticed - death.at for death in self.deaths]
        restarts = [death.recovered - death.at for death in self.deaths]
        gaps = sorted(self.gaps()) or [0.0]
        kinds = {part: sum(death.part == part for death in self.deaths) for part in ("engine", "rank")}
        return "\n".join(
            [
                f"{len(self.logs)} requests, {len(self.deaths)} kills ({kinds['engine']} of engines, {kinds['rank']} "
                f"of ranks), {len(self.faults)} faults",
                f"noticed after {statistics.median(noticed):.2f} s (up to {max(noticed):.2f}), ready again after "
                f"{statistics.median(restarts):.2f} s (up to {max(restarts):.2f})",
                f"longest gap of a stream around a kill: median {statistics.median(gaps):.2f} s, p95 "
                f"{gaps[int(0.95 * (len(gaps) - 1))]:.2f} s, longest {gaps[-1]:.2f} s",
                f"API process: {(self.after.private_bytes - self.before.private_bytes) / 2**20:+.1f} MiB, "
                f"{self.after.num_descriptors - self.before.num_descriptors:+d} descriptors; "
                f"{self.after.num_processes - self.before.num_processes:+d} processes",
                *self.faults,
            ]
        )


def run(
    server: Server,
    requests: Sequence[Planned],
    num_kills: int,
    most_open: int = 16,
    seed: int = 0,
    on_end: Callable[[], object] = lambda: None,
) -> Outcome:
    """Sends the requests undisturbed, then while engines and ranks are killed.

    Args:
        on_end: Called for each request that has ended.
    """
    return asyncio.run(_run(server, requests, num_kills, most_open, seed, on_end))


async def _run(
    server: Server,
    requests: Sequence[Planned],
    num_kills: int,
    most_open: int,
    seed: int,
    on_end: Callable[[], object],
) -> Outcome:
    expected: dict[str, Log] = {}
    await ask_all(server.base_url, requests, most_open, expected, on_end)
    before = await _settled(server)
    seen: dict[str, Log] = {}
    killer = Killer(server, seen, random.Random(seed))
    killing = asyncio.create_task(killer.kill(num_kills))
    try:
        await ask_all(server.base_url, requests, most_open, seen, on_end)
    finally:
        if not killing.done():
            killing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await killing
    after = await _settled(server)
    return Outcome(find_faults(requests, expected, seen), killer.deaths, seen, before, after)


async def _settled(server: Server, seconds: float = 30) -> Held:
    """What the server holds when nothing is open, and closed connections and ended processes are gone."""
    deadline = time.monotonic() + seconds
    held = await asyncio.to_thread(server.held)
    while time.monotonic() < deadline:
        await asyncio.sleep(1)
        now = await asyncio.to_thread(server.held)
        if (now.num_processes, now.num_descriptors) == (held.num_processes, held.num_descriptors):
            return now
        held = now
    return held
