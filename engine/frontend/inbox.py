"""What comes for one reader of an event loop, who wakes once for all of it."""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Inbox(Generic[Item]):
    """Items in the order in which they came: an `asyncio.Queue` that costs less and hands out all at once.

    It belongs to the event loop that runs when it is made.

    Attributes:
        most: How many there should be at a time, which is for who puts them there to see to.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._loop = asyncio.get_running_loop()
        self._items: list[Item] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        """How many items nobody has taken."""
        return len(self._items)

    def put(self, item: Item) -> None:
        self._items.append(item)
        if self._waiter is not None:
            self._wake()

    def close(self, error: Exception) -> None:
        """Nothing more comes, and why."""
        self._error = error
        self._wake()

    async def take(self) -> list[Item]:
        """All that has come since the last call, at least one.

        Raises:
            Exception: The one that `close` was given, once everything that came before has been taken.
        """
        while not self._items:
            if self._error is not None:
                raise self._error
            self._waiter = self._loop.create_future()
            await self._waiter
            self._waiter = None
        items, self._items = self._items, []
        return items

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
