"""The loop: batches in length buckets, the loss on completions alone, AdamW, warm-up and a linear decay.

The learning rate is a function of the share of the run that is done, so that a run bounded by time decays as one
bounded by steps does. The settings are those that reached 93% on ten intents in half a minute on two cores.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from training.batch import label_logits, make_batch
from training.data import Row, batches
from training.errors import DivergedError, OptionError

DEFAULT_EPOCHS = 3.0


@dataclass(frozen=True)
class Plan:
    """How long and how to train; of the three limits the first one reached ends the run. None of them: three epochs."""

    max_seconds: float | None = None
    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 8
    lr: float = 3e-3
    warmup: float = 0.08
    floor: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0

    def num_steps(self, per_epoch: int) -> int | None:
        """The most steps, or None when time alone bounds the run."""
        epochs = DEFAULT_EPOCHS if self.max_seconds == self.epochs == self.steps else self.epochs
        limits = [] if epochs is None else [max(1, round(epochs * per_epoch))]
        return min([*limits, *([] if self.steps is None else [self.steps])], default=None)

    def lr_at(self, progress: float) -> float:
        """The learning rate at a share [0, 1] of the run: up during `warmup`, then linearly down to `floor` of `lr`."""
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        done = (min(progress, 1.0) - self.warmup) / max(1.0 - self.warmup, 1e-9)
        return self.lr * (1.0 - (1.0 - self.floor) * done)


def check_plan(plan: Plan) -> None:
    """Raise `OptionError` naming the option that cannot be meant."""
    for name in ("max_seconds", "epochs", "steps", "batch_size", "lr"):
        value = getattr(plan, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise OptionError(f"--{name.replace('_', '-')} must be a number above 0, not {value}.")


@dataclass(frozen=True)
class Step:
    """One step that was taken. `progress` is the share of the run, `seconds` since it began, `tokens` so far."""

    number: int
    loss: float
    lr: float
    progress: float
    seconds: float
    tokens: int


@dataclass(frozen=True)
class Run:
    """A finished run. `loss` is the mean over its last tenth of steps."""

    steps: int
    epochs: float
    seconds: float
    tokens: int
    loss: float
    num_trained: int
    num_parameters: int


class Trainer:
    """Trains the parameters of `model` that require a gradient on `rows`, on the model's device."""

    def __init__(
        self, model: Any, rows: Sequence[Row], plan: Plan, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._model, self._rows, self._plan, self._clock = model, rows, plan, clock
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=plan.lr, weight_decay=plan.weight_decay)
        self._per_epoch = math.ceil(len(rows) / plan.batch_size)
        self._num_steps = plan.num_steps(self._per_epoch)
        self._began = 0.0

    def run(self, on_step: Callable[[Step], None] = lambda _step: None) -> Run:
        """Train to the first limit of the plan, at least one step. Raises `DivergedError` if the loss is no number."""
        self._began, tokens = self._clock(), 0
        losses: list[float] = []
        self._model.train()
        for number, rows in enumerate(self._stream()):
            progress = self._progress(number)
            if number and progress >= 1.0:  # the first step is always taken, however short the time
                break
            lr = self._plan.lr_at(max(progress, self._progress_of_steps(number + 1)))
            losses.append(self._step(number, rows, lr))
            tokens += sum(len(row.ids) for row in rows)
            seconds = self._clock() - self._began
            on_step(Step(number + 1, losses[-1], lr, min(self._progress(number + 1), 1.0), seconds, tokens))
        self._model.eval()
        return self._summary(losses, tokens)

    def _stream(self) -> Iterator[list[Row]]:
        epoch = 0
        while True:
            yield from batches(self._rows, self._plan.batch_size, self._plan.seed, epoch)
            epoch += 1

    def _progress(self, number: int) -> float:
        """The share of the run that is done before step `number` (from 0)."""
        by_time = (self._clock() - self._began) / self._plan.max_seconds if self._plan.max_seconds else 0.0
        return max(by_time, self._progress_of_steps(number))

    def _progress_of_steps(self, number: int) -> float:
        return number / self._num_steps if self._num_steps else 0.0

    def _step(self, number: int, rows: list[Row], lr: float) -> float:
        batch = make_batch(rows, self._trained[0].device)
        loss = cross_entropy(label_logits(self._model, batch), batch.targets)
        value = loss.item()
        if not math.isfinite(value):
            raise self._diverged(number, rows, f"The loss became {value}")
        self._optimizer.zero_grad()
        loss.backward()
        norm = clip_grad_norm_(self._trained, self._plan.clip).item()
        if not math.isfinite(norm):
            raise self._diverged(number, rows, f"The gradient's norm became {norm}")
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        return value

    def _diverged(self, number: int, rows: list[Row], what: str) -> DivergedError:
        lines = ", ".join(str(row.line) for row in sorted(rows, key=lambda row: row.line))
        return DivergedError(
            f"{what} at step {number + 1}, in the batch of lines {lines}: lower --lr (now {self._plan.lr:g}), "
            "or look at those lines."
        )

    def _summary(self, losses: list[float], tokens: int) -> Run:
        tail = losses[-max(1, len(losses) // 10) :]
        return Run(
            steps=len(losses),
            epochs=round(len(losses) / self._per_epoch, 3),
            seconds=self._clock() - self._began,
            tokens=tokens,
            loss=sum(tail) / len(tail),
            num_trained=sum(parameter.numel() for parameter in self._trained),
            num_parameters=sum(parameter.numel() for parameter in self._model.parameters()),
        )
