"""The command `manyhats compare`."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console

from training import cli
from training.errors import OptionError, TrainingError

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
    except TrainingError as error:
        raise cli.stop(console, str(error), "compare") from error
    except OSError as error:
        raise cli.stop(console, f"{out} cannot be written: {error.strerror or error}", "compare") from error


def _compare(methods: str, out: Path, given: dict[str, Any], console: Console) -> None:
    from training.compare.comparing import Comparing
    from training.run.schedule import check_plan

    names = list(dict.fromkeys(name.strip() for name in methods.split(",") if name.strip()))
    if not names:
        raise OptionError("--methods names no method: write names of --method of `manyhats train`, joined by commas.")
    jobs = {name: _job(name, out, given) for name in names}
    check_plan(jobs[names[0]].plan)
    Comparing.begin(jobs, out, _named(given), _unusual(given), console).run()


def _job(method: str, out: Path, given: dict[str, Any]) -> Any:
    """A run of a method with its own defaults; it goes on where one was killed."""
    from training.run.checkpoint import Checkpoint

    own = {"method": method, "out": out / method, "lr": None, "resume": False, **dict.fromkeys(cli.OF_METHODS)}
    job = cli.job_of({**given, **own})
    return dataclasses.replace(job, is_resumed=Checkpoint(job.out, {}).exists())


def _named(given: dict[str, Any]) -> dict[str, Any]:
    """Options that the outcome depends on, by their flags, as JSON has them."""
    from training.methods import flag

    values = {name: value for name, value in given.items() if name != "cache"}
    return {flag(name): str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _unusual(given: dict[str, Any]) -> list[str]:
    """The words of those that are not as by default."""
    usual = inspect.signature(cli.train).parameters
    words = []
    for name, value in _named({name: value for name, value in given.items() if value != usual[name].default}).items():
        words += [name] if value is True else [name, str(value)]
    return words


def _with_flags() -> None:
    """One source of truth: what both commands take is said by `train` alone."""
    hints, own = get_type_hints(cli.train, include_extras=True), get_type_hints(compare, include_extras=True)
    parameters = [
        parameter.replace(annotation=own[name])
        for name, parameter in inspect.signature(compare).parameters.items()
        if name != "given"
    ]
    parameters += [inspect.signature(cli.train).parameters[name].replace(annotation=hints[name]) for name in SHARED]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    compare.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    compare.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


_with_flags()
