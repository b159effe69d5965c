"""The log of a run, a JSON object a step: beside the folder that the run will write while it goes on, then in it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LOG = "train.jsonl"


def lines(steps: Sequence[Step]) -> str:
    """A line a step, without what was not taken."""
    return "".join(
        json.dumps({name: value for name, value in dataclasses.asdict(step).items() if value is not None}) + "\n"
        for step in steps
    )


class LiveLog:
    """A file that can be followed (`tail -f`) while the run goes on."""

    def __init__(self, out: Path) -> None:
        self.path = out.with_name(f".{out.name}.{LOG}")
        self._num_steps = 0  # that are in the file; what another run left there is not

    def follow(self, steps: Sequence[Step]) -> None:
        """Add the steps that are not there yet; they are in the file at once."""
        with self.path.open("a" if self._num_steps else "w") as file:
            file.write(lines(steps[self._num_steps :]))
        self._num_steps = len(steps)

    def remove(self) -> None:
        """The artifact has it now, or there is none."""
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Step:
    """One step that was taken. `progress` is the share of the run, `seconds` since it began, `tokens` so far.

    `eval_loss` is there where it was taken.
    """

    number: int
    loss: float
    lr: float
    progress: float
    seconds: float
    tokens: int
    eval_loss: float | None = None
