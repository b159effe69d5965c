"""A pass over the rows of many jobs: each adapter computes what it would alone, or the base is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.kit.tiny import CONFIGS, make_tiny_base
from training.base import Base, load_base
from training.data.batch import label_logits, make_batch
from training.data.dataset import TokenizedRow
from training.errors import BaseError
from training.joint import shared_base
from training.methods import METHODS, attach, options_of
from training.methods.trainable import TrainableAdapter
from training.run import trainer
from training.run.distributed import Processes
from training.run.schedule import Plan

NEAR = 1e-4
TYPES = [name for name in CONFIGS if name != "gemma2"]  # which caps the scores of attention


SHARED = [name for name, method in METHODS.items() if method.can_share]


def adapters_on(
    base: Base, names: Sequence[str] = ("lora", "bottleneck", "dora")
) -> dict[shared_base.TwinAdapter, list[TokenizedRow]]:
    """Return adapters that change the output, with rows of different number and length, some longer than a window."""
    rows_by_adapter = {}
    for seed, name in enumerate(names):
        adapter = attach(name, options_of(name, {"layers": "all"}), shared_base.twin(base), [], seed)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter.trained():
                parameter.add_(0.05 * torch.randn_like(parameter))
        rows_by_adapter[shared_base.TwinAdapter(adapter)] = [
            TokenizedRow((*b"Colour: ", *[97 + i] * 20, *b"warm", 257), 24 + i, i) for i in range(seed + 1)
        ]
    return rows_by_adapter


def load(folder: Path) -> Base:
    return load_base(str(folder), "cpu", None, lambda _message: None)


def test_every_method_that_can_share_does(biased_base: Path) -> None:
    """Each method's loss and gradients in one batch of all methods are those of its own model alone, within 1e-4."""
    base = load(biased_base)
    rows_by_adapter = adapters_on(base, SHARED)
    pending_steps = {
        adapter: trainer.PendingStep(0, rows, [part for part in (rows[:2], rows[2:]) if part], 0.0, 0)
        for adapter, rows in rows_by_adapter.items()
    }
    losses = shared_base.SharedBase(base).backward(pending_steps)
    assert len(SHARED) == 10
    for adapter, rows in rows_by_adapter.items():
        found = trained(adapter)
        ours = [parameter.grad for parameter in found]
        alone = make_batch(rows, base.model.device)
        loss = cross_entropy(label_logits(adapter.model, alone), alone.targets)
        theirs = torch.autograd.grad(loss, found)
        assert losses[adapter] == pytest.approx(loss.item(), abs=NEAR)
        for one, other in zip(ours, theirs, strict=True):
            assert one is not None and (one - other).abs().max() < NEAR
        assert max(gradient.abs().max() for gradient in theirs) > 10 * NEAR


def trained(adapter: shared_base.TwinAdapter) -> list[Tensor]:
    return [parameter for parameter in adapter.model.parameters() if parameter.requires_grad]


LONG: list[tuple[str, dict[str, Any], int]] = [  # method, options, rows at a time
    ("lora", {"layers": "all", "dropout": 0.2}, 4),
    ("bottleneck", {"layers": "all"}, 3),
    ("dora", {"layers": "all"}, 2),
    ("lora", {"layers": "all", "target_modules": "q_proj,v_proj"}, 1),
]
STEPS = 100


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Compute on two threads, as on a small machine: MKL's order of summation depends on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_a_long_run_does_not_drift(tiny_base: Path) -> None:
    """After a hundred steps each job's weights are those alone, within 1e-4; on a CPU they are bit-equal."""
    base = load(tiny_base)
    rows = [
        TokenizedRow((*b"Colour: ", *[97 + i] * (i % 9), *b"warmer"[: 4 + i % 3], 257), 8 + i % 9, i) for i in range(20)
    ]

    def begun(seed: int) -> tuple[TrainableAdapter, trainer.Trainer]:
        name, given, size = LONG[seed]
        adapter = attach(name, options_of(name, given), shared_base.twin(base), rows, seed)
        plan = Plan(lr=0.01, steps=STEPS, batch_size=size, seed=seed)
        found = trainer.Trainer(adapter, rows, plan, Processes(is_cpu=True))
        found.begin()
        return adapter, found

    adapters, together = zip(*(begun(seed) for seed in range(len(LONG))), strict=True)
    twins = [shared_base.TwinAdapter(adapter) for adapter in adapters]
    computing = shared_base.SharedBase(base)
    for _ in range(STEPS):
        pending_steps = [pending for one in together if (pending := one.next_pending()) is not None]
        losses = computing.backward(dict(zip(twins, pending_steps, strict=True)))
        for one, adapter, pending in zip(together, twins, pending_steps, strict=True):
            one.take(pending, losses[adapter])
    for seed, one in enumerate(together):
        _, alone = begun(seed)
        alone.run()
        for ours, theirs in zip(one.state()["trained"], alone.state()["trained"], strict=True):
            assert (ours - theirs).abs().max() < NEAR


@pytest.mark.parametrize("model_type", TYPES)
def test_bases_of_every_type_are_shared(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each adapter's logits in one batch are those of its own model, windows of attention and all, within 1e-4."""
    monkeypatch.setattr(shared_base, "NEAR", NEAR)
    base = load(make_tiny_base(tmp_path / model_type, model_type))
    shared_base.SharedBase(base).check_isolation(adapters_on(base))


def test_a_base_that_mixes_rows_is_refused(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base in which one job's rows would see another's is refused before the first step."""
    base = load(tiny_base)
    computing, rows_by_adapter = shared_base.SharedBase(base), adapters_on(base)

    def forward(*inputs: Any, **more: Any) -> Any:
        answer, weights = sdpa_attention_forward(*inputs, **more)
        return answer.mean(dim=0, keepdim=True).expand_as(answer), weights

    monkeypatch.setattr(shared_base, "sdpa_attention_forward", forward)
    with pytest.raises(BaseError, match="disturb each other"):
        computing.check_isolation(rows_by_adapter)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [("attention_dropout", 0.1, "dropout of its own"), ("_attn_implementation", "eager", "a way of its own")],
)
def test_a_base_that_cannot_be_shared_is_refused(key: str, value: Any, sentence: str, tiny_base: Path) -> None:
    """Its own dropout would be of all jobs together, and attention that is not transformers' cannot be cut."""
    base = load(tiny_base)
    setattr(base.model.config, key, value)
    with pytest.raises(BaseError, match=sentence):
        shared_base.SharedBase(base)
