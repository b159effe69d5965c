"""Blocks of KV cache: who holds which, and which of their contents can be used again.

A full block whose KV is computed is known by its key: sha256 over the parent block's key and its tokens, and the
first parent is the root key over namespace and hats. So no block ever crosses adapters, weights or tenants.
A block that nobody holds keeps its contents until it is needed: the free list gives out the least recently used.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Key = bytes


class InvariantError(RuntimeError):
    """The engine's books do not add up: a bug, and a reason to start anew."""


def root_key(namespace: str, hats: Iterable[tuple[str, float]]) -> Key:
    """The parent of a sequence's first block: sha256 over the namespace and (digest, weight) of each hat in order."""
    hashed = hashlib.sha256()
    for text, weight in ((namespace, 1.0), *hats):
        encoded = text.encode()
        hashed.update(struct.pack("<Qd", len(encoded), weight) + encoded)
    return hashed.digest()


def block_key(parent: Key, tokens: Sequence[int]) -> Key:
    """The key of a full block: sha256 over its parent's key (32 bytes) and its tokens (8 bytes each)."""
    return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()


@dataclass
class BlockTable:
    """One sequence's blocks in order of position; `keys` are those of its first full and computed blocks."""

    root: Key
    blocks: list[int] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)


class BlockPool:
    """Gives blocks to tables and takes them back. `is_cached` switches the sharing of prefixes."""

    def __init__(self, num_blocks: int, block_size: int, is_cached: bool = True) -> None:
        self.num_blocks, self.block_size, self.is_cached = num_blocks, block_size, is_cached
        self._refs = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # least recently used first
        self._block_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, with or without contents."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks whose contents can be found again."""
        return len(self._block_of)

    def num_needed(self, table: BlockTable, num_tokens: int) -> int:
        """How many more blocks the table needs to hold `num_tokens` positions."""
        return max(0, -(-num_tokens // self.block_size) - len(table.blocks))

    def lookup(self, root: Key, tokens: Sequence[int]) -> list[tuple[Key, int]]:
        """(key, block) of the computed blocks that `tokens` begins with.

        They hold at most all tokens but the last, which must be computed for its logits.
        """
        found: list[tuple[Key, int]] = []
        parent, size = root, self.block_size
        for end in range(size, len(tokens), size) if self.is_cached else ():
            parent = block_key(parent, tokens[end - size : end])
            block = self._block_of.get(parent)
            if block is None:
                break
            found.append((parent, block))
        return found

    def allocate(self, table: BlockTable, tokens: Sequence[int], num_spare: int = 0) -> int | None:
        """Give an empty table blocks for all `tokens`; returns how many of these are already computed.

        None, and nothing is changed, where fewer than `num_spare` blocks would be left free.
        """
        found = self.lookup(table.root, tokens)
        num_revived = sum(not self._refs[block] for _, block in found)
        num_new = self.num_needed(table, len(tokens)) - len(found)
        if self.num_free - num_revived - num_new < num_spare:
            return None
        for key, block in found:
            self._hold(block)
            table.blocks.append(block)
            table.keys.append(key)
        self.extend(table, len(tokens))
        return len(found) * self.block_size

    def extend(self, table: BlockTable, num_tokens: int) -> bool:
        """Let the table hold `num_tokens` positions; False, and nothing is changed, where too few blocks are free."""
        num_new = self.num_needed(table, num_tokens)
        if num_new > self.num_free:
            return False
        for _ in range(num_new):
            block = next(iter(self._free))
            self._forget(block)
            self._hold(block)
            table.blocks.append(block)
        return True

    def publish(self, table: BlockTable, tokens: Sequence[int], num_computed: int) -> None:
        """Make the table's full blocks among the first `num_computed` positions known: their KV is computed."""
        size = self.block_size
        for index in range(len(table.keys), num_computed // size if self.is_cached else 0):
            parent = table.keys[-1] if table.keys else table.root
            key = block_key(parent, tokens[index * size : (index + 1) * size])
            table.keys.append(key)
            block = table.blocks[index]
            if key not in self._block_of:  # else another sequence computed the same first: ours stays unknown
                self._block_of[key], self._key_of[block] = block, key

    def free(self, table: BlockTable) -> None:
        """Take all of a table's blocks back; what they hold can be found until they are given out again."""
        for block in reversed(table.blocks):  # a chain is given out from its end, so that its beginning stays useful
            self._refs[block] -= 1
            if not self._refs[block]:
                self._free[block] = None
                if block not in self._key_of:
                    self._free.move_to_end(block, last=False)
        table.blocks.clear()
        table.keys.clear()

    def assert_consistent(self, tables: Iterable[BlockTable]) -> None:
        """Raise `InvariantError` unless the books agree with `tables`, all that hold blocks now."""
        held = Counter(block for table in tables for block in table.blocks)
        for block, num_refs in enumerate(self._refs):
            if num_refs != held[block]:
                raise InvariantError(f"block {block} counts {num_refs} holders and has {held[block]}")
            if (num_refs == 0) != (block in self._free):
                raise InvariantError(f"block {block} with {num_refs} holders is on the wrong side of the free list")
        if {block: key for key, block in self._block_of.items()} != self._key_of:
            raise InvariantError("the keys of blocks and the blocks of keys disagree")

    def _hold(self, block: int) -> None:
        self._free.pop(block, None)
        self._refs[block] += 1

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
