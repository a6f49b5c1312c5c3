"""The paged KV cache's bookkeeping: blocks, reference counts, and prefixes found again by hash.

Knows nothing of tensors: a block is a number, the runner owns what is stored under it.

    free list (least recently used first, also the pool of cached blocks to evict)
    head ⇄ block 7 ⇄ block 3 (hash) ⇄ block 9 (hash) ⇄ tail
                        ↑ a hit takes a block from the middle in O(1)
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from engine.core.request import Sequence

NULL_BLOCK = 0
"""Block 0 belongs to nobody: what must be written nowhere is written there."""


def hash_block(previous: bytes, token_ids: SequenceOf[int]) -> bytes:
    """One link of the hash chain: 128 bits that stand for a block's tokens and everything before them."""
    return hashlib.blake2b(previous + array("q", token_ids).tobytes(), digest_size=16).digest()


@dataclass(slots=True, eq=False, repr=False)
class Block:
    """A block of the cache.

    Attributes:
        ref_count: Sequences whose table holds the block; 0 while it is in the free list.
        block_hash: Set while the block can be found again by its content.
        previous, next: Neighbours in the free list.
    """

    block_id: int
    ref_count: int = 0
    block_hash: bytes | None = None
    previous: Block | None = field(default=None)
    next: Block | None = field(default=None)


class BlockPool:
    """Blocks 1 … num_blocks - 1 (0 is the null block), a free list that is also the LRU of cached blocks."""

    def __init__(self, num_blocks: int) -> None:
        self.blocks = [Block(block_id) for block_id in range(num_blocks)]
        self.cached: dict[bytes, Block] = {}
        self.num_free = 0
        self._head, self._tail = Block(-1), Block(-1)
        self._head.next, self._tail.previous = self._tail, self._head
        for block in self.blocks[1:]:
            self._append(block)

    @property
    def num_blocks(self) -> int:
        """Blocks that sequences can use."""
        return len(self.blocks) - 1

    def allocate(self) -> int:
        """Takes the least recently used free block; what was cached in it is forgotten.

        The caller checks `num_free` first.
        """
        block = self._head.next
        assert block is not None
        assert block is not self._tail, "allocate() from an empty pool"
        self._unlink(block)
        if block.block_hash is not None:
            del self.cached[block.block_hash]
            block.block_hash = None
        block.ref_count = 1
        return block.block_id

    def find(self, block_hash: bytes) -> int | None:
        """The block with this content, without taking it."""
        block = self.cached.get(block_hash)
        return None if block is None else block.block_id

    def is_free(self, block_id: int) -> bool:
        return self.blocks[block_id].ref_count == 0

    def share(self, block_id: int) -> None:
        """Adds a reference to a block found by `find`."""
        block = self.blocks[block_id]
        if block.ref_count == 0:
            self._unlink(block)
        block.ref_count += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """Drops a reference of each; those nobody holds any more are evicted in the order given."""
        for block_id in block_ids:
            block = self.blocks[block_id]
            assert block.ref_count > 0, f"block {block_id} released more often than taken"
            block.ref_count -= 1
            if block.ref_count == 0:
                self._append(block)

    def register(self, block_id: int, block_hash: bytes) -> None:
        """Lets a full block be found again. Of two with the same content the first keeps the entry."""
        block = self.blocks[block_id]
        if block.block_hash is None and block_hash not in self.cached:
            block.block_hash = block_hash
            self.cached[block_hash] = block

    def _append(self, block: Block) -> None:
        last = self._tail.previous
        assert last is not None
        last.next, block.previous, block.next, self._tail.previous = block, last, self._tail, block
        self.num_free += 1

    def _unlink(self, block: Block) -> None:
        assert block.previous is not None
        assert block.next is not None
        block.previous.next, block.next.previous = block.next, block.previous
        block.previous = block.next = None
        self.num_free -= 1


class KVCacheManager:
    """Gives sequences their blocks.

    Every block of a sequence but the last is full. Full blocks are entered in the prefix cache once they are
    computed, and shared from then on; a block that still fills has one owner.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.pool = pool
        self.block_size = block_size
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        # Blocks of prompts that running sequences will enter in the prefix cache, and how many of them will.
        self._coming: dict[bytes, int] = {}
        self._settled: list[bytes] = []

    def num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks to add so that the table covers the first `num_tokens` tokens."""
        return max(0, -(-num_tokens // self.block_size) - len(sequence.block_ids))

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extends the block table to cover `num_tokens` tokens; False, and nothing changed, if the pool is short."""
        num_missing = self.num_missing_blocks(sequence, num_tokens)
        if num_missing > self.pool.num_free:
            return False
        sequence.block_ids.extend(self.pool.allocate() for _ in range(num_missing))
        return True

    def find_prefix(self, sequence: Sequence) -> list[int]:
        """Cached blocks of the sequence's longest known prefix, not yet taken."""
        self._extend_hashes(sequence, sequence.num_tokens)
        block_ids = []
        for block_hash in sequence.block_hashes:
            block_id = self.pool.find(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def last_coming(self, sequence: Sequence, index: int) -> bytes | None:
        """The last block of its prefix that a running sequence is about to compute; None if not even `index` is.

        Args:
            index: The sequence's first block that `find_prefix` has not found.
        """
        last = None
        for block_hash in sequence.block_hashes[index:]:
            if block_hash not in self._coming:
                break
            last = block_hash
        return last

    def take_settled(self) -> list[bytes]:
        """Blocks that were coming until the last call and are not any more: they can be found, or are lost."""
        settled, self._settled = self._settled, []
        return settled

    def adopt_prefix(self, sequence: Sequence, block_ids: list[int]) -> None:
        """Starts the sequence's table with blocks from `find_prefix`.

        The last token is always computed, for its logits, even where its block was found.
        """
        assert not sequence.block_ids
        for block_id in block_ids:
            self.pool.share(block_id)
        sequence.block_ids = list(block_ids)
        sequence.num_stored_tokens = len(block_ids) * self.block_size
        sequence.num_computed_tokens = min(sequence.num_stored_tokens, sequence.num_tokens - 1)
        sequence.num_entered_blocks, sequence.num_coming_blocks = len(block_ids), len(sequence.block_hashes)
        for block_hash in sequence.block_hashes[len(block_ids) :]:
            self._coming[block_hash] = self._coming.get(block_hash, 0) + 1
        self.num_queried_tokens += sequence.num_tokens
        self.num_hit_tokens += sequence.num_computed_tokens

    def register(self, sequence: Sequence, start: int, end: int) -> None:
        """Enters the blocks that filled up while tokens start … end - 1 were computed in the prefix cache."""
        self._extend_hashes(sequence, end)
        for i in range(start // self.block_size, end // self.block_size):
            self.pool.register(sequence.block_ids[i], sequence.block_hashes[i])
        self._settle(sequence, end // self.block_size)

    def free(self, sequence: Sequence) -> None:
        """Releases every block, the tail first, so that the heads of prefixes live longest."""
        self._settle(sequence, sequence.num_coming_blocks)
        self.pool.release(reversed(sequence.block_ids))
        sequence.block_ids = []
        sequence.num_computed_tokens = sequence.num_stored_tokens = 0

    def _settle(self, sequence: Sequence, num_blocks: int) -> None:
        """No more of the sequence's first blocks are coming."""
        end = min(num_blocks, sequence.num_coming_blocks)
        for block_hash in sequence.block_hashes[sequence.num_entered_blocks : end]:
            self._settled.append(block_hash)
            self._coming[block_hash] -= 1
            if not self._coming[block_hash]:
                del self._coming[block_hash]
        sequence.num_entered_blocks = max(sequence.num_entered_blocks, end)

    def _extend_hashes(self, sequence: Sequence, num_tokens: int) -> None:
        size, hashes = self.block_size, sequence.block_hashes
        for i in range(len(hashes), num_tokens // size):
            previous = hashes[i - 1] if i else sequence.cache_salt
            hashes.append(hash_block(previous, sequence.token_ids[i * size : (i + 1) * size]))
