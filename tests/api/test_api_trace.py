"""/debug/trace: of scheduled steps, and of a real server."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import Any

import httpx
import openai
import pytest
from starlette.testclient import TestClient

from api.trace import PRIORITY, REASONS, trace_events
from engine.core.step_trace import Trace
from tests.api.test_api_keys import NotingEngine, client_of, key_of
from tests.core.test_scheduler import make_request, make_scheduler, prompt_of, step

Tracks = dict[str, list[dict[str, Any]]]


def traced(owners: tuple[str, ...] = ("", "", "")) -> Trace:
    """Three requests, of which the last waits for the others' priority and blocks."""
    scheduler = make_scheduler(num_blocks=8, max_num_batched_tokens=8, max_num_seqs=2, threshold=8)
    for name, owner, length, priority in zip("abc", owners, (10, 4, 20), (0, 0, 3), strict=True):
        request = make_request(name, prompt_of(length, 1000 * length), priority, max_tokens=4)
        scheduler.add(type(request)(**{f: getattr(request, f) for f in request.__slots__} | {"owner": owner}))
    while scheduler.has_work:
        step(scheduler)
    return scheduler.trace.last(60)


def tracks_of(events: list[dict[str, Any]]) -> Tracks:
    """Slices by the names of their tracks."""
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    tracks: Tracks = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            tracks[names[event["tid"]]].append(event)
    return tracks


def check_slices(tracks: Tracks) -> None:
    """On a track of a request none begins before the one before has ended."""
    for name, slices in tracks.items():
        for before, after in pairwise(slices):
            assert name == "steps" or after["ts"] >= before["ts"] + before["dur"] - 1e-3


def test_each_request_has_a_track_that_says_why_it_waits() -> None:
    tracks = tracks_of(list(trace_events(traced(), 1, None)))
    check_slices(tracks)
    assert {"steps", "a [0]", "b [0]", "c [0]"} == tracks.keys()
    names = [one["name"] for one in tracks["a [0]"]]
    assert names == ["prefill 8", "prefill 2", "decode", "decode", "decode"]
    assert [one["name"] for one in tracks["b [0]"]][:2] == [f"waits: {REASONS['budget']}", "prefill 4"]
    waited = tracks["c [0]"][0]
    # First the budget, which one of smaller priority waited for, too; then places and blocks.
    assert waited["name"].startswith("waits: ")
    assert waited["args"][PRIORITY] == 1
    assert waited["args"].keys() <= {PRIORITY, REASONS["places"], REASONS["blocks"]}
    assert sum(one["args"]["tokens"] for one in tracks["steps"]) == 10 + 4 + 20 + 3 * 3


def test_no_key_sees_anothers_ids() -> None:
    events = list(trace_events(traced(("one", "two", "one")), 1, "one"))
    tracks = tracks_of(events)
    assert {"steps", "a [0]", "c [0]", "a request of another key"} == tracks.keys()
    assert "b [0]" not in str(events)


@pytest.mark.parametrize(("keys", "hides"), [(1, False), (2, True)])
def test_with_several_keys_each_sees_its_own(keys: int, hides: bool) -> None:
    class Traced(NotingEngine):
        async def traces(self, seconds: float) -> list[Trace]:
            assert seconds == 2.5
            return [traced(("one", "two", "one"))] * 2

    client = client_of(Traced(), *[key_of(name) for name in ("one", "two")[:keys]])
    answer = client.get("/debug/trace?seconds=2.5", headers={"x-api-key": "one"})
    assert ("b [0]" not in answer.text) == hides
    assert "c [0]" in answer.text
    assert {event["pid"] for event in answer.json()["traceEvents"]} == {1, 2}


@pytest.mark.parametrize("seconds", ["0", "-1", "601", "nan", "x", ""])
def test_seconds_have_a_range(seconds: str) -> None:
    client: TestClient = client_of(NotingEngine())
    error = client.get(f"/debug/trace?seconds={seconds}").json()["error"]
    assert error["param"] == "seconds"
    assert "at most 600" in error["message"]


def test_a_real_server_traces_what_it_served(http: httpx.Client, client: openai.OpenAI) -> None:
    completion = client.completions.create(
        model="llama",
        prompt=[11, 12, 13, 14, 15],
        max_tokens=9,
        n=2,
        extra_body={"ignore_eos": True},
    )
    tracks = tracks_of(http.get("/debug/trace?seconds=600").json()["traceEvents"])
    check_slices(tracks)
    mine = {name: slices for name, slices in tracks.items() if name.startswith(completion.id)}
    assert len(mine) == 2
    for slices in mine.values():
        assert [one["name"] for one in slices].count("decode") >= 8
    first = next(slices for name, slices in mine.items() if name.endswith("[0]"))
    assert sum(one["args"]["tokens"] for one in first if "tokens" in one["args"]) >= 5 + 8
