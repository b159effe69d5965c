"""The command `manyhats compare`."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from training import cli
from training.errors import OptionError, TrainingError, sentence, stop
from training.flags import add_flags, parameters_of
from training.options import flag
from training.other_names import OtherNames

# The options of `manyhats train` that hold for every method alike.
SHARED = (
    "data",
    "eval",
    "base",
    "max_seconds",
    "epochs",
    "steps",
    "num_answers",
    "seed",
    "batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "eval_steps",
    "early_stopping_patience",
    "prompt_column",
    "completion_column",
    "template",
    "max_length",
    "precision",
    "save_dtype",
    "device",
    "cache",
)
METHODS = "lora,bottleneck,prompt_tuning,prefix_tuning,ia3,bitfit,full"

MethodsOption = Annotated[str, typer.Option(help="what to train, joined by commas; full trains all parameters")]
OutOption = Annotated[Path, typer.Option(help="folder of the artifacts, the table and the plot")]


def compare(out: OutOption, methods: MethodsOption = METHODS, **given: Any) -> None:
    """Train methods under one budget, serve what came out, and write the trade-offs as a table and a plot.

    A method that is in the folder already is not trained again; one that fails is told, and the others go on.
    """
    console = Console(stderr=True)
    try:
        _compare(methods, out, given, console)
    except (TrainingError, OSError) as error:
        raise stop(console, sentence(error, out), "compare") from error


def _compare(methods: str, out: Path, given: dict[str, Any], console: Console) -> None:
    from training.compare.comparing import Comparing

    names = list(dict.fromkeys(name.strip() for name in methods.split(",") if name.strip()))
    if not names:
        raise OptionError("--methods names no method: write names of --method of `manyhats train`, joined by commas.")
    jobs = {name: _job(name, out, given) for name in names}
    Comparing.begin(jobs, out, _named(given), _unusual(given), console).run()


def _job(method: str, out: Path, given: dict[str, Any]) -> Any:
    """Return a run of a method with the method's own defaults; it resumes if one was killed."""
    from training.run.checkpoint import Checkpoint

    job = cli.job_of({**given, "method": method, "out": out / method, "lr": None, "resume": False})
    return dataclasses.replace(job, is_resumed=Checkpoint(job.out, {}).exists())


def _named(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options that the outcome depends on, by their flags, as JSON has them."""
    values = {name: value for name, value in given.items() if name != "cache"}
    return {flag(name): str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _unusual(given: dict[str, Any]) -> list[str]:
    """Return the words of the options whose values are not the defaults."""
    usual = inspect.signature(cli.train).parameters
    words = []
    for name, value in _named({name: value for name, value in given.items() if value != usual[name].default}).items():
        words += [name] if value is True else [name, str(value)]
    return words


# An option that both commands have is declared by `train` alone.
TRAIN_FLAGS = {parameter.name: parameter for parameter in parameters_of(cli.train)}
add_flags(compare, [TRAIN_FLAGS[name] for name in SHARED])
compare.options = {"cls": OtherNames}  # type: ignore[attr-defined]
