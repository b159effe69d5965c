"""One run from files to an artifact: load, score the base, train, score again, prove, write whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save

from adapters_store.errors import ArtifactError
from adapters_store.format.folder import FORMAT_VERSION, Artifact, write_folder
from adapters_store.format.manifest import Manifest
from adapters_store.methods import method_of
from adapters_store.methods.compile import compile_patch
from training.base import Base, load_base
from training.data.dataset import Dataset, TrainingData, check_varied, hold_out, read_dataset, tokenise
from training.errors import DivergedError, OptionError
from training.evaluation.evaluate import Scores, Suite, evaluate, suite_of
from training.evaluation.parity import parity
from training.methods import METHODS, attach
from training.methods.trainable import TrainableAdapter
from training.report.curves import draw
from training.report.progress import ProgressDisplay
from training.report.step_log import LOG, LiveLog, Step, lines
from training.run import manifest
from training.run.checkpoint import Checkpoint
from training.run.distributed import Processes
from training.run.job import CURVES, DTYPE_OF_PRECISION, Done, Job, check
from training.run.peak_memory import PeakMemory
from training.run.trainer import Run, Trainer

BASE = "scoring the base"
NUDGE = 1e-3  # what a hat is changed by to see whether the server would take it


@dataclass(frozen=True)
class PreparedJob:
    """A job that can be trained: what was loaded for it, and the base's scores, which the main process has."""

    job: Job
    options: Any
    base: Base
    rows: TrainingData
    suite: Suite
    checkpoint: Checkpoint
    log: LiveLog
    before: Scores | None
    adapter: TrainableAdapter
    memory: PeakMemory
    trainer: Trainer
    num_jobs: int


def run_job(job: Job, display: ProgressDisplay, processes: Processes, before: Scores | None = None) -> Done | None:
    """Train, and write the artifact; None for a process that is not the main one. `before` are the base's known scores.

    Raises `TrainingError` with a sentence; then nothing is written at `job.out`.
    """
    options = check(job)
    base = load_base(job.base, processes.device(job.device), job.cache, display.say)
    ready = prepare(job, options, base, display, processes, scores_of=None if before is None else lambda _suite: before)
    with display.training() as tell, forgotten_if_failed(ready):
        run = ready.trainer.run(on_step(ready, tell, processes))
    done = finish(ready, run, display, processes)
    processes.wait()
    return done


def prepare(
    job: Job,
    options: Any,
    base: Base,
    display: ProgressDisplay,
    processes: Processes,
    clock: Callable[[], float] = time.monotonic,
    num_jobs: int = 1,
    scores_of: Callable[[Suite], Scores] | None = None,
) -> PreparedJob:
    """Read its rows, score the base, put the hat on, and go on from a checkpoint if there is one to go on from.

    `num_jobs` train together in this process; `scores_of` knows the base's scores, or takes them.
    """
    rows = _rows(job, base)
    checkpoint = Checkpoint(job.out, manifest.identity(job, options, base, rows))
    _check_checkpoint(job, checkpoint, display)
    suite, before = suite_of(rows, base, job.num_answers), None
    if processes.is_main:
        before = score(base.model, suite, display, BASE) if scores_of is None else scores_of(suite)
    base.touch()
    num_base = sum(parameter.numel() for parameter in base.model.parameters())
    memory = PeakMemory(base.model.device)
    adapter = _attach(job, options, base, rows)
    dtype = dtype_of(job.precision, base)
    trainer = Trainer(adapter, rows.train_rows, job.plan, processes, rows.held_rows, num_base, dtype, clock)
    if job.is_resumed and checkpoint.exists():
        trainer.restore(checkpoint.load())
        display.say(f"going on after step {len(trainer.steps)}")
    log = LiveLog(job.out)
    return PreparedJob(job, options, base, rows, suite, checkpoint, log, before, adapter, memory, trainer, num_jobs)


def score_base(job: Job, display: ProgressDisplay, processes: Processes) -> Scores:
    """What every job on these rows and this base has as its `before`. Raises `TrainingError`."""
    base = load_base(job.base, processes.device(job.device), job.cache, display.say)
    return score(base.model, suite_of(_rows(job, base), base, job.num_answers), display, BASE)


def on_step(ready: PreparedJob, tell: Callable[[Step], None], processes: Processes) -> Callable[[Step], None]:
    """What is done after each step: it is told and logged, and now and then the run is kept."""

    def do(step: Step) -> None:
        tell(step)
        if not processes.is_main:
            return
        ready.log.follow(ready.trainer.steps)
        if step.number % ready.job.plan.save_steps == 0:
            ready.checkpoint.save(ready.trainer.state())

    return do


@contextmanager
def forgotten_if_failed(ready: PreparedJob) -> Iterator[None]:
    """A run that failed leaves no log, and one that diverged no checkpoint: it would diverge again."""
    try:
        yield
    except Exception as error:
        ready.log.remove()
        if isinstance(error, DivergedError):
            ready.checkpoint.remove()
        raise


def finish(ready: PreparedJob, run: Run, display: ProgressDisplay, processes: Processes) -> Done | None:
    """Score and prove what is stored, not what was trained, and write it: the main process does."""
    job, base, adapter, rows = ready.job, ready.base, ready.adapter, ready.rows
    if ready.before is None:
        return None
    ready.log.remove()
    memory = (ready.memory.base, ready.memory.peak())
    training = manifest.of_run(job, ready.options, rows, run, memory, processes.size)
    adapter.finalize(DTYPE_OF_PRECISION[job.save_dtype])
    after = score(adapter.model, ready.suite, display, "scoring the adapter")
    written = Manifest(
        format_version=FORMAT_VERSION,
        method=_server_name(job.method, adapter),
        base=base.ref,
        prompt_format=None if rows.train.is_chat else job.template.prompt_format(),
        parity=parity(adapter.model, rows.held_rows, rows.train_rows, base.tokenizer.eos_token_id),
        training={**training, "num_jobs": ready.num_jobs},
        evaluation=manifest.of_scores(rows, job.columns, ready.before, after),
    )
    num_bytes = _write(job, adapter, written, ready.trainer.steps)
    ready.checkpoint.remove()
    return Done(run, ready.before, after, num_bytes)


def _attach(job: Job, options: Any, base: Base, rows: TrainingData) -> TrainableAdapter:
    torch.manual_seed(job.plan.seed)
    adapter = attach(job.method, options, base, rows.train_rows)
    if METHODS[job.method].is_uploadable:
        _check_form(adapter, base)
    return adapter


def _rows(job: Job, base: Base) -> TrainingData:
    train, held = _datasets(job, base.tokenizer)
    max_length = min(job.max_length, base.spec.max_positions)
    return TrainingData(train, held, *(tokenise(part, base.tokenizer, max_length) for part in (train, held)))


def _datasets(job: Job, tokenizer: Any) -> tuple[Dataset, Dataset]:
    train = read_dataset(job.data, job.columns, job.template, tokenizer)
    check_varied(train)
    if job.eval is None:
        return hold_out(train, job.plan.seed)
    return train, read_dataset(job.eval, job.columns, job.template, tokenizer)


def _check_checkpoint(job: Job, checkpoint: Checkpoint, display: ProgressDisplay) -> None:
    if job.is_resumed and not checkpoint.exists():
        display.say(f"--resume: there is no {checkpoint.path}, so the run begins anew.")
    if checkpoint.exists() and not job.is_resumed:
        raise OptionError(
            f"{checkpoint.path} is what a run to this --out left: go on with --resume, or delete it and begin anew."
        )


def score(model: Any, suite: Suite, display: ProgressDisplay, what: str) -> Scores:
    """Behind a bar."""
    with display.bar(what, suite.size) as more:
        return evaluate(model, suite, more)


def _check_form(adapter: TrainableAdapter, base: Base) -> None:
    """Raise `OptionError` where the server would not take what this run is going to write."""
    tensors = {name: tensor.detach().cpu() + NUDGE for name, tensor in adapter.tensors().items()}
    try:
        compile_patch(Artifact(adapter.config(), tensors, None, "", 0), base.spec)
    except ArtifactError as error:
        raise OptionError(f"The server would not take this adapter: {error}.") from error


def dtype_of(precision: str, base: Base) -> torch.dtype:
    """`auto` is bf16 where the device computes in it; on a CPU it is slower than fp32."""
    if precision == "auto":
        has_bf16 = base.model.device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_bf16 else torch.float32
    return DTYPE_OF_PRECISION[precision]


def _server_name(method: str, adapter: TrainableAdapter) -> str:
    """What the server calls the method; `full` is none of its."""
    if not METHODS[method].is_uploadable:
        return method
    return method_of(Artifact(adapter.config(), {}, None, "", 0)).name


def _write(job: Job, adapter: TrainableAdapter, manifest: Manifest, steps: Sequence[Step]) -> int:
    """The folder with log and curves among its files; the bytes of its weights."""
    tensors = adapter.tensors()
    stored = {
        name: tensors[name].detach().to("cpu", DTYPE_OF_PRECISION[job.save_dtype]).contiguous()
        for name in sorted(tensors)
    }
    weights = save(stored, metadata={"format": "pt"})
    curves = draw(steps, f"{job.method} on {job.data.name}")
    write_folder(job.out, adapter.config(), weights, manifest, {LOG: lines(steps).encode(), CURVES: curves})
    return len(weights)
