"""Stored responses: bounded in bytes and age, and each for its owner alone."""

from __future__ import annotations

import pytest

from api.responses.bodies import OutputMessage, OutputText, ReasoningSettings, Response
from api.responses.store import ResponseStore, StoredInput


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def response(name: str, previous: str | None = None, text: str = "") -> Response:
    return Response(
        id=name, created_at=0, model="m", output=[OutputMessage(id=f"msg_{name}", content=[OutputText(text=text)])],
        instructions=None, max_output_tokens=None, max_tool_calls=None, metadata={}, parallel_tool_calls=True,
        previous_response_id=previous, prompt_cache_key=None, reasoning=ReasoningSettings(None),
        safety_identifier=None, temperature=1.0, text={}, tool_choice="auto", tools=[], top_logprobs=0, top_p=1.0,
        truncation="disabled", user=None,
    )  # fmt: skip


def put(
    store: ResponseStore, name: str, previous: str | None = None, text: str = "", owner: str = "o"
) -> None:
    answered = StoredInput.of([{"id": f"in_{name}", "type": "message"}])
    store.put(owner, response(name, previous, text), answered)


def test_those_unused_for_longest_go_first() -> None:
    store = ResponseStore(10**6, 1000)
    put(store, "a")
    size = store.num_bytes
    store = ResponseStore(3 * size + 100, 1000)
    for name in "abc":
        put(store, name)
    assert store.chain("o", "a") is not None
    put(store, "d")
    assert [name for name in "abcd" if store.get("o", name)] == ["a", "c", "d"]
    assert store.num_bytes == 3 * size
    put(store, "e", text="x" * 4 * size)
    assert store.get("o", "e") is None
    assert store.num_bytes == 0


def test_what_cannot_be_counted_is_not_kept() -> None:
    store = ResponseStore(10**6, 1000)
    with pytest.raises(TypeError):
        store.put("o", response("a"), StoredInput.of([{"id": 5}]))
    assert store.get("o", "a") is None
    assert store.num_bytes == 0


def test_none_is_kept_without_room() -> None:
    store = ResponseStore(0, 1000)
    put(store, "a")
    assert store.get("o", "a") is None


def test_they_age_since_their_last_use() -> None:
    clock = Clock()
    store = ResponseStore(10**6, 10, clock)
    put(store, "a")
    put(store, "b", "a")
    put(store, "c")
    clock.now = 8
    assert store.chain("o", "b") is not None
    clock.now = 12
    assert store.get("o", "c") is None
    assert [one.read_input()[0]["id"] for one in store.chain("o", "b") or []] == ["in_a", "in_b"]
    clock.now = 30
    assert store.get("o", "b") is None
    assert store.num_bytes == 0


def test_a_chain_without_its_beginning_is_none() -> None:
    store = ResponseStore(10**6, 1000)
    put(store, "a")
    put(store, "b", "a")
    assert store.delete("o", "a")
    assert not store.delete("o", "a")
    assert store.chain("o", "b") is None
    assert store.get("o", "b") is not None


def test_each_is_for_its_owner_alone() -> None:
    store = ResponseStore(10**6, 1000)
    put(store, "a")
    put(store, "b", owner="p")
    assert store.get("p", "a") is store.chain("p", "a") is store.of_item("p", "msg_a") is None
    assert not store.delete("p", "a")
    store.put("p", response("c"), StoredInput.of([{"id": "msg_a", "type": "message"}]))
    assert store.of_item("o", "msg_a") is not None
    stored = store.of_item("o", "in_a")
    assert stored is not None
    assert stored.read_input() == [{"id": "in_a", "type": "message"}]
    assert store.of_item("o", "in_b") is None
    assert store.delete("o", "a")
    assert store.of_item("o", "msg_a") is None
    assert store.of_item("p", "msg_a") is not None
