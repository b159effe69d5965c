"""The record of a run while it goes on: a log of its steps, and a checkpoint now and then to resume from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from training.errors import DivergedError
from training.report.step_log import LiveLog, Step
from training.run.checkpoint import Checkpoint
from training.run.trainer import Run, Trainer

Tell = Callable[[Step], None]


class Recorder:
    """Logs every step of a run and saves a checkpoint every `save_steps`; only the main process writes."""

    def __init__(self, checkpoint: Checkpoint, log: LiveLog, save_steps: int, is_main: bool) -> None:
        self._checkpoint, self._log = checkpoint, log
        self._save_steps, self._is_main = save_steps, is_main

    def restore(self, trainer: Trainer, say: Callable[[str], None]) -> None:
        """Resume from the checkpoint, if there is one. Raises `OptionError` if it is another run's."""
        if self._checkpoint.exists():
            trainer.restore(self._checkpoint.load())
            say(f"going on after step {len(trainer.steps)}")

    def record(self, trainer: Trainer, tell: Tell) -> Run:
        """Train to the end, and tell and record each step. Raises `DivergedError`."""
        with self.cleaning_up():
            run = trainer.run(lambda step: self.on_step(trainer, step, tell))
        self.end_log()
        return run

    def on_step(self, trainer: Trainer, step: Step, tell: Tell) -> None:
        """Tell of a step that was taken, add it to the log, and save a checkpoint if it is time."""
        tell(step)
        if not self._is_main:
            return
        self._log.follow(trainer.steps)
        if step.number % self._save_steps == 0:
            self._checkpoint.save(trainer.state())

    @contextmanager
    def cleaning_up(self) -> Iterator[None]:
        """Remove the log of a run that fails, and the checkpoint of one that diverges: it would diverge again."""
        try:
            yield
        except Exception as error:
            self._log.remove()
            if isinstance(error, DivergedError):
                self._checkpoint.remove()
            raise

    def end_log(self) -> None:
        """Remove the log of a run that has ended: the artifact will hold its lines."""
        if self._is_main:
            self._log.remove()
