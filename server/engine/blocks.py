"""The pool of KV cache blocks: which sequence holds which, and whose contents can be reused (prefix cache).

A block whose KV is computed is published under its key: sha256 over the parent block's key, the namespace and its
tokens; the first parent is the root key over the adapters. So no block is ever shared across adapters, weights or
tenants. A full block is shared itself. Each beginning of a block is published under a key of its own: a sequence that
goes on otherwise after it copies the block and continues in the copy. A block that no sequence holds keeps its contents
until it is needed: the least recently used is given out first.

The virtual positions of adapters' prefixes begin a sequence like tokens do, with one difference: they belong to the
adapters and to no tenant, so their keys have no namespace and their KV is computed once. Blocks of prefixes are given
out after all others.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

BlockKey = bytes
MIN_COMING = 8  # positions that are worth a step's wait: fewer are computed in a step's time


class InvariantError(RuntimeError):
    """Raised if the engine's bookkeeping contradicts itself: a bug, after which the process must be restarted."""


def root_key(adapters: Iterable[tuple[str, float]]) -> BlockKey:
    """The key (32 bytes) of a sequence's first parent: sha256 over (digest, weight) of each adapter in order."""
    hashed = hashlib.sha256()
    for digest, weight in adapters:
        encoded = digest.encode()
        hashed.update(struct.pack("<Qd", len(encoded), weight) + encoded)
    return hashed.digest()


def namespace_salt(namespace: str) -> bytes:
    """The salt (32 bytes) that keeps the blocks of namespaces apart: sha256 of the name."""
    return hashlib.sha256(namespace.encode()).digest()


def block_key(parent: BlockKey, salt: bytes, tokens: Sequence[int]) -> BlockKey:
    """The key of a block: sha256 over its parent's key (32 bytes), the salt (32 or 0) and its tokens (8 bytes each).

    A block without a salt has virtual tokens alone, which are negative; so the fields cannot be mistaken.
    """
    return _hashed(parent, salt, tokens).digest()


def _hashed(parent: BlockKey, salt: bytes, tokens: Sequence[int]) -> hashlib._Hash:
    return hashlib.sha256(parent + salt + array("q", tokens).tobytes())


@dataclass
class BlockTable:
    """The blocks of a sequence in order of position; `keys` are those of its first full and published blocks.

    The first `num_virtual` positions are virtual, the first `num_published` can be found by others. `copy` is (source,
    target) if the sequence's next step must begin with the copy of a block. `max_cached` positions at most may come
    from the cache, the virtual ones among them: what follows is computed for its logits.
    """

    root: BlockKey
    salt: bytes = b""
    num_virtual: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[BlockKey] = field(default_factory=list)
    copy: tuple[int, int] | None = None
    num_published: int = 0
    max_cached: int | None = None

    def key_after(self, parent: BlockKey, tokens: Sequence[int], start: int, end: int) -> BlockKey:
        """The key of a block whose first positions are [start, end), after a parent's key."""
        return block_key(parent, self._salt_of(end), tokens[start:end])

    def keys_after(self, parent: BlockKey, tokens: Sequence[int], start: int, ends: range) -> Iterator[BlockKey]:
        """The same keys for consecutive ends, each hashed on from the one before."""
        hashed = hashlib.sha256()
        for end in ends:
            if end in (ends.start, self.num_virtual + 1):
                hashed = _hashed(parent, self._salt_of(end), tokens[start:end])
            else:
                hashed.update(struct.pack("=q", tokens[end - 1]))
            yield hashed.digest()

    def _salt_of(self, end: int) -> bytes:
        return b"" if end <= self.num_virtual else self.salt


@dataclass(frozen=True)
class CachedBlocks:
    """The computed blocks that a sequence begins with: (key, block) of full ones, and a `tail` that begins as it does.

    `num_positions` are computed, the shared ones of the tail among them.
    """

    full: list[tuple[BlockKey, int]]
    tail: int | None
    num_positions: int


class BlockPool:
    """Gives blocks of `block_size` positions to tables and takes them back; `is_cached` turns the prefix cache on."""

    def __init__(self, num_blocks: int, block_size: int, is_cached: bool = True) -> None:
        self.num_blocks, self.block_size, self.is_cached = num_blocks, block_size, is_cached
        self._refs = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # least recently used first
        self._free_prefixes: OrderedDict[int, None] = OrderedDict()  # the same, of blocks that are part of a prefix
        self._block_of: dict[BlockKey, int] = {}
        self._keys_of: dict[int, list[BlockKey]] = {}
        self._prefixes: set[int] = set()

    @property
    def num_free(self) -> int:
        """The number of blocks that no table holds, with or without reusable contents."""
        return len(self._free) + len(self._free_prefixes)

    @property
    def num_cached(self) -> int:
        """The number of blocks whose contents can be reused."""
        return len(self._keys_of)

    def num_needed(self, table: BlockTable, num_tokens: int) -> int:
        """Return how many more blocks a table needs to hold `num_tokens` positions."""
        return max(0, -(-num_tokens // self.block_size) - len(table.blocks))

    def lookup(self, table: BlockTable, tokens: Sequence[int]) -> CachedBlocks:
        """Find the computed blocks that `tokens` begins with.

        They hold at most all tokens but the last, which must be computed for its logits, and `table.max_cached`;
        without the prefix cache, only virtual positions.
        """
        full: list[tuple[BlockKey, int]] = []
        parent, size, virtual = table.root, self.block_size, table.num_virtual
        limit = self._max_cached(table, tokens) if self.is_cached else virtual
        for end in range(size, 1 + limit, size):
            key = table.key_after(parent, tokens, end - size, end)
            block = self._block_of.get(key)
            if block is None:
                break
            full.append((key, block))
            parent = key
        start = num_positions = len(full) * size
        tail = None
        ends = range(max(start + 1, virtual), 1 + min(start + size - 1, limit))
        for end, key in zip(ends, table.keys_after(parent, tokens, start, ends), strict=True):
            block = self._block_of.get(key)
            if block is None:
                break
            tail, num_positions = block, end
        return CachedBlocks(full, tail, num_positions)

    def is_coming(
        self, table: BlockTable, tokens: Sequence[int], other: BlockTable, other_tokens: Sequence[int]
    ) -> bool:
        """Whether another table, whose tokens are being computed, will soon have more of what `tokens` begins with.

        That is the adapters' prefix, or `MIN_COMING` positions at least that both begin with.
        """
        if table.root != other.root:
            return False
        if other.num_published < table.num_virtual:
            return True
        end = other.num_published + MIN_COMING
        is_shared = self.is_cached and table.salt == other.salt and end <= self._max_cached(table, tokens)
        return is_shared and tokens[:end] == other_tokens[:end]

    def allocate(self, table: BlockTable, tokens: Sequence[int], num_spare: int = 0) -> int | None:
        """Give an empty table blocks for all `tokens`; returns how many of these are already computed.

        None, and nothing is changed, if fewer than `num_spare` blocks would be left free.
        """
        cached = self.lookup(table, tokens)
        num_new = self.num_needed(table, len(tokens)) - len(cached.full)
        if self._num_left(cached, num_new) < num_spare:
            return None
        for key, block in cached.full:
            self._hold(block)
            table.blocks.append(block)
            table.keys.append(key)
        tail, at = cached.tail, len(table.blocks)
        if tail is None or (not self._refs[tail] and num_new == self.num_free):  # the last free block: computed anew
            self.extend(table, len(tokens))
            table.num_published = at * self.block_size
        else:
            self._hold(tail)  # it must not be given out before it is copied
            self.extend(table, len(tokens))
            self._release(tail)
            table.copy = (tail, table.blocks[at])
            table.num_published = cached.num_positions
        return table.num_published

    def has_room(self, table: BlockTable, tokens: Sequence[int], num_spare: int) -> bool:
        """Whether `allocate` would give an empty table blocks and leave `num_spare` free."""
        cached = self.lookup(table, tokens)
        return self._num_left(cached, self.num_needed(table, len(tokens)) - len(cached.full)) >= num_spare

    @staticmethod
    def _max_cached(table: BlockTable, tokens: Sequence[int]) -> int:
        return len(tokens) - 1 if table.max_cached is None else table.max_cached

    def _num_left(self, cached: CachedBlocks, num_new: int) -> int:
        return self.num_free - sum(not self._refs[block] for _, block in cached.full) - num_new

    def extend(self, table: BlockTable, num_tokens: int) -> bool:
        """Give a table blocks to hold `num_tokens` positions; False, and nothing is changed, if too few are free."""
        num_new = self.num_needed(table, num_tokens)
        if num_new > self.num_free:
            return False
        for _ in range(num_new):
            block = next(iter(self._free or self._free_prefixes))
            self._unpublish(block)
            self._hold(block)
            table.blocks.append(block)
        return True

    def publish(self, table: BlockTable, tokens: Sequence[int], num_computed: int) -> None:
        """Publish a table's first `num_computed` positions: each but those inside a prefix, where blocks are whole."""
        size, virtual = self.block_size, table.num_virtual
        limit = num_computed if self.is_cached else min(virtual, num_computed)
        while table.num_published < limit:
            index = table.num_published // size
            start, stop = index * size, min(limit, (index + 1) * size)
            ends = range(max(table.num_published + 1, min(virtual, stop)), stop + 1)
            parent = table.keys[-1] if table.keys else table.root
            for end, key in zip(ends, table.keys_after(parent, tokens, start, ends), strict=True):
                self._publish_block(key, table.blocks[index], is_prefix=end <= virtual)
                if end == start + size:
                    table.keys.append(key)
            table.num_published = stop

    def _publish_block(self, key: BlockKey, block: int, is_prefix: bool) -> None:
        if key not in self._block_of:  # else another sequence published the same first
            self._block_of[key] = block
            self._keys_of.setdefault(block, []).append(key)
            if is_prefix:
                self._prefixes.add(block)

    def free(self, table: BlockTable) -> None:
        """Take all of a table's blocks back; their contents can be reused until they are given out again."""
        for block in reversed(table.blocks):  # a chain is given out from its end, so that its beginning stays useful
            self._release(block)
        table.blocks.clear()
        table.keys.clear()
        table.copy, table.num_published = None, 0

    def _release(self, block: int) -> None:
        self._refs[block] -= 1
        if self._refs[block]:
            return
        free = self._free_prefixes if block in self._prefixes else self._free
        free[block] = None
        if block not in self._keys_of:
            free.move_to_end(block, last=False)

    def assert_consistent(self, tables: Iterable[BlockTable]) -> None:
        """Raise `InvariantError` unless the holders counted are `tables`, which are all that hold blocks now."""
        held = Counter(block for table in tables for block in table.blocks)
        for block, num_refs in enumerate(self._refs):
            if num_refs != held[block]:
                raise InvariantError(f"block {block} counts {num_refs} holders and has {held[block]}")
            if (num_refs == 0) != (block in self._free or block in self._free_prefixes):
                raise InvariantError(f"block {block} with {num_refs} holders is on the wrong side of the free list")
        block_of = {key: block for block, keys in self._keys_of.items() for key in keys}
        if self._block_of != block_of or not self._prefixes <= self._keys_of.keys():
            raise InvariantError("the keys of blocks and the blocks of keys disagree")

    def _hold(self, block: int) -> None:
        self._free.pop(block, None)
        self._free_prefixes.pop(block, None)
        self._refs[block] += 1

    def _unpublish(self, block: int) -> None:
        for key in self._keys_of.pop(block, ()):
            del self._block_of[key]
        self._prefixes.discard(block)
