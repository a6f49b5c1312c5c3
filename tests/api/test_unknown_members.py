"""Members that nothing reads are found at any depth, counted, and logged once by name."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from prometheus_client import generate_latest

from api.metrics import Metrics
from api.unknown_members import MAX_LOGGED, UnknownMembers, find_unknown
from engine.core.stats import EngineStats


class Part(msgspec.Struct, rename={"kind": "type"}):
    kind: str
    parts: list[Part] | str | None = None
    free: Any = None


class Body(msgspec.Struct):
    parts: list[Part]
    by_name: dict[str, Part] = msgspec.field(default_factory=dict)
    one: Part | None = None


def test_they_are_found_at_any_depth() -> None:
    part = {"type": "a", "x": 1, "free": {"y": 1}, "parts": [{"type": "b", "z": None}]}
    body = {
        "parts": [part, {"type": "c", "parts": "text"}],
        "by_name": {"k": {"type": "d", "u": 1}},
        "one": None,
        "t": 0,
    }
    msgspec.convert(body, Body)
    assert list(find_unknown(body, Body)) == ["parts[].x", "parts[].parts[].z", "by_name{}.u", "t"]
    assert list(find_unknown({"parts": []}, Body)) == []


def test_they_are_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics(cast(Any, SimpleNamespace(stats=EngineStats())), "model")
    members = UnknownMembers(metrics)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            members.note("/v1/x", ["new"])
        assert [record.getMessage() for record in caplog.records] == [
            "/v1/x: nothing here reads new; it is accepted without effect"
        ]
        members.note("/v1/x", [f"n{i}" for i in range(2 * MAX_LOGGED)])
    assert len(caplog.records) == MAX_LOGGED
    line = (
        f'engine_unknown_request_members_total{{endpoint="/v1/x",model_name="model"}} {3.0 + 2 * MAX_LOGGED}'
    )
    assert line in generate_latest(metrics.registry).decode()
