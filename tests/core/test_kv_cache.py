"""The block pool against a model simple enough to be obviously right: a list in LRU order."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.core.kv_cache import BlockPool, KVCacheManager, hash_block
from engine.core.request import Request, Sequence
from engine.core.sampling_params import SamplingParams

NUM_BLOCKS = 6


def make_sequence(token_ids: list[int], arrival: int = 0) -> Sequence:
    request = Request(request_id="r", prompt_token_ids=token_ids, params=SamplingParams(), seed=0)
    return Sequence(request, 0, arrival, b"salt")


class PoolMachine(RuleBasedStateMachine):
    """Takes, shares, registers and releases blocks in any order, beside a plain list and dict."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS + 1)
        self.free = list(range(1, NUM_BLOCKS + 1))
        self.references: dict[int, int] = {}
        self.hashes: dict[int, bytes] = {}

    @precondition(lambda self: self.free)
    @rule()
    def allocate(self) -> None:
        expected = self.free.pop(0)
        self.hashes.pop(expected, None)
        self.references[expected] = 1
        assert self.pool.allocate() == expected

    @precondition(lambda self: self.references)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(sorted(self.references)))
        self.pool.release([block_id])
        self.references[block_id] -= 1
        if self.references[block_id] == 0:
            del self.references[block_id]
            self.free.append(block_id)

    @precondition(lambda self: self.references)
    @rule(data=st.data(), content=st.integers(0, 4))
    def register(self, data: st.DataObject, content: int) -> None:
        block_id = data.draw(st.sampled_from(sorted(self.references)))
        block_hash = hash_block(b"", [content])
        self.pool.register(block_id, block_hash)
        if block_id not in self.hashes and block_hash not in self.hashes.values():
            self.hashes[block_id] = block_hash

    @rule(content=st.integers(0, 4))
    def find_and_share(self, content: int) -> None:
        block_hash = hash_block(b"", [content])
        expected = next((block for block, known in self.hashes.items() if known == block_hash), None)
        assert self.pool.find(block_hash) == expected
        if expected is None:
            return
        assert self.pool.is_free(expected) == (expected in self.free)
        self.pool.share(expected)
        if expected in self.free:
            self.free.remove(expected)
        self.references[expected] = self.references.get(expected, 0) + 1

    @invariant()
    def agrees(self) -> None:
        assert self.pool.num_free == len(self.free)
        assert free_list(self.pool) == self.free
        counts = {block.block_id: block.ref_count for block in self.pool.blocks if block.ref_count}
        assert counts == self.references
        assert {block: self.pool.blocks[block].block_hash for block in self.hashes} == self.hashes
        assert len(self.pool.cached) == len(self.hashes)


def free_list(pool: BlockPool) -> list[int]:
    """Ids in the free list, least recently used first, read in both directions."""
    forward, block = [], pool._head.next
    while block is not None and block is not pool._tail:
        forward.append(block.block_id)
        block = block.next
    backward, block = [], pool._tail.previous
    while block is not None and block is not pool._head:
        backward.append(block.block_id)
        block = block.previous
    assert backward == forward[::-1]
    return forward


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def compute(cache: KVCacheManager, sequence: Sequence, num_tokens: int) -> None:
    """As if a step had computed the sequence's first tokens."""
    sequence.num_computed_tokens = num_tokens
    cache.register(sequence, 0, num_tokens)


def test_a_prefix_is_found_up_to_the_first_unknown_block() -> None:
    cache = KVCacheManager(BlockPool(9), block_size=4)
    first = make_sequence(list(range(13)))
    assert cache.find_prefix(first) == []
    assert cache.extend(first, 13)
    compute(cache, first, 13)
    blocks = list(first.block_ids)
    cache.free(first)

    same = make_sequence(list(range(13)))
    assert cache.find_prefix(same) == blocks[:3]
    longer = make_sequence([*range(8), 99, 98, 97, 96])
    assert cache.find_prefix(longer) == blocks[:2]
    shifted = make_sequence([1, *range(13)])
    assert cache.find_prefix(shifted) == []


def test_a_wholly_cached_prompt_recomputes_only_its_last_token() -> None:
    cache = KVCacheManager(BlockPool(9), block_size=4)
    first = make_sequence(list(range(8)))
    cache.extend(first, 8)
    compute(cache, first, 8)
    cache.free(first)
    again = make_sequence(list(range(8)))
    cache.adopt_prefix(again, cache.find_prefix(again))
    assert again.num_computed_tokens == 7
    assert again.num_stored_tokens == 8
    assert cache.num_missing_blocks(again, 8) == 0


def test_a_different_salt_shares_nothing() -> None:
    cache = KVCacheManager(BlockPool(9), block_size=4)
    first = make_sequence(list(range(8)))
    cache.extend(first, 8)
    compute(cache, first, 8)
    other = make_sequence(list(range(8)))
    other.cache_salt = b"another model"
    assert cache.find_prefix(other) == []


def test_least_recently_used_blocks_leave_first_and_prefix_heads_last() -> None:
    cache = KVCacheManager(BlockPool(5), block_size=4)
    first = make_sequence(list(range(16)))
    cache.extend(first, 16)
    compute(cache, first, 16)
    blocks = list(first.block_ids)
    cache.free(first)
    assert [cache.pool.allocate() for _ in range(2)] == [blocks[3], blocks[2]]
    again = make_sequence(list(range(16)))
    assert cache.find_prefix(again) == blocks[:2]


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=2, max_size=2, unique_by=tuple))
def test_hashes_of_different_blocks_differ(blocks: list[list[int]]) -> None:
    assert hash_block(b"", blocks[0]) != hash_block(b"", blocks[1])


def test_extend_changes_nothing_when_the_pool_is_short() -> None:
    cache = KVCacheManager(BlockPool(3), block_size=4)
    sequence = make_sequence(list(range(20)))
    assert not cache.extend(sequence, 12)
    assert sequence.block_ids == []
    assert cache.pool.num_free == 2
