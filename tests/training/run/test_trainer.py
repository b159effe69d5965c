"""The loop: how a step is shared and split, when it ends, and what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaMLP

from adapters_store.format.folder import WEIGHTS, read_folder
from tests.training.conftest import flags
from training.base import load_base
from training.data.dataset import TokenizedRow, batches
from training.methods import attach, options_of
from training.run.distributed import Processes
from training.run.schedule import Plan
from training.run.trainer import Trainer

ROWS = [
    TokenizedRow((*b"Colour: ", *[97 + i] * (1 + i % 5), 10, *answer, 257), 10 + i % 5, i + 1)
    for i, answer in enumerate([b"warm", b"cold", b"hot"] * 6)
]


def run_of(
    base: Path, rows: list[TokenizedRow] = ROWS, held: list[TokenizedRow] = ROWS[:5], **plan: Any
) -> tuple[Any, Trainer]:
    """A finished run of a LoRA."""
    loaded = load_base(str(base), "cpu", None, lambda _message: None)
    adapter = attach("lora", options_of("lora", {}), loaded, rows, seed=0)
    trainer = Trainer(adapter, rows, Plan(**{"lr": 0.01, "steps": 6, **plan}), Processes(is_cpu=True), held)
    trainer.run()
    return adapter, trainer


def assert_near(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], within: float) -> None:
    assert ours.keys() == theirs.keys()
    assert max((ours[key] - theirs[key]).abs().max().item() for key in ours) < within


def test_accumulated_parts_are_one_batch(tiny_base: Path) -> None:
    """Rows that are summed part by part train as all of them at once: every label token counts the same."""
    whole, parts = run_of(tiny_base, batch_size=6)[0], run_of(tiny_base, batch_size=2, gradient_accumulation_steps=3)[0]
    assert_near(parts.tensors(), whole.tensors(), within=1e-4)


def test_activations_that_are_computed_again_change_nothing(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--gradient-checkpointing computes the feed-forward blocks twice, and trains the same weights."""
    real, calls = LlamaMLP.forward, list[int]()

    def counted(self: LlamaMLP, hidden: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        out: torch.Tensor = real(self, hidden)
        return out

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    kept, num_kept = run_of(tiny_base)[0], len(calls)
    again = run_of(tiny_base, gradient_checkpointing=True)[0]
    assert len(calls) - num_kept == 2 * num_kept
    assert_near(again.tensors(), kept.tensors(), within=1e-6)


def test_batches_are_of_like_lengths_and_hold_every_row_once() -> None:
    """An epoch is a permutation of the rows, in another order in the next one; rows in a batch are of like length."""
    many = [TokenizedRow((1,) * (3 + i % 90), 1, i) for i in range(512)]
    epochs = [batches(many, 8, seed=0, epoch=epoch) for epoch in range(2)]
    for epoch in epochs:
        assert sorted(row.line for batch in epoch for row in batch) == list(range(512))
        assert max(len(batch[-1].ids) - len(batch[0].ids) for batch in epoch) < 20
    assert epochs[0] != epochs[1] and epochs[0] == batches(many, 8, seed=0, epoch=0)


def test_it_stops_when_the_evaluation_rows_get_no_better(tiny_base: Path) -> None:
    """Early stopping ends the run, and keeps the weights that were best on the evaluation rows."""
    held = [TokenizedRow((*row.ids[: row.num_prompt], *b"none", 257), row.num_prompt, row.line) for row in ROWS]
    adapter, trainer = run_of(tiny_base, held=held, steps=200, lr=0.05, eval_steps=3, early_stopping_patience=2)
    losses = {step.number: step.eval_loss for step in trainer.steps if step.eval_loss is not None}
    best = min(losses, key=lambda number: losses[number] or 0.0)
    assert len(trainer.steps) == best + 6 < 200
    kept = run_of(tiny_base, held=held, steps=200, lr=0.05, eval_steps=best, early_stopping_patience=1)[0]
    assert_near(kept.tensors(), adapter.tensors(), within=1e-9)


def test_time_bounds_a_run(tiny_base: Path) -> None:
    """The learning rate follows the clock where time is the limit, up and then down, and the run ends with it."""
    loaded = load_base(str(tiny_base), "cpu", None, lambda _message: None)
    adapter = attach("lora", options_of("lora", {}), loaded, ROWS, seed=0)
    ticks = iter(range(1000))
    trainer = Trainer(
        adapter, ROWS, Plan(lr=1.0, max_seconds=100), Processes(is_cpu=True), clock=lambda: float(next(ticks))
    )
    trainer.run()
    rates = [step.lr for step in trainer.steps]
    peak = rates.index(max(rates))
    assert 0.9 < max(rates) <= 1.0 and rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True) and rates[-1] < 0.1
    assert trainer.steps[-1].progress > 0.95


def test_bf16_where_it_is_asked_for(tiny_base: Path, data: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    """--precision bf16 computes in bf16, learns, and still proves itself in fp32; a CPU's own choice is fp32."""
    losses = {}
    for precision in ("auto", "fp32", "bf16"):
        chosen = ["--steps", 20, "--precision", precision, "--lr", 0.01]
        result = command(*flags(tiny_base, data, tmp_path / precision, *chosen))
        assert result.exit_code == 0, result.output
        manifest = read_folder(tmp_path / precision).manifest
        assert manifest is not None
        losses[precision] = manifest.training["loss"]
    assert losses["auto"] == losses["fp32"] != losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)


# Port 0 is a free one: others may launch on this machine, too.
LAUNCH = (
    "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--main_process_port 0"
)


def test_accelerate_launch_shares_the_rows(
    tiny_base: Path, data: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    """Two processes train what one does, within 1e-5, and write it once."""
    more = ["--steps", 8, "--batch-size", 7, "--eval-steps", 4, "--method", "bottleneck"]
    assert command(*flags(tiny_base, data, tmp_path / "one", *more)).exit_code == 0
    words = [*LAUNCH.split(), "-m", "training", *flags(tiny_base, data, tmp_path / "two", *more)]
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("bytes, 8 steps") == 1, done.stderr
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
    assert_near(two, one, within=1e-5)
    one_facts, two_facts = (read_folder(tmp_path / name).manifest for name in ("one", "two"))
    assert one_facts is not None and two_facts is not None
    assert two_facts.training["num_processes"] == 2
    assert two_facts.training["loss"] == pytest.approx(one_facts.training["loss"], abs=1e-4)
