"""The files that a run keeps beside its output folder while it goes on: its log, and a checkpoint to resume from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.errors import DivergedError, OptionError
from training.report.step_log import LiveLog, Step
from training.run.checkpoint import Checkpoint
from training.run.trainer import Run, Trainer

Tell = Callable[[Step], None]


class Recorder:
    """Logs every step of a run and saves a checkpoint now and then; only the main process writes.

    `identity` is everything that the run's weights depend on, which a checkpoint must agree with.
    """

    def __init__(self, out: Path, identity: dict[str, Any], save_steps: int, is_main: bool) -> None:
        self._checkpoint, self._log = Checkpoint(out, identity), LiveLog(out)
        self._save_steps, self._is_main = save_steps, is_main

    def check(self, is_resumed: bool, say: Callable[[str], None]) -> None:
        """Say if there is nothing to resume. Raises `OptionError` if a new run would lose a checkpoint."""
        path, exists = self._checkpoint.path, self._checkpoint.exists()
        if is_resumed and not exists:
            say(f"--resume: there is no {path}, so the run begins anew.")
        if exists and not is_resumed:
            raise OptionError(
                f"{path} is what a run to this --out left: go on with --resume, or delete it and begin anew."
            )

    def restore(self, trainer: Trainer, say: Callable[[str], None]) -> None:
        """Resume from the checkpoint, if there is one. Raises `OptionError` if it is another run's."""
        if self._checkpoint.exists():
            trainer.restore(self._checkpoint.load())
            say(f"going on after step {len(trainer.steps)}")

    def record(self, trainer: Trainer, tell: Tell) -> Run:
        """Train to the end, and tell and record each step. Raises `DivergedError`."""
        with self.removing_if_failed():
            return trainer.run(lambda step: self.on_step(trainer, step, tell))

    def on_step(self, trainer: Trainer, step: Step, tell: Tell) -> None:
        """Tell of a step that was taken, add it to the log, and save a checkpoint if it is time."""
        tell(step)
        if not self._is_main:
            return
        self._log.follow(trainer.steps)
        if step.number % self._save_steps == 0:
            self._checkpoint.save(trainer.state())

    @contextmanager
    def removing_if_failed(self) -> Iterator[None]:
        """Remove the log of a run that failed, and the checkpoint of one that diverged: it would diverge again."""
        try:
            yield
        except Exception as error:
            self._log.remove()
            if isinstance(error, DivergedError):
                self._checkpoint.remove()
            raise

    def end_log(self) -> None:
        """Remove the log: the artifact will have it."""
        self._log.remove()

    def end(self) -> None:
        """Remove the checkpoint: the artifact is written."""
        self._checkpoint.remove()
