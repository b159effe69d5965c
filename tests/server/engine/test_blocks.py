import random

import pytest

from server.engine.blocks import BlockPool, BlockTable, InvariantError, block_key, root_key

ROOT = root_key("t", [])
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
    assert pool.allocate(second, [*TOKENS[:10], 1, 2, 3]) == 8
    assert second.blocks[:2] == first.blocks[:2]
    assert not set(second.blocks[2:]) & set(first.blocks)
    pool.assert_consistent([first, second])


def test_last_token_is_always_computed() -> None:
    """Of n tokens at most n - 1 come from the cache, so that the last one has logits."""
    pool = BlockPool(16, 4)
    computed(pool)
    assert pool.allocate(BlockTable(ROOT), TOKENS[:16]) == 12
    assert pool.allocate(BlockTable(ROOT), TOKENS[:17]) == 16


def test_uncomputed_blocks_are_not_shared() -> None:
    """A block can be found only after the step that computed its last position."""
    pool, table = BlockPool(16, 4), BlockTable(ROOT)
    pool.allocate(table, TOKENS)
    assert pool.lookup(ROOT, TOKENS) == []
    pool.publish(table, TOKENS, 7)
    assert len(pool.lookup(ROOT, TOKENS)) == 1
    pool.publish(table, TOKENS, 8)
    assert len(pool.lookup(ROOT, TOKENS)) == 2


@pytest.mark.parametrize(
    "other",
    [
        root_key("u", []),
        root_key("t", [("a", 1.0)]),
        root_key("t", [("a", 0.5)]),
        root_key("t", [("b", 1.0)]),
        root_key("t", [("a", 1.0), ("b", 1.0)]),
        root_key("t", [("b", 1.0), ("a", 1.0)]),
        root_key("ta", []),
        root_key("t", [("", 1.0), ("a", 1.0)]),
    ],
)
def test_no_block_crosses_tenants_adapters_or_weights(other: bytes) -> None:
    """Another namespace, digest, weight or order of hats finds nothing, and is known by another key."""
    pool = BlockPool(64, 4)
    roots = [root_key("t", [("c", 1.0)]), ROOT]
    for root in roots:
        computed(pool, root)
    assert other not in roots
    assert pool.lookup(other, TOKENS) == []


def test_keys_are_framed_by_length() -> None:
    """Moving a letter from one field of the key to its neighbour makes another key."""
    assert root_key("ab", [("c", 1.0)]) != root_key("a", [("bc", 1.0)])
    assert block_key(ROOT, [1, 256]) != block_key(ROOT, [1 + 256, 0])


def test_same_tokens_after_another_beginning_are_another_block() -> None:
    """A block is known by all that comes before it, not by its own tokens alone."""
    pool = BlockPool(16, 4)
    computed(pool)
    assert pool.lookup(ROOT, [1, 2, 3, 4, *TOKENS[4:]]) == []


def test_freed_blocks_keep_their_contents_until_needed() -> None:
    """What nobody holds can be found again, and the least recently used is given out first, from a chain's end."""
    pool = BlockPool(8, 4)
    old, new = computed(pool, tokens=TOKENS[:16]), computed(pool, tokens=[*range(16)])
    pool.free(old)
    pool.free(new)
    assert pool.num_free == 8
    assert len(pool.lookup(ROOT, TOKENS)) == 4
    assert pool.allocate(BlockTable(ROOT), [9] * 12) == 0
    assert len(pool.lookup(ROOT, TOKENS)) == 1
    assert len(pool.lookup(ROOT, [*range(17)])) == 4


def test_blocks_without_contents_are_given_out_before_useful_ones() -> None:
    """A freed block that nothing is known of goes to the front of the free list."""
    pool = BlockPool(8, 4)
    useful, useless = computed(pool, tokens=TOKENS[:16]), BlockTable(ROOT)
    pool.extend(useless, 16)
    pool.free(useful)
    pool.free(useless)
    pool.extend(BlockTable(ROOT), 16)
    assert len(pool.lookup(ROOT, TOKENS)) == 4


def test_shared_blocks_outlive_their_first_holder() -> None:
    """A block is free only when its last holder has freed it."""
    pool = BlockPool(8, 4)
    first, second = computed(pool), BlockTable(ROOT)
    pool.allocate(second, TOKENS)
    pool.free(first)
    assert pool.num_free == 8 - 5
    pool.assert_consistent([second])


def test_allocation_is_whole_or_nothing() -> None:
    """Where blocks run short nothing changes, also when some were found in the cache."""
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
    """Without the cache nothing is ever found."""
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
    assert pool.num_cached == 4
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
        pool.assert_consistent([table, BlockTable(ROOT, [0])])


@pytest.mark.parametrize("seed", range(30))
def test_books_agree_whatever_happens(seed: int) -> None:
    """Over random allocations, extensions, publications and frees the books agree, and everything comes back."""
    draw = random.Random(seed)
    pool = BlockPool(24, 4, is_cached=seed % 5 > 0)
    held: list[tuple[BlockTable, list[int]]] = []
    for _ in range(300):
        action = draw.randrange(4)
        if action == 0 or not held:
            table, tokens = BlockTable(draw.choice([ROOT, root_key("u", [])])), [draw.randrange(2) for _ in range(20)]
            tokens = tokens[: draw.randrange(1, 20)]
            if pool.allocate(table, tokens, draw.randrange(3)) is not None:
                held.append((table, tokens))
        elif action == 1:
            table, tokens = draw.choice(held)
            if pool.extend(table, len(tokens) + 1):
                tokens.append(draw.randrange(2))
        elif action == 2:
            table, tokens = draw.choice(held)
            pool.publish(table, tokens, draw.randrange(len(tokens) + 1))
        else:
            table, _ = held.pop(draw.randrange(len(held)))
            pool.free(table)
        pool.assert_consistent([table for table, _ in held])
    for table, _ in held:
        pool.free(table)
    pool.assert_consistent([])
    assert pool.num_free == 24
