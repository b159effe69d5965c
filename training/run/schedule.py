"""The plan of a run: its limits, its batches, and the learning rate on its way.

The learning rate is a function of the share of the run that is done, so that a run bounded by time decays as one
bounded by steps does. The defaults are those that reached 93% on ten intents in half a minute on two cores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from training.errors import OptionError
from training.options import HELP, flag, option

DEFAULT_EPOCHS = 3.0
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


@dataclass(frozen=True)
class Plan:
    """Limits, batches and learning rate of a run; a field with a help text is a flag of `manyhats train`.

    The run ends at the first of the three limits (time, epochs, steps); without any, after three epochs. A step takes
    `batch_size * gradient_accumulation_steps` rows, however many processes share them. The loss on the evaluation rows
    is taken every `eval_steps` (every epoch, if only patience is given); when it has not fallen
    `early_stopping_patience` times in turn, the run ends with the weights that were best.
    """

    lr: float = field(metadata={HELP: "learning rate at its highest (else the method's own)"})
    max_seconds: float | None = option(None, "stop after so many seconds")
    epochs: float | None = option(None, "stop after so many passes (3 if no limit is given)")
    steps: int | None = option(None, "stop after so many steps")
    batch_size: int = option(8, "rows at a time, over all processes")
    gradient_accumulation_steps: int = option(1, "how many times, before a step is taken")
    gradient_checkpointing: bool = option(False, "compute activations again: less memory, more time")
    eval_steps: int | None = option(None, "take the loss on the evaluation rows every so many steps")
    early_stopping_patience: int | None = option(
        None, "stop when that has not fallen so many times (each epoch, or --eval-steps)"
    )
    save_steps: int = option(100, "keep a checkpoint for --resume every so many steps")
    warmup: float = 0.08  # share of the run in which the learning rate rises
    floor: float = 0.05  # share of `lr` at the beginning and at the end
    weight_decay: float = 0.0
    clip: float = 1.0  # largest norm of a step's gradients
    seed: int = option(0, "the same seed, the same weights")

    def __post_init__(self) -> None:
        """Raise `OptionError` naming the option whose value is not above 0."""
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise OptionError(f"{flag(name)} must be a number above 0, not {value}.")

    @property
    def rows_per_step(self) -> int:
        """Rows of a step, of all processes together."""
        return self.batch_size * self.gradient_accumulation_steps

    def num_steps(self, per_epoch: int) -> int | None:
        """Return the most steps there can be, or None if time alone bounds the run."""
        epochs = DEFAULT_EPOCHS if self.max_seconds == self.epochs == self.steps else self.epochs
        limits = [] if epochs is None else [max(1, round(epochs * per_epoch))]
        return min([*limits, *([] if self.steps is None else [self.steps])], default=None)

    def lr_at(self, progress: float) -> float:
        """Return the learning rate at a share [0, 1] of the run: up during `warmup`, then linearly down to `floor`."""
        if progress < self.warmup:
            return self.lr * max(progress / self.warmup, self.floor)
        done = (min(progress, 1.0) - self.warmup) / max(1.0 - self.warmup, 1e-9)
        return self.lr * (1.0 - (1.0 - self.floor) * done)

    def is_eval(self, step: int, per_epoch: int) -> bool:
        """Tell whether the loss on the evaluation rows is taken after so many steps."""
        every = self.eval_steps or (per_epoch if self.early_stopping_patience else None)
        return every is not None and step % every == 0
