"""What a manifest says of a run for people, and what a checkpoint must agree with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import time
from typing import TYPE_CHECKING, Any

import torch

from training.base import Base
from training.data.dataset import Columns, Dataset, TrainingData
from training.evaluation.evaluate import Scores
from training.methods import flag
from training.run.trainer import Run

if TYPE_CHECKING:
    from training.run.job import Job


def identity(job: Job, options: Any, base: Base, rows: TrainingData) -> dict[str, Any]:
    """All that the weights depend on, by the flag or word that a sentence can name it by, as JSON has it."""
    chosen = {**dataclasses.asdict(options), **dataclasses.asdict(job.plan), "precision": job.precision}
    named: dict[str, Any] = {
        "--method": job.method,
        **{flag(name): value for name, value in chosen.items()},
        "the base": base.identity.identity,
        "--data": rows.train.digest,
        "--eval": rows.held.digest,
        "--template": dataclasses.asdict(job.template),
        "the number of rows and tokens": [len(rows.train_rows), sum(len(row.ids) for row in rows.train_rows)],
    }
    return json.loads(json.dumps(named))  # type: ignore[no-any-return]


def of_run(
    job: Job, options: Any, rows: TrainingData, run: Run, memory: tuple[int, int], num_processes: int
) -> dict[str, Any]:
    """What people want to know of a run; sizes in bytes, times in seconds. `memory` is the base's and the peak."""
    return {
        "method": job.method,
        "data": rows.train.path.name,
        "data_sha256": rows.train.digest,
        "num_rows": len(rows.train_rows),
        "options": dataclasses.asdict(options),
        "plan": dataclasses.asdict(job.plan),
        "precision": job.precision,
        "num_processes": num_processes,
        "steps": run.steps,
        "kept_step": run.kept_step,
        "epochs": run.epochs,
        "seconds": round(run.seconds, 2),
        "tokens_per_second": round(run.tokens / max(run.seconds, 1e-9), 1),
        "loss": round(run.loss, 5),
        "trained_parameters": run.num_trained,
        "trained_share": round(run.num_trained / run.num_base, 6),
        "base_memory_bytes": memory[0],
        "peak_memory_bytes": memory[1],
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "torch": str(torch.__version__),
        "machine": platform.machine(),
    }


def of_scores(rows: TrainingData, columns: Columns, before: Scores, after: Scores) -> dict[str, Any]:
    """The base beside the adapter, and on what.

    `forgetting` is the share by which the perplexity of a neutral text rises with the adapter on.
    """
    return {
        "data": rows.held.path.name,
        "sha256": rows.held.digest,
        "split_sha256": split_digest(rows.held, columns),
        "before": _rounded(before),
        "after": _rounded(after),
        "forgetting": round(after.neutral_perplexity / before.neutral_perplexity - 1, 5),
    }


def split_digest(dataset: Dataset, columns: Columns) -> str:
    """sha256 of what scores are comparable on: the bytes of the files, which lines of them, and which columns."""
    lines = [example.line for example in dataset.examples]
    said = json.dumps([dataset.digest, lines, dataclasses.asdict(columns)])
    return hashlib.sha256(said.encode()).hexdigest()


def _rounded(scores: Scores) -> dict[str, Any]:
    return {
        name: round(value, 5) if isinstance(value, float) else value
        for name, value in dataclasses.asdict(scores).items()
    }
