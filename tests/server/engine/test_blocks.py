import random

import pytest

from server.engine.blocks import BlockPool, BlockTable, InvariantError, block_key, namespace_salt, root_key

ROOT = root_key([])
TOKENS = list(range(100, 117))  # 17: four full blocks of 4, and one more


def computed(pool: BlockPool, root: bytes = ROOT, tokens: list[int] = TOKENS) -> BlockTable:
    """A table whose tokens are all computed and known."""
    table = BlockTable(root)
    assert pool.allocate(table, tokens) is not None
    pool.publish(table, tokens, len(tokens))
    return table


def test_full_computed_blocks_are_shared() -> None:
    """A second sequence with the same beginning holds the very blocks of the first, as far as these are full."""
    pool = BlockPool(16, 4)
    first, second = computed(pool), BlockTable(ROOT)
    assert pool.allocate(second, [*TOKENS[:8], 1, 2, 3]) == 8 and second.copy is None
    assert second.blocks[:2] == first.blocks[:2]
    assert not set(second.blocks[2:]) & set(first.blocks)
    pool.assert_consistent([first, second])


@pytest.mark.parametrize("num_alike", range(1, 17))
def test_what_begins_alike_is_computed_once(num_alike: int) -> None:
    """A sequence that goes on otherwise inside a block begins with a copy of that block, in a block of its own."""
    pool = BlockPool(16, 4)
    first, second = computed(pool), BlockTable(ROOT)
    assert pool.allocate(second, [*TOKENS[:num_alike], 1, 2, 3]) == num_alike
    num_full = num_alike // 4
    assert second.copy == (None if num_alike % 4 == 0 else (first.blocks[num_full], second.blocks[num_full]))
    assert not set(second.blocks[num_full:]) & set(first.blocks)
    pool.publish(second, [*TOKENS[:num_alike], 1, 2, 3], num_alike + 3)
    third = BlockTable(ROOT)
    assert pool.allocate(third, [*TOKENS[:num_alike], 1, 2, 4]) == num_alike + 2  # what followed the copy is known too
    pool.assert_consistent([first, second, third])


def test_nothing_begins_alike_before_it_is_computed() -> None:
    """The beginning of a block can be found as far as it was computed when the sequence was last published."""
    pool, table = BlockPool(16, 4), BlockTable(ROOT)
    pool.allocate(table, TOKENS)
    for num_computed in (0, 1, 3, 6):
        pool.publish(table, TOKENS, num_computed)
        assert pool.lookup(BlockTable(ROOT), TOKENS).num_positions == num_computed


def test_last_token_is_always_computed() -> None:
    """The cache gives at most n - 1 of n tokens, so that the last one has logits."""
    pool = BlockPool(32, 4)
    computed(pool)
    assert pool.allocate(BlockTable(ROOT), TOKENS[:16]) == 15
    assert pool.allocate(BlockTable(ROOT), TOKENS[:17]) == 16


def test_uncomputed_blocks_are_not_shared() -> None:
    """A block can be found only after the step that computed its last position."""
    pool, table = BlockPool(16, 4), BlockTable(ROOT)
    pool.allocate(table, TOKENS)
    assert pool.lookup(BlockTable(ROOT), TOKENS).full == []
    pool.publish(table, TOKENS, 7)
    assert len(pool.lookup(BlockTable(ROOT), TOKENS).full) == 1
    pool.publish(table, TOKENS, 8)
    assert len(pool.lookup(BlockTable(ROOT), TOKENS).full) == 2


def table_of(namespace: str, adapters: list[tuple[str, float]], num_virtual: int = 0) -> BlockTable:
    return BlockTable(root_key(adapters), namespace_salt(namespace), num_virtual)


@pytest.mark.parametrize(
    ("namespace", "adapters"),
    [
        ("u", []),
        ("t", [("a", 1.0)]),
        ("t", [("a", 0.5)]),
        ("t", [("b", 1.0)]),
        ("t", [("a", 1.0), ("b", 1.0)]),
        ("t", [("b", 1.0), ("a", 1.0)]),
        ("ta", []),
        ("t", [("", 1.0), ("a", 1.0)]),
    ],
)
def test_no_block_crosses_tenants_adapters_or_weights(namespace: str, adapters: list[tuple[str, float]]) -> None:
    """Another namespace, digest, weight or order of adapters finds nothing, and is known by another key."""
    pool = BlockPool(64, 4)
    for table in (table_of("t", [("c", 1.0)]), table_of("t", [])):
        pool.allocate(table, TOKENS)
        pool.publish(table, TOKENS, len(TOKENS))
    assert len(pool.lookup(table_of("t", []), TOKENS).full) == 4
    assert pool.lookup(table_of(namespace, adapters), TOKENS).full == []


def test_keys_are_framed_by_length() -> None:
    """Moving a letter from one field of the key to its neighbour makes another key."""
    assert root_key([("ab", 1.0), ("c", 1.0)]) != root_key([("a", 1.0), ("bc", 1.0)])
    assert block_key(ROOT, b"", [1, 256]) != block_key(ROOT, b"", [1 + 256, 0])


PREFIXED = [-1, -2, -3, -4, -5, -6, *TOKENS]  # six virtual positions: a block of 4, and half of the next


def test_prefix_is_shared_by_all_tenants_and_their_texts_by_none() -> None:
    """Sequences with the same prefix share its full blocks and begin with a copy of the block that it ends in."""
    pool = BlockPool(32, 4)
    first, second = table_of("t", [("p", 1.0)], 6), table_of("u", [("p", 1.0)], 6)
    assert pool.allocate(first, PREFIXED) == 0
    pool.publish(first, PREFIXED, len(PREFIXED))
    assert pool.allocate(second, PREFIXED) == 6
    assert second.blocks[0] == first.blocks[0] and not set(second.blocks[1:]) & set(first.blocks)
    assert second.copy == (first.blocks[1], second.blocks[1])
    third = table_of("t", [("p", 1.0)], 6)
    assert pool.allocate(third, PREFIXED) == 22 and third.copy == (first.blocks[5], third.blocks[5])
    pool.assert_consistent([first, second, third])


def test_prefix_is_shared_without_the_cache_too() -> None:
    """The switch of the prefix cache is for texts: a prefix is the adapter's, and computed once."""
    pool = BlockPool(32, 4, is_cached=False)
    first, second = table_of("t", [("p", 1.0)], 6), table_of("t", [("p", 1.0)], 6)
    assert pool.allocate(first, PREFIXED) == 0
    pool.publish(first, PREFIXED, len(PREFIXED))
    assert pool.allocate(second, PREFIXED) == 6


def test_prefix_is_not_found_before_it_is_computed() -> None:
    """The block that a prefix ends in is known when its last virtual position is computed, not before."""
    pool = BlockPool(32, 4)
    first = table_of("t", [("p", 1.0)], 6)
    pool.allocate(first, PREFIXED)
    pool.publish(first, PREFIXED, 5)
    assert pool.lookup(table_of("t", [("p", 1.0)], 6), PREFIXED).tail is None
    pool.publish(first, PREFIXED, 6)
    assert pool.lookup(table_of("t", [("p", 1.0)], 6), PREFIXED).tail == first.blocks[1]


def test_prefixes_are_given_out_last() -> None:
    """A free block that is no prefix is given out first, however recently it was used."""
    pool = BlockPool(8, 4)
    table = table_of("t", [("p", 1.0)], 6)
    pool.allocate(table, PREFIXED[:8])
    pool.publish(table, PREFIXED[:8], 8)
    pool.free(table)
    others = BlockTable(ROOT)
    assert pool.extend(others, 24)
    assert len(pool.lookup(table_of("t", [("p", 1.0)], 6), PREFIXED).full) >= 1
    assert pool.extend(others, 32)
    assert pool.lookup(table_of("t", [("p", 1.0)], 6), PREFIXED).full == []


def test_source_of_a_copy_is_not_given_out_for_its_target() -> None:
    """Also where few blocks are free, a copy has two blocks; with too few the end of the prefix is computed anew."""
    pool = BlockPool(3, 4)
    table = table_of("t", [("p", 1.0)], 6)
    pool.allocate(table, PREFIXED[:8])
    pool.publish(table, PREFIXED[:8], 6)
    pool.free(table)
    copying = table_of("t", [("p", 1.0)], 6)
    assert pool.allocate(copying, PREFIXED[:8]) == 6
    assert copying.copy is not None and len({*copying.copy, copying.blocks[0]}) == 3
    pool.free(copying)
    pressed = table_of("t", [("p", 1.0)], 6)
    assert pool.allocate(pressed, PREFIXED[:12]) == 4 and pressed.copy is None
    pool.assert_consistent([pressed])


def test_same_tokens_after_another_beginning_are_another_block() -> None:
    """A block is known by all that comes before it, not by its own tokens alone."""
    pool = BlockPool(16, 4)
    computed(pool)
    assert pool.lookup(BlockTable(ROOT), [1, 2, 3, 4, *TOKENS[4:]]).full == []


def test_freed_blocks_keep_their_contents_until_needed() -> None:
    """A free block can be found again; the least recently used is given out first, from a chain's end."""
    pool = BlockPool(8, 4)
    old, new = computed(pool, tokens=TOKENS[:16]), computed(pool, tokens=[*range(16)])
    pool.free(old)
    pool.free(new)
    assert pool.num_free == 8
    assert len(pool.lookup(BlockTable(ROOT), TOKENS).full) == 4
    assert pool.allocate(BlockTable(ROOT), [9] * 12) == 0
    assert len(pool.lookup(BlockTable(ROOT), TOKENS).full) == 1
    assert len(pool.lookup(BlockTable(ROOT), [*range(17)]).full) == 4


def test_blocks_without_contents_are_given_out_before_useful_ones() -> None:
    """A freed block that was not published goes to the front of the free list."""
    pool = BlockPool(8, 4)
    useful, useless = computed(pool, tokens=TOKENS[:16]), BlockTable(ROOT)
    pool.extend(useless, 16)
    pool.free(useful)
    pool.free(useless)
    pool.extend(BlockTable(ROOT), 16)
    assert len(pool.lookup(BlockTable(ROOT), TOKENS).full) == 4


def test_shared_blocks_outlive_their_first_holder() -> None:
    """A block is free only when its last holder has freed it."""
    pool = BlockPool(8, 4)
    first, second = computed(pool), BlockTable(ROOT)
    pool.allocate(second, TOKENS)
    pool.free(first)
    assert pool.num_free == 8 - 5
    pool.assert_consistent([second])


def test_allocation_is_whole_or_nothing() -> None:
    """An allocation changes nothing if blocks run short, even if some were found in the cache."""
    pool = BlockPool(6, 4)
    pool.free(computed(pool))
    wanted = BlockTable(ROOT)
    assert pool.allocate(wanted, [*TOKENS, *range(8)]) is None
    assert pool.allocate(wanted, TOKENS, num_spare=2) is None
    assert wanted.blocks == []
    assert pool.allocate(wanted, TOKENS, num_spare=1) == 16
    assert not pool.extend(wanted, 29)
    assert pool.extend(wanted, 24)
    pool.assert_consistent([wanted])


def test_cache_can_be_switched_off() -> None:
    """A lookup never finds anything if the cache is off."""
    pool = BlockPool(16, 4, is_cached=False)
    computed(pool)
    assert pool.allocate(BlockTable(ROOT), TOKENS) == 0
    assert pool.num_cached == 0


def test_same_contents_computed_twice_are_known_once() -> None:
    """Two sequences that computed the same side by side leave one known block each position."""
    pool = BlockPool(16, 4)
    tables = [BlockTable(ROOT), BlockTable(ROOT)]
    for table in tables:
        pool.allocate(table, TOKENS)
    for table in tables:
        pool.publish(table, TOKENS, 17)
        pool.assert_consistent(tables)
    assert pool.num_cached == 5
    for table in tables:
        pool.free(table)
    pool.assert_consistent([])


def test_books_are_checked() -> None:
    """A table that the pool does not know of, or forgot, is noticed."""
    pool = BlockPool(8, 4)
    table = computed(pool)
    with pytest.raises(InvariantError, match="holders"):
        pool.assert_consistent([])
    with pytest.raises(InvariantError, match="holders"):
        pool.assert_consistent([table, BlockTable(ROOT, blocks=[0])])


def is_coming(*, namespace: str = "t", tokens: list[int] = TOKENS, is_cached: bool = True, virtual: int = 0) -> bool:
    """Whether a sequence would wait for one of the namespace "t", of whose tokens four are computed."""
    pool = BlockPool(32, 4, is_cached)
    begun = [*range(-1, -1 - virtual, -1), *TOKENS]
    table = table_of("t", [("a", 1.0)], virtual)
    pool.allocate(table, begun)
    pool.publish(table, begun, 4)
    return pool.is_coming(table_of(namespace, [("a", 1.0)], virtual), [*begun[:virtual], *tokens], table, begun)


def test_what_is_coming_is_waited_for() -> None:
    """A sequence waits for what it will find: the rest of a prefix, or enough that it shares and need not compute."""
    assert is_coming() and is_coming(tokens=[*TOKENS[:12], 1]) and is_coming(namespace="u", virtual=6)
    assert not is_coming(tokens=[*TOKENS[:11], 1, 2]), "it shares too little more"
    assert not is_coming(tokens=TOKENS[:12]), "it must compute its last token"
    assert not is_coming(namespace="u")
    assert not is_coming(is_cached=False) and is_coming(is_cached=False, virtual=6)
    assert not is_coming(namespace="u", virtual=4), "the prefix is there"


class Memory:
    """What each position of each block holds: the adapters, namespace and tokens up to it that it was computed of."""

    def __init__(self, num_blocks: int) -> None:
        self.held: list[list[object]] = [[None] * 4 for _ in range(num_blocks)]

    def compute(self, table: BlockTable, tokens: list[int], start: int, end: int) -> None:
        """Write the positions [start, end) of a sequence."""
        for at in range(start, end):
            self.held[table.blocks[at // 4]][at % 4] = self._rightful(table, tokens, at)

    def assert_right(self, table: BlockTable, tokens: list[int], num_cached: int) -> None:
        """The first positions of a sequence hold what would be computed for them."""
        for at in range(num_cached):
            assert self.held[table.blocks[at // 4]][at % 4] == self._rightful(table, tokens, at)

    @staticmethod
    def _rightful(table: BlockTable, tokens: list[int], at: int) -> object:
        return table.root, table.salt if at >= table.num_virtual else b"", tuple(tokens[: at + 1])


@pytest.mark.parametrize("seed", range(30))
def test_books_agree_whatever_happens(seed: int) -> None:
    """Over random allocations, extensions, publications and frees the books agree, and everything comes back.

    What a sequence begins with is what would be computed for it.
    """
    draw = random.Random(seed)
    pool, memory = BlockPool(24, 4, is_cached=seed % 5 > 0), Memory(24)
    held: list[tuple[BlockTable, list[int]]] = []
    for _ in range(300):
        action = draw.randrange(4)
        if action == 0 or not held:
            num_virtual = draw.choice([0, 3, 4, 9])
            table = table_of(draw.choice(["t", "u"]), [("a", 1.0 + num_virtual)], num_virtual)
            tokens = [-1 - at for at in range(num_virtual)] + [draw.randrange(2) for _ in range(draw.randrange(1, 20))]
            num_cached = pool.allocate(table, tokens, draw.randrange(3))
            if num_cached is not None:
                held.append((table, tokens))
                if table.copy is not None:
                    source, target = table.copy
                    memory.held[target] = [*memory.held[source]]
                memory.assert_right(table, tokens, num_cached)
        elif action == 1:
            table, tokens = draw.choice(held)
            if pool.extend(table, len(tokens) + 1):
                tokens.append(draw.randrange(2))
        elif action == 2:
            table, tokens = draw.choice(held)
            num_computed = draw.randrange(table.num_published, len(tokens) + 1)
            memory.compute(table, tokens, table.num_published, num_computed)
            pool.publish(table, tokens, num_computed)
        else:
            table, _ = held.pop(draw.randrange(len(held)))
            pool.free(table)
        pool.assert_consistent([table for table, _ in held])
    for table, _ in held:
        pool.free(table)
    pool.assert_consistent([])
    assert pool.num_free == 24
