"""A run that was killed and goes on ends as the one that was never broken, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters_store.format.folder import WEIGHTS
from tests.training.conftest import flags
from training.base import load_base
from training.data.dataset import TokenizedRow
from training.methods import METHODS, attach, options_of
from training.report.step_log import Step
from training.run.distributed import Processes
from training.run.schedule import Plan
from training.run.trainer import Trainer

ROWS = [
    TokenizedRow((*b"Colour: ", 97 + i, 10, *answer, 257), 10, i + 1) for i, answer in enumerate([b"warm", b"cold"] * 8)
]
OPTIONS: dict[str, dict[str, Any]] = {"lora": {"dropout": 0.2}, "adalora": {"target_r": 3}}
STEPS, BROKEN_AT = 12, 7


class BrokenError(Exception):
    """The run ends here."""


def trainer_of(name: str, base: Path) -> tuple[Any, Trainer]:
    """Return a method's adapter on a base of its own, and its trainer."""
    loaded = load_base(str(base), "cpu", None, lambda _message: None)
    adapter = attach(name, options_of(name, OPTIONS.get(name, {})), loaded, ROWS, seed=0)
    plan = Plan(lr=0.01, steps=STEPS, batch_size=3, eval_steps=2, early_stopping_patience=9)
    return adapter, Trainer(adapter, ROWS, plan, Processes(is_cpu=True), ROWS[:4])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_goes_on_as_if_never_broken(name: str, biased_base: Path, tmp_path: Path) -> None:
    """The rest of a run, from a state that was written and read again, is what it would have been."""
    whole, unbroken = trainer_of(name, biased_base)
    run = unbroken.run()
    broken = trainer_of(name, biased_base)[1]

    def interrupt(step: Step) -> None:
        if step.number == BROKEN_AT:
            torch.save(broken.state(), tmp_path / "state")
            raise BrokenError

    with pytest.raises(BrokenError):
        broken.run(interrupt)
    resumed, going_on = trainer_of(name, biased_base)
    going_on.restore(torch.load(tmp_path / "state", weights_only=True))
    assert going_on.run().kept_step == run.kept_step
    assert [step.loss for step in going_on.steps] == [step.loss for step in unbroken.steps]
    for adapter in (whole, resumed):
        adapter.finalize(torch.float32)
    assert resumed.config() == whole.config()
    ours, theirs = resumed.tensors(), whole.tensors()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_kill_9_and_resume(tiny_base: Path, data: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    """After a real SIGKILL in the middle, --resume ends with the same weights, bitwise, and a log of all steps."""
    more = ["--steps", 300, "--save-steps", 20, "--dropout", 0.1]
    wanted, out = tmp_path / "unbroken", tmp_path / "out"
    assert command(*flags(tiny_base, data, wanted, *more)).exit_code == 0
    checkpoint = _kill_after_checkpoint(flags(tiny_base, data, out, *more), out)
    assert not out.exists()
    log = out.with_name(f".{out.name}.train.jsonl")
    assert [json.loads(line)["number"] for line in log.read_text().splitlines()][:20] == list(range(1, 21))
    refused = command(*flags(tiny_base, data, out, *more))
    assert refused.exit_code == 1 and "--resume" in refused.output
    other = command(*flags(tiny_base, data, out, *more, "--seed", 1, "--resume"))
    assert other.exit_code == 1 and "--seed was 0" in " ".join(other.output.split())
    result = command(*flags(tiny_base, data, out, *more, "--resume"))
    assert result.exit_code == 0 and "going on after step" in result.output, result.output
    assert not checkpoint.exists() and not log.exists()
    ours, theirs = (load_file(folder / WEIGHTS) for folder in (out, wanted))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    numbers = [json.loads(line)["number"] for line in (out / "train.jsonl").read_text().splitlines()]
    assert numbers == list(range(1, 301))


def _kill_after_checkpoint(chosen: list[object], out: Path) -> Path:
    """Start a run, and kill it once it has written a checkpoint."""
    checkpoint = out.with_name(f".{out.name}.checkpoint")
    run = subprocess.Popen(
        [sys.executable, "-m", "training", *map(str, chosen)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    try:
        while not checkpoint.exists():
            assert run.poll() is None, "the run ended before it wrote a checkpoint"
            time.sleep(0.01)
    finally:
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
    return checkpoint


def test_resume_without_a_checkpoint_begins_anew(
    tiny_base: Path, data: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    """A run that was killed before its first checkpoint loses nothing but time, and says so."""
    result = command(*flags(tiny_base, data, tmp_path / "out", "--steps", 1, "--resume"))
    assert result.exit_code == 0 and "begins anew" in result.output


def test_a_checkpoint_that_cannot_be_read_is_named(
    tiny_base: Path, data: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    """Foreign bytes are no checkpoint; nothing in them is run."""
    (tmp_path / ".out.checkpoint").write_bytes(b"nonsense")
    result = command(*flags(tiny_base, data, tmp_path / "out", "--steps", 1, "--resume"))
    assert result.exit_code == 1 and "is no checkpoint" in " ".join(result.output.split())
