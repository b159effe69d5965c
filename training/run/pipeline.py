"""A run from files to an artifact in seven stages: load, read, score, attach, train, score, write.

Each stage is a call into the room that has its subject, with values in and values out. What fails raises before
anything is written at `job.out`.
"""

from __future__ import annotations

from dataclasses import dataclass

from training.base import load_base
from training.data.dataset import read_training_data
from training.data.form import form_of
from training.evaluation.evaluate import Scores, score
from training.evaluation.suite import suite_of
from training.methods import attach
from training.report.progress import ProgressDisplay
from training.report.step_log import LiveLog
from training.run.artifact import write_artifact
from training.run.checkpoint import Checkpoint
from training.run.distributed import Processes
from training.run.identity import run_identity
from training.run.job import Job, check
from training.run.manifest import evaluation_entry, training_entry
from training.run.peak_memory import PeakMemory
from training.run.precision import DTYPES, compute_dtype
from training.run.recorder import Recorder
from training.run.trainer import Run, Trainer

SCORING_BASE, SCORING_ADAPTER = "scoring the base", "scoring the adapter"  # titles of bars


@dataclass(frozen=True)
class Done:
    """The result of a run: how it went, the scores of the base and of the adapter, and the bytes of its weights."""

    run: Run
    before: Scores
    after: Scores
    num_bytes: int


def run_job(job: Job, display: ProgressDisplay, processes: Processes, before: Scores | None = None) -> Done | None:
    """Train a job and write its artifact; `before` are the base's scores, if they are known.

    Every process of a distributed run calls it; it returns None in those that are not the main one, which alone scores
    and writes. Raises `TrainingError` with a sentence for the user, or `OSError`; nothing is written at `job.out` then.
    """
    options = check(job)
    # Load and read.
    base = load_base(job.base, processes.device(job.device), job.cache, display.say, [job.max_length])
    data = read_training_data(job, base, job.plan.seed)
    if data.unread_note:
        display.say(data.unread_note)
    form = form_of(job.form, data)
    identity = run_identity(job, options, base, data)
    checkpoint = Checkpoint(job.out, identity)
    checkpoint.check(job.is_resumed, display.say)
    # Score the base.
    suite = suite_of(data, base, job.num_answers)
    if processes.is_main and before is None:
        before = score(base.model, suite, display.bar, SCORING_BASE)
    # Attach.
    memory = PeakMemory(base.model)
    adapter = attach(job.method, options, base, data.train_rows, job.plan.seed)
    # Train.
    dtype = compute_dtype(job.precision, base.model.device)
    trainer = Trainer(adapter, data.train_rows, job.plan, processes, data.held_rows, dtype)
    recorder = Recorder(checkpoint, LiveLog(job.out), job.plan.save_steps, processes.is_main)
    if job.is_resumed:
        recorder.restore(trainer, display.say)
    with display.training() as tell:
        run = recorder.record(trainer, tell)
    # Score what is stored, not what was trained, and write.
    done = None
    if processes.is_main and before is not None:
        base_and_peak = memory.base_and_peak()
        adapter.finalize(DTYPES[job.save_dtype])
        after = score(adapter.model, suite, display.bar, SCORING_ADAPTER)
        training = training_entry(job, options, data, run, base.num_parameters, base_and_peak, processes.size)
        evaluation = evaluation_entry(data, job.columns, before, after)
        done = Done(
            run, before, after, write_artifact(job, base, data, adapter, form, trainer.steps, training, evaluation)
        )
        checkpoint.remove()
    processes.wait()
    return done


def score_base(job: Job, display: ProgressDisplay, processes: Processes) -> Scores:
    """Score the base alone: the `before` of every job on these rows and this base. Raises `TrainingError`."""
    base = load_base(job.base, processes.device(job.device), job.cache, display.say, [job.max_length])
    data = read_training_data(job, base, job.plan.seed)
    return score(base.model, suite_of(data, base, job.num_answers), display.bar, SCORING_BASE)
