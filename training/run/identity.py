"""The identity of a run: everything that its weights depend on, which a checkpoint must agree with to be resumed."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import msgspec

from training.base import Base
from training.data.dataset import TrainingData
from training.options import MethodOptions, flag
from training.run.job import Job


def run_identity(job: Job, options: MethodOptions, base: Base, data: TrainingData) -> dict[str, Any]:
    """Return what the weights depend on, as JSON has it, by the flag or word that names it in a sentence."""
    chosen = {**options.as_dict(), **dataclasses.asdict(job.plan), "precision": job.precision}
    named: dict[str, Any] = {
        "--method": job.method,
        **{flag(name): value for name, value in chosen.items()},
        "the base": base.identity.identity,
        "the base's rotary factors": base.rotary,
        "--data": data.train.digest,
        "--eval": data.held.digest,
        "--tool-format": msgspec.to_builtins(data.tool_format),
        "--template": dataclasses.asdict(job.template),
        "the number of rows and tokens": [len(data.train_rows), sum(len(row.ids) for row in data.train_rows)],
    }
    return json.loads(json.dumps(named))  # type: ignore[no-any-return]
