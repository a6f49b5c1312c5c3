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
from tests.chaos.history import find_faults, num_tokens
from tests.chaos.load import WORDS, Planned
from tests.chaos.server import Death, Held, Killer, Server


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    Attributes:
        faults: What clients were told otherwise than without kills.
        before: What the server held after the undisturbed run.
        after: What it held at the end.
        prefill_speed: Tokens a second of one prompt alone, before anything was killed.
    """

    faults: list[str]
    deaths: list[Death]
    logs: dict[str, Log]
    before: Held
    after: Held
    prefill_speed: float

    def gaps_of(self, death: Death) -> list[float]:
        """For each stream that was open at a death, its longest time without an event around it, in seconds."""
        gaps = []
        for name in death.open_names:
            around = [
                later - earlier
                for earlier, later in pairwise(self.logs[name].times)
                if earlier <= death.recovered and later >= death.at
            ]
            gaps += [max(around)] if around else []
        return gaps

    def gaps(self) -> list[float]:
        """All of them, the shortest first."""
        return sorted(gap for death in self.deaths for gap in self.gaps_of(death))

    def num_lost_tokens(self, death: Death) -> int:
        """How many tokens of prompts and answers were to compute again, as far as their clients knew of them."""
        return sum(num_tokens(self.logs[name], death.at) for name in death.open_names)

    def allowed_gap(self, death: Death) -> float:
        """The seconds in which a stream may go on: a second, a start, and what was lost at the speed of prompts."""
        return 1.0 + death.recovered - death.noticed + self.num_lost_tokens(death) / self.prefill_speed

    def shares_of_allowed(self) -> list[float]:
        """The gaps, each as a share of what is allowed, the shortest first."""
        return sorted(gap / self.allowed_gap(death) for death in self.deaths for gap in self.gaps_of(death))

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
                    "num_lost_tokens": self.num_lost_tokens(death),
                    "allowed_gap": round(self.allowed_gap(death), 3),
                }
                for death in self.deaths
            ],
            "prefill_speed": round(self.prefill_speed, 1),
            "gaps": [round(gap, 3) for gap in self.gaps()],
            "shares_of_allowed": [round(share, 3) for share in self.shares_of_allowed()],
            "num_shared_files_more": len(self.after.shared_files) - len(self.before.shared_files),
            **{
                f"{name}_more": getattr(self.after, name) - getattr(self.before, name)
                for name in ("num_processes", "num_descriptors", "private_bytes")
            },
        }

    def __str__(self) -> str:
        noticed = [death.noticed - death.at for death in self.deaths]
        restarts = [death.recovered - death.at for death in self.deaths]
        gaps, shares = self.gaps() or [0.0], self.shares_of_allowed() or [0.0]
        kinds = {part: sum(death.part == part for death in self.deaths) for part in ("engine", "rank")}
        return "\n".join(
            [
                f"{len(self.logs)} requests, {len(self.deaths)} kills ({kinds['engine']} of engines, {kinds['rank']} "
                f"of ranks), {len(self.faults)} faults",
                f"noticed after {statistics.median(noticed):.2f} s (up to {max(noticed):.2f}), ready again after "
                f"{statistics.median(restarts):.2f} s (up to {max(restarts):.2f})",
                f"longest gap of a stream around a kill: median {statistics.median(gaps):.2f} s, p95 "
                f"{gaps[int(0.95 * (len(gaps) - 1))]:.2f} s, longest {gaps[-1]:.2f} s",
                f"as a share of what is allowed: p95 {shares[int(0.95 * (len(shares) - 1))]:.2f}, longest "
                f"{shares[-1]:.2f}; prompts have {self.prefill_speed:.0f} tokens/s alone",
                f"API process: {(self.after.private_bytes - self.before.private_bytes) / 2**20:+.1f} MiB, "
                f"{self.after.num_descriptors - self.before.num_descriptors:+d} descriptors; "
                f"{self.after.num_processes - self.before.num_processes:+d} processes, "
                f"{len(self.after.shared_files) - len(self.before.shared_files):+d} files in /dev/shm",
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
    prefill_speed = await _prefill_speed(server)
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
    return Outcome(find_faults(requests, expected, seen), killer.deaths, seen, before, after, prefill_speed)


async def _prefill_speed(server: Server) -> float:
    """Tokens a second of a prompt of some 1,000 tokens that runs alone."""
    log = Log()
    body = {"prompt": " ".join(WORDS[index % 7] for index in range(800)), "max_tokens": 1, "stream": False}
    planned = Planned("prefill", body | {"return_token_ids": True}, 0.0)
    await ask_all(server.base_url, [planned], 1, {planned.name: log})
    return num_tokens(log, log.began) / (log.times[-1] - log.began)


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
