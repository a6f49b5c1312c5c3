"""What each owner of requests has been served, so that places go to whoever has had least: the Virtual Token Counter
of "Fairness in Serving Large Language Models" (Sheng et al., 2024).

A token counts once, when it is first computed, whether it is a prompt's or drawn; what the prefix cache has counts
for nothing. Who comes back after a pause starts where the least served of those are who stayed: nobody saves up.
"""

from __future__ import annotations

import heapq

MAX_ABSENT = 1024
"""Owners without requests whose counts are kept, beyond as many as have some."""


class FairShare:
    """Counts of tokens by owner; each operation takes time logarithmic in their number, on average.

    Attributes:
        served: Tokens by owner: of use to compare owners that have requests, and no sum of what they ever got.
    """

    def __init__(self) -> None:
        self.served: dict[str, int] = {}
        # Requests by owner.
        self._num_open: dict[str, int] = {}
        # A heap of counts as they were, one entry each of the owners in the set, which hold all that have requests.
        self._least: list[tuple[int, str]] = []
        self._listed: set[str] = set()

    def enter(self, owner: str) -> None:
        """Notes that a request of the owner has come."""
        if owner not in self._num_open:
            self.served[owner] = max(self.served.get(owner, 0), self._floor())
            self._num_open[owner] = 0
            if owner not in self._listed:
                self._listed.add(owner)
                heapq.heappush(self._least, (self.served[owner], owner))
        self._num_open[owner] += 1

    def leave(self, owner: str) -> None:
        """Notes that a request of the owner has ended."""
        self._num_open[owner] -= 1
        if self._num_open[owner]:
            return
        del self._num_open[owner]
        if not self._num_open:
            # Nobody waits for what others have had.
            self.served.clear()
            self._least.clear()
            self._listed.clear()
        elif len(self.served) > 2 * len(self._num_open) + MAX_ABSENT:
            self.served = {one: self.served[one] for one in self._num_open}
            self._least = [(count, one) for one, count in self.served.items()]
            self._listed = set(self.served)
            heapq.heapify(self._least)

    def charge(self, owner: str, num_tokens: int) -> None:
        """Counts tokens that are computed for the owner, who has requests."""
        self.served[owner] += num_tokens

    def _floor(self) -> int:
        """The least that an owner with requests has been served; 0 if there is none."""
        while self._least:
            count, owner = self._least[0]
            if owner not in self._num_open:
                heapq.heappop(self._least)
                self._listed.discard(owner)
            elif count != self.served[owner]:
                heapq.heapreplace(self._least, (self.served[owner], owner))
            else:
                return count
        return 0
