"""The log of a run, a JSON object a step: beside the folder that the run will write while it goes on, then in it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from training.trainer import Step

LOG = "train.jsonl"


def lines(steps: Iterable[Step]) -> str:
    """A line a step, without what was not taken."""
    return "".join(
        json.dumps({name: value for name, value in dataclasses.asdict(step).items() if value is not None}) + "\n"
        for step in steps
    )


class LiveLog:
    """A file that can be followed (`tail -f`) while the run goes on."""

    def __init__(self, out: Path) -> None:
        self.path = out.with_name(f".{out.name}.{LOG}")

    def begin(self, steps: Iterable[Step]) -> None:
        """Write it anew, with the steps of a run that goes on."""
        self.path.write_text(lines(steps))

    def add(self, step: Step) -> None:
        """Add a step; it is in the file at once."""
        with self.path.open("a") as file:
            file.write(lines([step]))

    def remove(self) -> None:
        """The artifact has it now, or there is none."""
        self.path.unlink(missing_ok=True)
