"""A training job: its options, their checks and its result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapters_store.format.folder import FILES
from training.data.dataset import Columns
from training.data.template import Template
from training.errors import OptionError
from training.evaluation.evaluate import Scores
from training.methods import options_of
from training.report.step_log import LOG
from training.run.schedule import Plan, check_plan
from training.run.trainer import Run

CURVES = "curves.png"
DTYPE_OF_PRECISION = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class Job:
    """All that one run depends on; equal jobs write equal weights. `options` are those that were given, by name."""

    method: str
    base: str
    data: Path
    out: Path
    eval: Path | None
    columns: Columns
    template: Template
    options: dict[str, Any]
    plan: Plan
    max_length: int = 1024
    precision: str = "auto"
    save_dtype: str = "fp32"
    device: str = "cpu"
    cache: Path | None = None
    num_answers: int = 64
    is_resumed: bool = False


@dataclass(frozen=True)
class Done:
    """What a run made."""

    run: Run
    before: Scores
    after: Scores
    num_bytes: int


def check(job: Job) -> Any:
    """The method's options. Raises `OptionError`."""
    options = options_of(job.method, job.options)
    check_plan(job.plan)
    for name, value, known in (
        ("save-dtype", job.save_dtype, tuple(DTYPE_OF_PRECISION)),
        ("precision", job.precision, PRECISIONS),
    ):
        if value not in known:
            raise OptionError(f"--{name} must be one of {', '.join(known)}, not {value}.")
    if job.out.exists() and not (job.out / "adapter_config.json").is_file():
        raise OptionError(f"--out {job.out} exists and is no artifact: name a new folder.")
    if others := sorted({path.name for path in job.out.glob("*")} - {*FILES, LOG, CURVES}):
        raise OptionError(
            f"--out {job.out} holds {others[0]} beside an artifact, which would be lost: name a new folder."
        )
    job.out.parent.mkdir(parents=True, exist_ok=True)
    return options
