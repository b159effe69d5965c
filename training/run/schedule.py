"""How long and how to train: the limits of a run, and the learning rate on its way.

The learning rate is a function of the share of the run that is done, so that a run bounded by time decays as one
bounded by steps does. The settings are those that reached 93% on ten intents in half a minute on two cores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from training.errors import OptionError

DEFAULT_EPOCHS = 3.0


@dataclass(frozen=True)
class Plan:
    """Of the three limits the first one reached ends the run. None of them: three epochs.

    A step is of `batch_size * gradient_accumulation_steps` rows, whatever the number of processes that share them.
    Every `eval_steps` (an epoch, if only patience is given) the loss on the evaluation rows is taken; when it has not
    fallen for `early_stopping_patience` times, the run ends, with the weights that were best.
    """

    lr: float
    max_seconds: float | None = None
    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    eval_steps: int | None = None
    early_stopping_patience: int | None = None
    save_steps: int = 100
    warmup: float = 0.08
    floor: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0

    @property
    def rows_per_step(self) -> int:
        """Of all processes together."""
        return self.batch_size * self.gradient_accumulation_steps

    def num_steps(self, per_epoch: int) -> int | None:
        """The most steps, or None when time alone bounds the run."""
        epochs = DEFAULT_EPOCHS if self.max_seconds == self.epochs == self.steps else self.epochs
        limits = [] if epochs is None else [max(1, round(epochs * per_epoch))]
        return min([*limits, *([] if self.steps is None else [self.steps])], default=None)

    def lr_at(self, progress: float) -> float:
        """The rate at a share [0, 1] of the run: from `floor` of `lr` up during `warmup`, then linearly down again."""
        if progress < self.warmup:
            return self.lr * max(progress / self.warmup, self.floor)
        done = (min(progress, 1.0) - self.warmup) / max(1.0 - self.warmup, 1e-9)
        return self.lr * (1.0 - (1.0 - self.floor) * done)

    def is_eval(self, step: int, per_epoch: int) -> bool:
        """Whether the loss on the evaluation rows is taken after so many steps."""
        every = self.eval_steps or (per_epoch if self.early_stopping_patience else None)
        return every is not None and step % every == 0


POSITIVE = (
    "lr",
    "max_seconds",
    "epochs",
    "steps",
    "batch_size",
    "gradient_accumulation_steps",
    "eval_steps",
    "early_stopping_patience",
    "save_steps",
)


def check_plan(plan: Plan) -> None:
    """Raise `OptionError` naming the option that cannot be meant."""
    for name in POSITIVE:
        value = getattr(plan, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise OptionError(f"--{name.replace('_', '-')} must be a number above 0, not {value}.")
