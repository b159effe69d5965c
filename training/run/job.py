"""A training job: its options, and the checks that need neither base nor data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters_store.format.folder import FILES
from training.data.dataset import Columns
from training.data.template import Template
from training.errors import OptionError
from training.methods import options_of
from training.options import MethodOptions
from training.report.curves import CURVES
from training.report.step_log import LOG
from training.run.precision import DTYPES, PRECISIONS
from training.run.schedule import Plan


@dataclass(frozen=True)
class Job:
    """The options of a run, which depends on nothing else: equal jobs write equal weights.

    `data` and `eval` are files or folders of rows (without `eval`, rows of `data` are held out), `out` is the folder
    to write, `options` are the method's options that were given, by name, and `max_length` is in tokens. `form`
    is that of `training.data.form`, `tool_format` that of `training.data.chat`.
    """

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
    form: str = ""
    tool_format: str = ""
    is_resumed: bool = False


def check(job: Job) -> MethodOptions:
    """Return the method's options, and make the parent folder of `job.out`. Raises `OptionError`."""
    options = options_of(job.method, job.options)
    for name, value, allowed in (
        ("save-dtype", job.save_dtype, tuple(DTYPES)),
        ("precision", job.precision, PRECISIONS),
    ):
        if value not in allowed:
            raise OptionError(f"--{name} must be one of {', '.join(allowed)}, not {value}.")
    if job.out.exists() and not (job.out / "adapter_config.json").is_file():
        raise OptionError(f"--out {job.out} exists and is no artifact: name a new folder.")
    if others := sorted({path.name for path in job.out.glob("*")} - {*FILES, LOG, CURVES}):
        raise OptionError(
            f"--out {job.out} holds {others[0]} beside an artifact, which would be lost: name a new folder."
        )
    job.out.parent.mkdir(parents=True, exist_ok=True)
    return options
