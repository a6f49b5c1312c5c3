"""Responses that are kept for a while: to be fetched, and to be gone on from."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from api.responses.bodies import Response

STORE_BYTES = 64 * 2**20
STORE_SECONDS = 24 * 3600.0
"""What is kept unless the server is told otherwise."""

OVERHEAD_BYTES = 1024
"""What a response takes besides its text."""


@dataclass(slots=True)
class StoredResponse:
    """A response and what it answers, as JSON.

    Attributes:
        owner: Who may see it; see `ResponseStore`.
        previous: The id of the one that it goes on from.
        item_ids: Of its input and output.
        used: When it was made or gone on from, in seconds of the store's clock.
    """

    owner: str
    previous: str | None
    body: bytes
    input_items: bytes
    item_ids: list[str]
    used: float

    @property
    def num_bytes(self) -> int:
        return OVERHEAD_BYTES + len(self.body) + len(self.input_items) + sum(map(len, self.item_ids))

    def read_input(self) -> list[dict[str, Any]]:
        """The items that it answers."""
        items: list[dict[str, Any]] = msgspec.json.decode(self.input_items)
        return items

    def read_items(self) -> list[dict[str, Any]]:
        """The items that it answers, and its output."""
        return [*self.read_input(), *msgspec.json.decode(self.body)["output"]]


@dataclass(frozen=True, slots=True)
class StoredInput:
    """What a response answers.

    Attributes:
        items: As JSON: decoded, they would take many times as much.
        ids: Of each.
    """

    items: bytes
    ids: list[str]

    @classmethod
    def of(cls, items: Sequence[dict[str, Any]]) -> StoredInput:
        """From items that `listed_item` has made."""
        return cls(msgspec.json.encode(items), [item["id"] for item in items])


class ResponseStore:
    """Keeps responses within a bound of bytes and age; those that nobody has gone on from for longest go first.

    Each is there for its owner alone: whoever has the key that it was made with.

    Args:
        max_bytes: Of all that are kept; 0 keeps none.
        max_seconds: How long each is kept after it was made or last gone on from.
    """

    def __init__(
        self, max_bytes: int, max_seconds: float, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._max_bytes, self._max_seconds, self._clock = max_bytes, max_seconds, clock
        # The one that was used longest ago stands first.
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self._of_items: dict[tuple[str, str], str] = {}
        self.num_bytes = 0

    def put(self, owner: str, response: Response, answered: StoredInput) -> None:
        """Keeps a response that has ended, and what it answers."""
        stored = StoredResponse(
            owner,
            response.previous_response_id,
            msgspec.json.encode(response),
            answered.items,
            answered.ids + [item.id for item in response.output],
            self._clock(),
        )
        # First: what cannot be counted must not be kept.
        num_bytes = stored.num_bytes
        self._responses[response.id] = stored
        self._of_items |= {(owner, item_id): response.id for item_id in stored.item_ids}
        self.num_bytes += num_bytes
        self._evict()

    def get(self, owner: str, response_id: str) -> StoredResponse | None:
        """The response; None where there is none, or it is another's."""
        self._evict()
        found = self._responses.get(response_id)
        return found if found is not None and found.owner == owner else None

    def chain(self, owner: str, response_id: str) -> list[StoredResponse] | None:
        """The responses that lead to this one, the first at the front, and it: all are used now.

        Returns None where one of them is not there, or is another's.
        """
        ids: list[str] = []
        following: str | None = response_id
        while following is not None:
            found = self.get(owner, following)
            if found is None:
                return None
            ids.append(following)
            following = found.previous
        for one in reversed(ids):
            self._responses.move_to_end(one)
            self._responses[one].used = self._clock()
        return [self._responses[one] for one in reversed(ids)]

    def of_item(self, owner: str, item_id: str) -> StoredResponse | None:
        """The response that has an item; None where there is none."""
        return self.get(owner, self._of_items.get((owner, item_id), ""))

    def delete(self, owner: str, response_id: str) -> bool:
        """Forgets the response; False where there was none."""
        if self.get(owner, response_id) is None:
            return False
        self._forget(response_id)
        return True

    def _evict(self) -> None:
        oldest = self._clock() - self._max_seconds
        while self._responses:
            first = next(iter(self._responses))
            if self.num_bytes <= self._max_bytes and self._responses[first].used >= oldest:
                return
            self._forget(first)

    def _forget(self, response_id: str) -> None:
        stored = self._responses.pop(response_id)
        self.num_bytes -= stored.num_bytes
        for item_id in stored.item_ids:
            if self._of_items.get((stored.owner, item_id)) == response_id:
                del self._of_items[stored.owner, item_id]
