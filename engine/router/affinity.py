"""Which replica a prompt goes to: where its prefix is, unless the work that waits there outweighs that.

    cost(replica) = tokens that wait there + tokens of the prompt that are not cached there

The cheapest is taken. So requests that share a prefix stay together until the queue they form is longer than the
prefix, and then another replica computes it, too, and has it from then on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from engine.core.kv_cache import hash_block
from engine.core.sampling_params import SamplingParams

MAX_BLOCKS = 1 << 16
"""Blocks remembered of a replica; the least recently used are forgotten, as in its cache."""

EXPECTED_TOKENS = 256
"""How many tokens an answer without a limit of its own is taken to have."""


@dataclass(frozen=True, slots=True)
class Resumable:
    """A request on its way to a replica, with all that another needs if that one dies.

    Attributes:
        params: With the seed that the request has.
        resumed_token_ids: As in `engine.core.request.Request`.
        lost: Names of replicas that it was sent to and that have died.
        cache_salt, owner: As in `engine.core.request.Request`.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    resumed_token_ids: list[list[int] | None] = field(default_factory=list)
    lost: tuple[str, ...] = ()
    cache_salt: str = ""
    owner: str = ""

    @property
    def num_output_tokens(self) -> int:
        """Tokens that it may still generate, as far as that can be known."""
        limit = EXPECTED_TOKENS if self.params.max_tokens is None else self.params.max_tokens
        resumed = self.resumed_token_ids or [[]] * self.params.n
        return sum(max(1, limit - len(tokens)) for tokens in resumed if tokens is not None)


@dataclass(slots=True)
class _Replica:
    """
    Attributes:
        blocks: Hashes of the blocks that it was sent, the most recent last.
        waiting: Tokens of each open request.
    """

    blocks: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    waiting: dict[str, int] = field(default_factory=dict)


class PrefixAffinity:
    """Remembers what was sent where.

    Args:
        block_size: Tokens in a block of the replicas' caches.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._replicas: dict[str, _Replica] = {}

    def order(self, request: Resumable, replicas: Iterable[str]) -> list[str]:
        """The replicas, the best for the request first, without those that died under it."""
        hashes = self._hashes(request)

        def cost(name: str) -> tuple[int, int]:
            replica = self._replicas.setdefault(name, _Replica())
            missing = len(request.prompt_token_ids) - self._num_cached(replica, hashes)
            return sum(replica.waiting.values()) + missing, len(replica.blocks)

        return sorted((name for name in replicas if name not in request.lost), key=cost)

    def send(self, request: Resumable, replica_name: str, key: str) -> None:
        """Notes that the request goes to a replica.

        Args:
            key: Of the request, unique.
        """
        replica = self._replicas.setdefault(replica_name, _Replica())
        hashes = self._hashes(request)
        missing = len(request.prompt_token_ids) - self._num_cached(replica, hashes)
        replica.waiting[key] = missing + request.num_output_tokens
        for block in hashes:
            replica.blocks[block] = None
            replica.blocks.move_to_end(block)
        while len(replica.blocks) > MAX_BLOCKS:
            replica.blocks.popitem(last=False)

    def end(self, replica_name: str, key: str) -> None:
        """Notes that a request has ended, however."""
        replica = self._replicas.get(replica_name)
        if replica is not None:
            replica.waiting.pop(key, None)

    def keep(self, replicas: Collection[str]) -> None:
        """Forgets the replicas that are no more."""
        for name in [name for name in self._replicas if name not in replicas]:
            del self._replicas[name]

    def _num_cached(self, replica: _Replica, hashes: Sequence[bytes]) -> int:
        number = next((i for i, block in enumerate(hashes) if block not in replica.blocks), len(hashes))
        return number * self._block_size

    def _hashes(self, request: Resumable) -> list[bytes]:
        token_ids = request.prompt_token_ids
        size, previous, hashes = self._block_size, request.cache_salt.encode(), []
        for start in range(0, len(token_ids) - size + 1, size):
            previous = hash_block(previous, token_ids[start : start + size])
            hashes.append(previous)
        return hashes
