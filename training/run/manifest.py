"""Entries of a manifest about a run, for people: how an adapter was trained, and how well it answers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import time
from typing import Any

import torch

from training.data.dataset import Columns, Dataset, TrainingData
from training.evaluation.evaluate import Scores
from training.options import MethodOptions
from training.run.job import Job
from training.run.trainer import Run


def training_entry(
    job: Job,
    options: MethodOptions,
    data: TrainingData,
    run: Run,
    num_base: int,
    memory: tuple[int, int],
    num_processes: int = 1,
    num_jobs: int = 1,
) -> dict[str, Any]:
    """Return the manifest's `training`: how an adapter was trained, sizes in bytes and times in seconds.

    `num_base` counts the base's parameters, `memory` is that of the loaded base and the peak, and `num_jobs` jobs
    trained together in one process.
    """
    return {
        "method": job.method,
        "data": data.train.path.name,
        "data_sha256": data.train.digest,
        "num_rows": len(data.train_rows),
        "options": options.as_dict(),
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
        "trained_share": round(run.num_trained / num_base, 6),
        "base_memory_bytes": memory[0],
        "peak_memory_bytes": memory[1],
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "torch": str(torch.__version__),
        "machine": platform.machine(),
        "num_jobs": num_jobs,
    }


def evaluation_entry(data: TrainingData, columns: Columns, before: Scores, after: Scores) -> dict[str, Any]:
    """Return the manifest's `evaluation`: the scores of base and adapter, and the rows that they were taken on.

    `forgetting` is the share by which the perplexity of a neutral text rises with the adapter.
    """
    return {
        "data": data.held.path.name,
        "sha256": data.held.digest,
        "split_sha256": split_digest(data.held, columns),
        "before": _rounded(before),
        "after": _rounded(after),
        "forgetting": round(after.neutral_perplexity / before.neutral_perplexity - 1, 5),
    }


def split_digest(dataset: Dataset, columns: Columns) -> str:
    """Return the sha256 of a split: the bytes of its files, the lines and the columns. Scores on equal ones compare."""
    lines = [example.line for example in dataset.examples]
    split = json.dumps([dataset.digest, lines, dataclasses.asdict(columns)])
    return hashlib.sha256(split.encode()).hexdigest()


def _rounded(scores: Scores) -> dict[str, Any]:
    return {
        name: round(value, 5) if isinstance(value, float) else value
        for name, value in dataclasses.asdict(scores).items()
    }
