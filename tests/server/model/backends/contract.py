"""What every backend must hold: one suite, run by each with the tolerance that it states.

A backend whose tolerance is 0 also gives every row the same bits whatever it is computed beside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from adapters_store.base.spec import BaseSpec, KVShape, LinearSite, NormSite
from adapters_store.primitives import Bias, Bottleneck, Delta, LowRank, Patch, Primitive, Rows, Scale
from server.core import Row, Sampling
from server.model.attention.attend import attend
from server.model.attention.kv_cache import KVCache
from server.model.attention.paged_batch import page
from server.model.attention.reference import attend_reference
from server.model.backends.attention_params import AttentionParams
from server.model.backends.base import Backend
from server.model.backends.codes import GATE_CODES, ROWS, SCALE_IN
from server.model.backends.reference import apply_reference, embed_rows_reference, scale_reference
from server.model.row_adapters import SiteGroup
from server.model.slots.slots import AdapterSlots

SITES = {"a": (40, 24), "b": (40, 56), "square": (40, 40), "head": (40, 35)}
SPEC = BaseSpec(
    "toy", "0" * 64, "Toy", 35, 40, 1, 64, {site: LinearSite(*widths) for site, widths in SITES.items()},
    {"norm": NormSite(8)}, embedding="embed", embedding_size=40, head="head",
)  # fmt: skip
LENGTHS, BLOCK = (1, 5, 8, 37, 70), 8


@dataclass(frozen=True)
class Case:
    """A backend by name. `tolerance` is relative to the largest value; `is_stable`: rows are bits of their own."""

    name: str
    make: Callable[[], Backend]
    tolerance: float = 1e-5
    is_stable: bool = False


def near(got: Tensor, wanted: Tensor, case: Case) -> None:
    assert got.shape == wanted.shape
    if got.numel():
        gap = float((got.float() - wanted.float()).abs().max())
        assert gap <= case.tolerance * max(1.0, float(wanted.abs().max())), gap


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class BackendContract:
    """The suite: a test class derives from it and gives the fixture `case`."""

    @pytest.mark.parametrize("has_bias", [True, False])
    @pytest.mark.parametrize(("size_in", "size_out"), [(64, 96), (33, 7), (1, 1), (100, 17)])
    def test_a_packed_linear_is_the_linear(self, case: Case, size_in: int, size_out: int, has_bias: bool) -> None:
        """A packed weight of any size gives x W^T + b of the weight that `rounded` says is kept, for 0 to 101 rows."""
        backend = case.make()
        weight = backend.rounded(random(size_out, size_in))
        bias = random(size_out, seed=1) if has_bias else None
        run, x = backend.pack_linear(weight, bias), random(101, size_in, seed=2)
        for count in (0, 1, 2, 3, 6, 7, 101):
            near(run(x[None, :count])[0], torch.nn.functional.linear(x[:count], weight, bias), case)
            if case.is_stable:
                assert torch.equal(run(x[None, :count])[0], run(x[None])[0, :count])

    def test_norms_and_gates_are_their_formulas(self, case: Case) -> None:
        """RMS norm equals torch's and every gate is transformers' activation of g times u; a NaN stays in its row."""
        backend, x, weight = case.make(), random(2, 5, 34), random(34, seed=1)
        x[0, 3] = torch.nan
        good = [0, 1, 2, 4]
        wanted = torch.nn.functional.rms_norm(x, (34,), weight, 1e-6)
        near(backend.rms_norm(x, weight, 1e-6)[0, good], wanted[0, good], case)
        for name, code in GATE_CODES.items():
            wanted = ACT2FN[name](x[..., :17]) * x[..., 17:]
            near(backend.gate(x, code)[0, good], wanted[0, good], case)

    def test_the_best_token_is_the_first_of_the_largest(self, case: Case) -> None:
        """Ties go to the lowest token, a row that is not finite gives -1, and no rows give nothing."""
        backend = case.make()
        for size in (1, 255, 257, 4000):
            logits = (3 * random(8, size)).round()
            for number, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
                logits[number + 1, (size - 1) // (number + 1)] = bad
            finite = [0, 4, 5, 6, 7]
            got = backend.best_tokens(logits)
            assert got[[1, 2, 3]].tolist() == [-1, -1, -1]
            assert got[finite].tolist() == [int((row == row.max()).nonzero()[0]) for row in logits[finite]]
            assert backend.best_tokens(logits[:0]).tolist() == []

    @pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (11, 0.0), (0, 2.0), (5, 3.0)])
    @pytest.mark.parametrize(("value_dim", "rotated"), [(16, 0), (24, 16), (16, 8)])
    def test_attention_is_the_formula(self, case: Case, window: int, cap: float, value_dim: int, rotated: int) -> None:
        """Grouped queries, windows, soft caps and rotations in one batch of prompts give softmax(q k^T) v, and so do
        chunks of them; what is stale in a block is never read."""
        backend, params = case.make(), AttentionParams(0.3, window, cap)
        qkv, angles = random(sum(LENGTHS), 6 * 16 + 2 * (16 + value_dim)), random(sum(LENGTHS), rotated, seed=1)
        cos, sin = angles.cos(), angles.sin()
        rows = [Row([0] * n, 0, list(range(at * 9, at * 9 + 9))) for at, n in enumerate(LENGTHS)]
        batch = page(rows, self._cache(backend, value_dim), 2)
        together = attend(batch, 0, qkv, cos, sin, params)
        near(together, attend_reference(page(rows, self._cache(backend, value_dim), 2), 0, qkv, cos, sin, params), case)
        first = sum(LENGTHS[:3])
        cache, parts = self._cache(backend, value_dim), []
        for start in range(0, LENGTHS[3], 10):
            chunk = slice(first + start, first + min(start + 10, LENGTHS[3]))
            alone = Row([0] * (chunk.stop - chunk.start), start, rows[3].blocks)
            parts.append(attend(page([alone], cache, 1), 0, qkv[chunk], cos[chunk], sin[chunk], params))
        near(torch.cat(parts), together[first : first + LENGTHS[3]], case)
        if case.is_stable:
            assert torch.equal(torch.cat(parts), together[first : first + LENGTHS[3]])

    @staticmethod
    def _cache(backend: Backend, value_dim: int) -> KVCache:
        cache = KVCache([KVShape(2, 16, value_dim)], 9 * len(LENGTHS), BLOCK, backend)
        for tensor in (*cache.keys, *cache.values):
            tensor.fill_(torch.nan)
        return cache

    def test_adapters_of_every_primitive_in_one_batch(self, case: Case) -> None:
        """Rows of every primitive, of several with weights and of none each get their own formulas; a row alone gives
        what it gives in the batch."""
        slots = AdapterSlots(SPEC, case.make())
        groups = [slots.group("a", "b"), slots.group("head"), slots.group("square"), slots.group("norm")]
        numbers = [slots.insert(slots.pack(patch)) for patch in patches()]
        uses: list[tuple[tuple[int, float], ...]] = [((number, 1.0),) for number in numbers]
        uses += [(), ((numbers[1], 0.5), (numbers[2], -0.5), (numbers[4], 2.0)), ((numbers[0], 0.0),), ()]
        rows = [Row([3, 4, 9], 0, [0], adapters=use, sampling=Sampling()) for use in uses]
        for group in groups:
            self._compare_adapters(slots, group, rows, case)
        slots.begin_step(rows)
        ids, y = torch.tensor([[3, 4, 9] * len(rows)]), random(1, 3 * len(rows), 40)
        wanted, site = y[0].clone(), slots.sites.index["embed"]
        slots.embed(ids, y)
        for span, used in slots.step.tokens.segments():
            for slot, weight in used:
                if isinstance(changed := slots.primitive(ROWS, site, slot), Rows):
                    embed_rows_reference(changed, ids[0, span], wanted[span], weight)
        near(y[0], wanted, case)

    def _compare_adapters(self, slots: AdapterSlots, group: SiteGroup, rows: list[Row], case: Case) -> None:
        is_head, site = group is slots.group("head"), int(group.sites[0])
        each = 1 if is_head else 6 if group is slots.group("norm") else 3
        x = random(each * len(rows), slots.sites.widths[site][0], seed=1)
        start = random(len(x), int(group.columns[-1]), seed=2)
        together = self._run(slots, group, rows, x, start, is_head)
        step = slots.step.sampled if is_head else slots.step.tokens
        step = step if len(x) == step.num_rows else step.repeated(len(x) // step.num_rows)
        scaled, wanted = x.clone(), start.clone()
        if len(group.sites) == 1:
            scale_reference(slots.primitive, SCALE_IN, site, scaled, step)
        apply_reference(slots.primitive, group, scaled, wanted, wanted, step)
        near(together, wanted, case)
        for at, row in enumerate(rows):
            mine = slice(each * at, each * (at + 1))
            alone = self._run(slots, group, [row], x[mine], start[mine], is_head)
            near(alone, together[mine], case)
            assert not case.is_stable or torch.equal(alone, together[mine])
        slots.begin_step(rows)

    @staticmethod
    def _run(slots: AdapterSlots, group: SiteGroup, rows: list[Row], x: Tensor, y: Tensor, is_head: bool) -> Tensor:
        slots.begin_step(rows)
        y = y.clone()[None]
        entered = slots.enter(group, x[None], is_head) if len(group.sites) == 1 else x[None]
        slots.apply(group, entered, y, is_head)
        return y[0]


def patches() -> list[Patch]:
    """A patch of each primitive at every site that can have it."""
    made: list[list[Primitive]] = [
        [LowRank(site, random(3 + i % 7, i), random(o, 3 + i % 7, seed=1)) for site, (i, o) in SITES.items()],
        [*(Scale(site, 1 + 0.3 * random(o)) for site, (_, o) in SITES.items()), Scale("norm", 1 + random(8))],
        [*(Bias(site, random(o)) for site, (_, o) in SITES.items()), Bias("norm", random(8))],
        [Delta(site, random(o, i)) for site, (i, o) in SITES.items()],
        [Rows("embed", torch.tensor([3, 9]), random(2, 40)), Rows("head", torch.tensor([0, 34]), random(2, 40))],
        [Scale("square", 1 + 0.3 * random(40), "input"), Scale("head", 1 + 0.3 * random(40), "input")],
        [bottleneck("square", 40, "output"), bottleneck("norm", 8, "output")],
        [bottleneck("square", 40, "input")],
    ]
    return [Patch(str(number), "", tuple(primitives)) for number, primitives in enumerate(made)]


def bottleneck(site: str, size: int, of: Literal["input", "output", "stream"]) -> Bottleneck:
    norm = 1 + 0.1 * random(size), 0.1 * random(size, seed=3)
    down, up = random(5, size), random(size, 5, seed=1)
    return Bottleneck(site, down, up, "gelu", of, random(5), random(size), norm, norm)
