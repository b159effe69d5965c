"""The pool of KV cache blocks: which sequence holds which, and whose contents can be reused (prefix cache).

A full block whose KV is computed is published under its key: sha256 over the parent block's key, the namespace and its
tokens; the first parent is the root key over the adapters. So no block is ever shared across adapters, weights or
tenants. A block that no sequence holds keeps its contents until it is needed: the least recently used is given out
first.

The virtual positions of adapters' prefixes begin a sequence like tokens do, with two differences. They belong to the
adapters and to no tenant, so their keys have no namespace: their KV is computed once. And if they end inside a block,
that block is published under a key of its own, over its virtual positions alone: a sequence that finds it copies it and
continues in the copy. Blocks of prefixes are given out after all others.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

BlockKey = bytes


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
    return hashlib.sha256(parent + salt + array("q", tokens).tobytes()).digest()


@dataclass
class BlockTable:
    """The blocks of a sequence in order of position; `keys` are those of its first full and published blocks.

    The first `num_virtual` positions are virtual; `is_tail_published` tells if the block they end in was published.
    `copy` is (source, target) if the sequence's next step must begin with the copy of a block. `max_cached` positions
    at most may come from the cache, the virtual ones among them: what follows is computed for its logits.
    """

    root: BlockKey
    salt: bytes = b""
    num_virtual: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[BlockKey] = field(default_factory=list)
    copy: tuple[int, int] | None = None
    is_tail_published: bool = False
    max_cached: int | None = None

    def key_after(self, parent: BlockKey, tokens: Sequence[int], start: int, end: int) -> BlockKey:
        """The key of the block that holds positions [start, end), after a parent's key."""
        return block_key(parent, b"" if end <= self.num_virtual else self.salt, tokens[start:end])


@dataclass(frozen=True)
class CachedBlocks:
    """The computed blocks that a sequence begins with: (key, block) of full ones, and the block its prefix ends in."""

    full: list[tuple[BlockKey, int]]
    tail: int | None = None


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
        max_cached = len(tokens) - 1 if table.max_cached is None else table.max_cached
        for end in range(size, 1 + (max_cached if self.is_cached else virtual), size):
            key = table.key_after(parent, tokens, end - size, end)
            block = self._block_of.get(key)
            if block is None:
                break
            full.append((key, block))
            parent = key
        start = len(full) * size
        if start < virtual < start + size:
            return CachedBlocks(full, self._block_of.get(table.key_after(parent, tokens, start, virtual)))
        return CachedBlocks(full)

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
            return at * self.block_size
        self._hold(tail)  # it must not be given out before it is copied
        self.extend(table, len(tokens))
        self._release(tail)
        table.copy = (tail, table.blocks[at])
        return table.num_virtual

    def has_room(self, table: BlockTable, tokens: Sequence[int], num_spare: int) -> bool:
        """Whether `allocate` would give an empty table blocks and leave `num_spare` free."""
        cached = self.lookup(table, tokens)
        return self._num_left(cached, self.num_needed(table, len(tokens)) - len(cached.full)) >= num_spare

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
        """Publish a table's full blocks among its first `num_computed` positions, and the block its prefix ends in."""
        size, virtual = self.block_size, table.num_virtual
        for index in range(len(table.keys), (num_computed if self.is_cached else min(virtual, num_computed)) // size):
            parent = table.keys[-1] if table.keys else table.root
            if index == virtual // size:
                self._publish_tail(table, tokens, parent)
            key = table.key_after(parent, tokens, index * size, (index + 1) * size)
            table.keys.append(key)
            self._publish_block(key, table.blocks[index], is_prefix=(index + 1) * size <= virtual)
        if virtual <= num_computed and len(table.keys) == virtual // size:
            self._publish_tail(table, tokens, table.keys[-1] if table.keys else table.root)

    def _publish_tail(self, table: BlockTable, tokens: Sequence[int], parent: BlockKey) -> None:
        start = table.num_virtual // self.block_size * self.block_size
        if start < table.num_virtual and not table.is_tail_published:
            table.is_tail_published = True
            key = table.key_after(parent, tokens, start, table.num_virtual)
            self._publish_block(key, table.blocks[start // self.block_size], is_prefix=True)

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
        table.copy, table.is_tail_published = None, False

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
