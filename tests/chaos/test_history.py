"""The checker of histories finds what it is there to find, and the plan holds what must go on over a death."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

from tests.chaos.client import Log
from tests.chaos.history import find_faults
from tests.chaos.load import KINDS, Planned, plan_requests


def event(text: str, token_ids: list[int], reason: str | None = None, index: int = 0) -> dict[str, Any]:
    logprobs = {"tokens": [text], "token_logprobs": [-0.5], "top_logprobs": [{text: -0.5}]}
    choice = {"index": index, "text": text, "token_ids": token_ids, "finish_reason": reason}
    return {"choices": [choice | {"logprobs": logprobs}]}


def log_of(*events: dict[str, Any], status: int = 200, num_dones: int = 1) -> Log:
    return Log(0.0, status, [float(at) for at in range(len(events))], list(events), num_dones)


STREAM = Planned("one", {"stream": True}, 0.0)
WHOLE = [event("a", [1]), event("b", [2, 3]), event("c", [4], "length")]
EXPECTED = {"one": log_of(*WHOLE)}


def faults(log: Log, planned: Planned = STREAM) -> list[str]:
    return find_faults([planned], EXPECTED, {"one": log})


def test_the_same_told_in_other_events_is_no_fault() -> None:
    joined = event("ab", [1, 2, 3])
    joined["choices"][0]["logprobs"] = {
        name: WHOLE[0]["choices"][0]["logprobs"][name] + WHOLE[1]["choices"][0]["logprobs"][name]
        for name in ("tokens", "token_logprobs", "top_logprobs")
    }
    assert faults(log_of(joined, WHOLE[2])) == []


def changed(position: int, field: str, value: Any) -> Log:
    events = deepcopy(WHOLE)
    events[position]["choices"][0][field] = value
    return log_of(*events)


def broken() -> Log:
    log = log_of(*WHOLE[:2], num_dones=0)
    log.error = "ReadError: "
    return log


@pytest.mark.parametrize(
    ("log", "word"),
    [
        (log_of(*WHOLE[:2]), "lost"),
        (log_of(*WHOLE, num_dones=0), "lost"),
        (log_of(*WHOLE[:2], {"error": {"message": "the engine died"}}), "lost"),
        (broken(), "lost"),
        (log_of(*WHOLE, WHOLE[2]), "duplicated"),
        (log_of(*WHOLE, num_dones=2), "duplicated"),
        (log_of(*WHOLE, event("d", [5], index=1)), "duplicated"),
        (log_of(WHOLE[0], WHOLE[0], *WHOLE[1:]), "changed"),
        (log_of(WHOLE[0], WHOLE[2]), "changed"),
        (changed(1, "text", "x"), "changed"),
        (changed(1, "token_ids", [2, 9]), "changed"),
        (
            changed(1, "logprobs", {"tokens": ["b"], "token_logprobs": [-0.25], "top_logprobs": [{}]}),
            "changed",
        ),
        (changed(2, "finish_reason", "stop"), "changed"),
        (log_of({"error": {"message": "busy"}}, status=503, num_dones=0), "changed: status 503"),
    ],
)
def test_what_differs_is_found(log: Log, word: str) -> None:
    (fault,) = faults(log)
    assert word in fault


def test_a_request_that_was_never_sent_is_lost() -> None:
    assert "never sent" in find_faults([STREAM], EXPECTED, {})[0]


@pytest.mark.parametrize(
    ("log", "is_fault"),
    [
        (log_of(WHOLE[0], num_dones=0), False),
        (log_of(*WHOLE), False),
        (log_of(event("x", [1]), num_dones=0), True),
        (log_of(event("a", [7]), num_dones=0), True),
    ],
)
def test_who_leaves_saw_the_beginning(log: Log, is_fault: bool) -> None:
    assert bool(faults(log, Planned("one", {"stream": True}, 0.0, "leaves", enough=1))) == is_fault


def refused(message: str) -> Log:
    return log_of({"error": {"message": message}}, status=400, num_dones=0)


def test_what_is_refused_names_the_field() -> None:
    planned = Planned("one", {"stream": True}, 0.0, "invalid", "top_k")
    expected = {"one": refused("top_k is -7")}
    find: Callable[[Log], list[str]] = lambda log: find_faults([planned], expected, {"one": log})  # noqa: E731
    assert find(refused("top_k is -7")) == []
    assert "'top_k' is not in 'bad'" in find(refused("bad"))[0]
    assert "status 200" in find(log_of(*WHOLE))[0]


def test_a_plan_has_all_kinds_and_manners() -> None:
    planned = plan_requests(200, 2.0, seed=0)
    assert planned == plan_requests(200, 2.0, seed=0)
    manners = Counter(one.behaviour for one in planned)
    assert min(manners[behaviour] for behaviour in ("slow", "leaves", "invalid")) >= 8
    patient = [one for one in planned if one.behaviour == "patient"]
    assert all(any(kind.items() <= one.body.items() for one in patient) for kind in KINDS)
    arrivals = [one.arrival for one in planned]
    assert arrivals == sorted(arrivals)
    assert 60 < arrivals[-1] < 160
