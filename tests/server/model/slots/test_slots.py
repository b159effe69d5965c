"""Slots: the low-rank kernel against its slow twin, mixed batches, and slots that are used again."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import pytest
import torch
from torch import Tensor

from adapters_store.base.spec import BaseSpec, LinearSite
from adapters_store.primitives import LowRank, Patch
from server.core import Row, Sampling
from server.model.backends.codes import PROJECTION
from server.model.backends.cpu.adapters import list_prefetch
from server.model.backends.cpu.backend import CpuBackend
from server.model.backends.cpu.copies import HostCopies
from server.model.backends.reference import apply_reference
from server.model.row_adapters import MAX_ROWS, NO_ADAPTERS, build_row_adapters
from server.model.slots.slots import AdapterSlots
from tests.kit.patches import all_of

SITES = {"a": (40, 24), "b": (24, 56), "head": (40, 32)}
SPEC = BaseSpec("toy", "0" * 64, "Toy", 32, 40, 1, 64, {site: LinearSite(*widths) for site, widths in SITES.items()})
RANKS = (1, 2, 3, 4, 7, 8, 16, 33)


def make_patch(number: int, rank: int, sites: tuple[str, ...] = ("a", "b", "head")) -> Patch:
    generator = torch.Generator().manual_seed(number)
    made = [
        LowRank(
            site,
            torch.randn(rank, SITES[site][0], generator=generator),
            torch.randn(SITES[site][1], rank, generator=generator),
        )
        for site in sites
    ]
    return Patch(f"{number}", "lora", tuple(made))


def make_bank() -> tuple[AdapterSlots, dict[int, Patch]]:
    """A bank with a slot of each rank, and the patches by slot."""
    adapter_slots = AdapterSlots(SPEC, CpuBackend("fp32"))
    for site in SITES:
        adapter_slots.group(site)
    patches = [make_patch(number, rank) for number, rank in enumerate(RANKS)]
    return adapter_slots, {adapter_slots.insert(adapter_slots.pack(patch)): patch for patch in patches}


def by_hand(patch: Patch, site: str, x: Tensor) -> Tensor:
    primitive = next(p for p in all_of(LowRank, patch) if p.site == site)
    return primitive.b @ (primitive.a @ x)


def rows(adapters: list[tuple[tuple[int, float], ...]], num_tokens: int = 3) -> list[Row]:
    return [Row([0] * num_tokens, 0, [0], adapters=adapter, sampling=Sampling()) for adapter in adapters]


HATS: list[tuple[tuple[int, float], ...]] = [
    (),
    ((0, 1.0),),
    ((5, 1.0),),
    (),
    ((7, 1.0),),
    ((1, 0.5), (6, -2.0)),
    ((2, 1.0),),
    ((3, 0.0),),
    ((4, 1.0),),
    ((5, 1.0),),
]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_branches_read_is_known_before(precision: str) -> None:
    """While the base's product computes, just the matrices of the hats of the step are asked for, in their order."""
    adapter_slots = AdapterSlots(SPEC, CpuBackend(precision))
    slots = [adapter_slots.insert(adapter_slots.pack(make_patch(number, rank))) for number, rank in enumerate((3, 8))]
    adapters = [((slots[1], 1.0),), (), ((slots[0], 0.5), (slots[1], 2.0))]
    group = adapter_slots.group("a", "head")
    adapter_slots.begin_step(rows(adapters))
    found = list_prefetch(SITES["a"][0], group, adapter_slots.step.of_tokens.args)
    wanted = []
    for site, slot in (("a", 1), ("head", 1), ("a", 0), ("a", 1), ("head", 0), ("head", 1)):
        matrices = adapter_slots.primitive(PROJECTION, adapter_slots.sites.index[site], slots[slot])
        assert isinstance(matrices, LowRank)
        offset = adapter_slots.table[PROJECTION, adapter_slots.sites.index[site], slots[slot], 0]
        num_bytes = adapter_slots.dtypes.matrices.itemsize * (matrices.a.numel() + matrices.b.numel())
        wanted.append([adapter_slots.slots[slots[slot]].buffer.data_ptr() + offset, num_bytes])
    assert found.tolist() == wanted


@pytest.mark.parametrize("site", ["a", "b"])
def test_kernel_equals_its_twin_and_the_formula(site: str) -> None:
    """Rows of all ranks, of several hats with weights and of none get y += w B (A x), each its own."""
    adapter_slots, patches = make_bank()
    x = torch.randn(1, 3 * len(HATS), SITES[site][0], generator=torch.Generator().manual_seed(1))
    start = torch.randn(1, 3 * len(HATS), SITES[site][1], generator=torch.Generator().manual_seed(2))
    adapter_slots.begin_step(rows(HATS))
    fast, slow = start.clone(), start[0].clone()
    adapter_slots.apply(adapter_slots.group(site), x, fast, False)
    group, find = adapter_slots.group(site), adapter_slots.primitive
    apply_reference(find, group, x[0], slow, slow, adapter_slots.step.tokens)
    torch.testing.assert_close(fast[0], slow, atol=1e-4, rtol=1e-5)
    for token, y in enumerate(fast[0]):
        added = sum((w * by_hand(patches[slot], site, x[0, token]) for slot, w in HATS[token // 3]), torch.zeros(()))
        torch.testing.assert_close(y, start[0, token] + added, atol=1e-4, rtol=1e-5)


def test_rows_are_bit_equal_alone_and_in_a_batch() -> None:
    """A row's result does not depend, to the last bit, on the rows beside it."""
    adapter_slots, _ = make_bank()
    x = torch.randn(1, len(HATS), 40, generator=torch.Generator().manual_seed(1))
    adapter_slots.begin_step(rows(HATS, 1))
    together = torch.zeros(1, len(HATS), 24)
    adapter_slots.apply(adapter_slots.group("a"), x, together, False)
    for index, adapter in enumerate(HATS):
        adapter_slots.begin_step(rows([adapter], 1))
        alone = torch.zeros(1, 1, 24)
        adapter_slots.apply(adapter_slots.group("a"), x[:, index : index + 1].contiguous(), alone, False)
        assert torch.equal(alone[0, 0], together[0, index])


class WrittenDown(HostCopies):
    """Copies to a CPU, and what was asked of them."""

    def __init__(self, asked: list[tuple[str, object]]) -> None:
        self.asked = asked

    def pin(self, host: Tensor) -> Tensor:
        self.asked.append(("pin", None))
        return super().pin(host)

    def start(self, key: Hashable, host: Iterable[Tensor]) -> list[Tensor]:
        self.asked.append(("start", key))
        return super().start(key, host)

    def wait(self, key: Hashable) -> None:
        self.asked.append(("wait", key))

    def release(self, key: Hashable) -> None:
        self.asked.append(("release", key))


def test_a_copy_is_waited_for_by_who_wears_it() -> None:
    """What is packed is pinned, a slot is filled without a wait, and only a step that wears it, or reads its prefix,
    waits for it; who frees it does not."""
    adapter_slots, asked = AdapterSlots(SPEC, CpuBackend("fp32")), list[tuple[str, object]]()
    adapter_slots.copies = WrittenDown(asked)
    slots = [adapter_slots.insert(adapter_slots.pack(make_patch(number, 4))) for number in range(2)]
    assert asked == [("pin", None), ("start", 0), ("pin", None), ("start", 1)]
    asked.clear()
    adapter_slots.begin_step(rows([(), ((slots[1], 1.0),)]))
    adapter_slots.prefix(slots[0])
    adapter_slots.drop(slots[0])
    assert asked == [("wait", 1), ("wait", 0), ("release", 0)]


def test_the_head_sees_the_sampled_rows_alone() -> None:
    """At the output head, row i is the i-th row that is sampled, not the i-th token."""
    adapter_slots, patches = make_bank()
    batch = rows([((0, 1.0),), ((5, 1.0),)], 4)
    batch[0].sampling = None
    adapter_slots.begin_step(batch)
    x, y = torch.randn(1, 1, 40), torch.zeros(1, 1, 32)
    adapter_slots.apply(adapter_slots.group("head"), x, y, True)
    torch.testing.assert_close(y[0, 0], by_hand(patches[5], "head", x[0, 0]), atol=1e-4, rtol=1e-5)


def test_an_undressed_bank_does_nothing() -> None:
    """Without hats nothing is added, and nothing is read."""
    adapter_slots, _ = make_bank()
    adapter_slots.begin_step(rows(HATS))
    adapter_slots.end_step()
    assert adapter_slots.step.tokens.slots.size == NO_ADAPTERS.slots.size
    y = torch.zeros(1, 1, 24)
    adapter_slots.apply(adapter_slots.group("a"), torch.ones(1, 1, 40), y, False)
    assert not y.any()


def test_a_site_without_a_primitive_is_left_alone() -> None:
    """A patch acts at its own sites only, also in a slot whose former patch acted elsewhere."""
    adapter_slots, _ = make_bank()
    adapter_slots.drop(5)
    slot = adapter_slots.insert(adapter_slots.pack(make_patch(99, 4, ("b",))))
    assert slot == 5
    adapter_slots.begin_step(rows([((slot, 1.0),)], 1))
    y = torch.zeros(1, 1, 24)
    adapter_slots.apply(adapter_slots.group("a"), torch.ones(1, 1, 40), y, False)
    assert not y.any()


def test_slots_are_true_rank_and_grow() -> None:
    """A packed patch has the bytes of its own numbers, and there are as many slots as are needed."""
    adapter_slots = AdapterSlots(SPEC, CpuBackend("fp32"))
    packed = [adapter_slots.pack(make_patch(number, 1 + number % 5)) for number in range(40)]
    assert [p.num_bytes for p in packed] == [4 * make_patch(n, 1 + n % 5).num_items for n in range(40)]
    slots = [adapter_slots.insert(p) for p in packed]
    adapter_slots.group("a")  # groups are made between steps
    assert slots == list(range(40))
    adapter_slots.begin_step(rows([((slot, 1.0),) for slot in slots], 1))
    x, y = torch.ones(1, 40, 40), torch.zeros(1, 40, 24)
    adapter_slots.apply(adapter_slots.group("a"), x, y, False)
    for number in (0, 17, 39):
        wanted = by_hand(make_patch(number, 1 + number % 5), "a", x[0, 0])
        torch.testing.assert_close(y[0, number], wanted, atol=1e-4, rtol=1e-5)


def test_tiles_are_neighbours_that_wear_the_same() -> None:
    """Neighbouring rows that wear the same are one tile, but for a limit of rows; bare rows are in none."""
    many = MAX_ROWS + 3
    worn = build_row_adapters([((), 1), (((1, 1.0),), 2), (((1, 1.0),), many - 2), (((1, 0.5), (2, 1.0)), 1), ((), 4)])
    assert worn.num_rows == many + 6 and worn.tiles.tolist() == [
        [1, MAX_ROWS, 0, 1],
        [1 + MAX_ROWS, 3, 0, 1],
        [1 + many, 1, 1, 3],
    ]
    assert list(worn.segments())[-1] == (slice(1 + many, 2 + many), [(1, 0.5), (2, 1.0)])
