"""The training loop: batches in length buckets, the loss on completions alone, AdamW.

A step is a function of what is trained, the optimizer's moments and the step's number: the rows, the dropout and, where
steps bound the run, the learning rate follow from the number and the seed. So a run that goes on from a checkpoint ends
as one that was never broken, bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from training.data.batch import label_logits, make_batch
from training.data.dataset import TokenizedRow, batches
from training.errors import DivergedError
from training.methods.trainable import TrainableAdapter
from training.report.step_log import Step
from training.run.distributed import Processes
from training.run.schedule import Plan

EVAL_BATCH = 16


@dataclass(frozen=True)
class PendingStep:
    """A step that is to be taken: its number (from 0), rows, learning rate, and the seed of its dropout.

    `parts` are this process's rows, one part for each time that gradients are accumulated.
    """

    number: int
    rows: list[TokenizedRow]
    parts: list[Sequence[TokenizedRow]]
    lr: float
    seed: int

    @property
    def num_labels(self) -> int:
        """Number of tokens that the loss is the mean over."""
        return sum(len(row.completion) for row in self.rows)


@dataclass(frozen=True)
class Run:
    """A finished run. `loss` is the mean over its last tenth of steps; `kept_step` is whose weights were kept."""

    steps: int
    epochs: float
    seconds: float
    tokens: int
    loss: float
    kept_step: int
    num_trained: int


@dataclass
class Best:
    """The least loss on the evaluation rows, the weights that had it, and how often in turn it has not fallen since."""

    loss: float
    step: int
    weights: list[Tensor]
    num_worse: int = 0


class Trainer:
    """Trains an adapter on `rows`, on the adapter's device; `held` are the evaluation rows.

    `run` does it all. A caller that computes gradients itself (`training.joint`: those of many adapters at once) calls
    `begin`, then `next_pending` and `take` alternately until no step is pending, and then `end`.
    """

    def __init__(
        self,
        adapter: TrainableAdapter,
        rows: Sequence[TokenizedRow],
        plan: Plan,
        processes: Processes,
        held: Sequence[TokenizedRow] = (),
        dtype: torch.dtype = torch.float32,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._adapter, self._rows, self._plan, self._held = adapter, rows, plan, held
        self._processes, self._dtype, self._clock = processes, dtype, clock
        self._per_epoch = math.ceil(len(rows) / plan.rows_per_step)
        self._num_steps = plan.num_steps(self._per_epoch)
        self._trained = adapter.trained()
        self._optimizer = torch.optim.AdamW(self._trained, lr=plan.lr, weight_decay=plan.weight_decay)
        self._best: Best | None = None
        self._before = 0.0  # seconds of the run before it was killed
        self._began = clock()
        self._stream: Iterator[list[TokenizedRow]] = iter(())
        self.steps: list[Step] = []
        adapter.begin(self._num_steps)
        if plan.gradient_checkpointing:
            adapter.checkpoint_activations()

    def run(self, on_step: Callable[[Step], None] = lambda _step: None) -> Run:
        """Train to the first limit of the plan, at least one step. Raises `DivergedError` if the loss is no number."""
        self.begin()
        while (pending := self.next_pending()) is not None:
            torch.manual_seed(pending.seed)
            on_step(self.take(pending, sum(self._backward(part, pending.num_labels) for part in pending.parts)))
        return self.end()

    def begin(self) -> None:
        """Start the clock and the iteration over rows."""
        self._began = self._clock()
        self._stream = self._rows_from(len(self.steps))
        self._adapter.model.train()

    def next_pending(self) -> PendingStep | None:
        """Return the step to take now, or None if the run has reached its end."""
        number = len(self.steps)
        progress = self._progress(number)
        if self._is_enough() or (number and progress >= 1.0):  # the first step is always taken, however short the time
            return None
        lr = self._plan.lr_at(max(progress, self._progress_of_steps(number + 1)))
        rows = next(self._stream)
        return PendingStep(number, rows, self._parts(rows), lr, hash((self._plan.seed, number, self._processes.rank)))

    def take(self, pending: PendingStep, loss: float) -> Step:
        """Take a step whose gradients are there; `loss` is the mean over its label tokens. Raises `DivergedError`."""
        (loss,) = self._processes.sum(loss + self._penalise())
        if not math.isfinite(loss):
            raise self._diverged(pending, f"The loss became {loss}")
        self._processes.sum_gradients(self._trained)
        norm = clip_grad_norm_(self._trained, self._plan.clip).item()
        if not math.isfinite(norm):
            raise self._diverged(pending, f"The gradient's norm became {norm}")
        for group in self._optimizer.param_groups:
            group["lr"] = pending.lr
        self._optimizer.step()
        self._adapter.after_step(pending.number)
        self._optimizer.zero_grad()
        self.steps.append(self._taken(pending, loss))
        return self.steps[-1]

    def end(self) -> Run:
        """Leave the adapter with its last weights, or with early stopping the best; return how the run went."""
        self._adapter.model.eval()
        self._keep_best()
        return self._summary()

    def state(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on."""
        return {
            "trained": [parameter.detach() for parameter in self._trained],
            "optimizer": self._optimizer.state_dict(),
            "hat": self._adapter.state(),  # a key of checkpoints
            "best": None if self._best is None else dataclasses.asdict(self._best),
            "steps": [dataclasses.asdict(step) for step in self.steps],
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Go on from the `state` of an equal run."""
        for parameter, value in zip(self._trained, state["trained"], strict=True):
            parameter.copy_(value)
        self._optimizer.load_state_dict(state["optimizer"])
        self._adapter.restore(state["hat"])
        self._best = None if state["best"] is None else Best(**state["best"])
        self.steps = [Step(**step) for step in state["steps"]]
        self._before = self.steps[-1].seconds

    def _rows_from(self, number: int) -> Iterator[list[TokenizedRow]]:
        """Iterate over every step's rows, from step `number` on."""
        epoch, place = divmod(number, self._per_epoch)
        while True:
            yield from batches(self._rows, self._plan.rows_per_step, self._plan.seed, epoch)[place:]
            epoch, place = epoch + 1, 0

    def _seconds(self) -> float:
        return self._before + self._clock() - self._began

    def _progress(self, number: int) -> float:
        """Return the share of the run that is done before step `number` (from 0), the same for every process."""
        by_time = self._seconds() / self._plan.max_seconds if self._plan.max_seconds else 0.0
        if self._plan.max_seconds:
            by_time = self._processes.agree(by_time)
        return max(by_time, self._progress_of_steps(number))

    def _progress_of_steps(self, number: int) -> float:
        return number / self._num_steps if self._num_steps else 0.0

    def _parts(self, rows: list[TokenizedRow]) -> list[Sequence[TokenizedRow]]:
        mine = self._processes.share(rows)
        size = math.ceil(self._plan.batch_size / self._processes.size)
        return [mine[i : i + size] for i in range(0, len(mine), size)]

    def _backward(self, rows: Sequence[TokenizedRow], num_labels: int) -> float:
        loss = self._loss(rows) / num_labels
        loss.backward()
        return loss.item()

    def _loss(self, rows: Sequence[TokenizedRow]) -> Tensor:
        """Return the loss, summed over the rows' label tokens."""
        batch = make_batch(rows, self._trained[0].device)
        with torch.autocast(batch.ids.device.type, self._dtype, enabled=self._dtype != torch.float32):
            logits = label_logits(self._adapter.model, batch)
        return cross_entropy(logits, batch.targets, reduction="sum")

    def _penalise(self) -> float:
        penalty = self._adapter.penalty() if self._processes.is_main else None
        if penalty is None:
            return 0.0
        penalty.backward()
        return penalty.item()

    def _taken(self, pending: PendingStep, loss: float) -> Step:
        number = pending.number + 1
        tokens = sum(len(row.ids) for row in pending.rows) + (self.steps[-1].tokens if self.steps else 0)
        eval_loss = self._evaluate(number) if self._plan.is_eval(number, self._per_epoch) else None
        progress = min(self._progress(number), 1.0)
        return Step(number, loss, pending.lr, progress, self._seconds(), tokens, eval_loss)

    def _evaluate(self, step: int) -> float:
        """Return the mean loss on the evaluation rows; with early stopping, remember the best weights so far."""
        self._adapter.model.eval()
        mine = sorted(self._processes.share(self._held), key=lambda row: len(row.ids))
        with torch.inference_mode():
            parts = [mine[i : i + EVAL_BATCH] for i in range(0, len(mine), EVAL_BATCH)]
            (total,) = self._processes.sum(sum(self._loss(part).item() for part in parts))
        self._adapter.model.train()
        loss = total / sum(len(row.completion) for row in self._held)
        if self._plan.early_stopping_patience is not None:
            if self._best is None or loss < self._best.loss:
                self._best = Best(loss, step, [parameter.detach().clone() for parameter in self._trained])
            else:
                self._best.num_worse += 1
        return loss

    def _is_enough(self) -> bool:
        patience = self._plan.early_stopping_patience
        return patience is not None and self._best is not None and self._best.num_worse >= patience

    @torch.no_grad()
    def _keep_best(self) -> None:
        if self._best is not None:
            for parameter, value in zip(self._trained, self._best.weights, strict=True):
                parameter.copy_(value)

    def _diverged(self, pending: PendingStep, what: str) -> DivergedError:
        lines = ", ".join(str(row.line) for row in sorted(pending.rows, key=lambda row: row.line))
        return DivergedError(
            f"{what} at step {pending.number + 1}, in the batch of lines {lines}: lower --lr (now {self._plan.lr:g}), "
            "or look at those lines."
        )

    def _summary(self) -> Run:
        losses, last = [step.loss for step in self.steps], self.steps[-1]
        tail = losses[-max(1, len(losses) // 10) :]
        return Run(
            steps=len(losses),
            epochs=round(len(losses) / self._per_epoch, 3),
            seconds=last.seconds,
            tokens=last.tokens,
            loss=sum(tail) / len(tail),
            kept_step=self._best.step if self._best else len(losses),
            num_trained=sum(parameter.numel() for parameter in self._trained),
        )
