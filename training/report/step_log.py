"""The log of a run, a JSON object a step: beside the output folder while the run goes on, and in it at the end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LOG = "train.jsonl"


def lines(steps: Sequence[Step]) -> str:
    """Write steps as JSON, a line each, without values that were not taken."""
    return "".join(
        json.dumps({name: value for name, value in dataclasses.asdict(step).items() if value is not None}) + "\n"
        for step in steps
    )


class LiveLog:
    """A log file that can be followed (`tail -f`) while the run goes on."""

    def __init__(self, out: Path) -> None:
        self.path = out.with_name(f".{out.name}.{LOG}")
        self._num_steps = 0  # written so far; lines of an earlier run are overwritten

    def follow(self, steps: Sequence[Step]) -> None:
        """Append the steps that are not in the file yet; they are readable at once."""
        with self.path.open("a" if self._num_steps else "w") as file:
            file.write(lines(steps[self._num_steps :]))
        self._num_steps = len(steps)

    def remove(self) -> None:
        """Delete the file: the artifact has its lines, or there is no artifact."""
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Step:
    """A step that was taken. `progress` is the share of the run, `seconds` are since it began, `tokens` so far.

    `eval_loss` is None if it was not taken after this step.
    """

    number: int
    loss: float
    lr: float
    progress: float
    seconds: float
    tokens: int
    eval_loss: float | None = None
