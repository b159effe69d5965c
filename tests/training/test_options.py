"""Flags: `manyhats train` has one for each option of each method, declared once, as a field with a help text."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from typer.testing import CliRunner

from training import cli
from training.compare.command import SHARED, compare
from training.errors import OptionError
from training.flags import PANEL, flags_of, flags_of_methods
from training.joint.job_file import read_jobs
from training.methods import METHODS, options_of
from training.options import HELP, FixedScaleOptions, MethodOptions, flag, option, option_classes
from training.run.schedule import Plan

# Names, types and defaults of the command line, which scripts rely on. Without a default an option of methods is None.
RUN = {
    "data": "Path | None = None",
    "out": "Path | None = None",
    "method": "str = lora",
    "base": "str = smollm2-135m",
    "eval": "Path | None = None",
    "max_seconds": "float | None = None",
    "epochs": "float | None = None",
    "steps": "int | None = None",
    "num_answers": "int = 64",
    "seed": "int = 0",
    "batch_size": "int = 8",
    "gradient_accumulation_steps": "int = 1",
    "gradient_checkpointing": "bool = False",
    "lr": "float | None = None",
    "eval_steps": "int | None = None",
    "early_stopping_patience": "int | None = None",
    "save_steps": "int = 100",
    "resume": "bool = False",
    "prompt_column": "str = prompt",
    "completion_column": "str = completion",
    "template": "str = ",
    "form": "str = ",
    "tool_format": "str = ",
    "max_length": "int = 1024",
    "precision": "str = auto",
    "save_dtype": "str = fp32",
    "device": "str = cpu",
    "cache": "Path | None = None",
    "jobs": "Path | None = None",
    "push": "str | None = None",
    "task": "str | None = None",
    "note": "str = ",
    "force": "bool = False",
    "api_key": "str | None = None",
}
OF_METHODS = {
    "int": "r init_r target_r block_size bottleneck_size num_virtual_tokens num_ranks encoder_hidden_size "
    "num_frozen_tokens",
    "float": "alpha dropout epsilon",
    "bool": "use_rslora ln_before ln_after prefix_projection",
    "str": "target_modules layers feedforward_modules placement non_linearity scaling init_text parameters "
    "encoder_reparameterization_type token_indices",
}
WANTED = RUN | {name: f"{kind} | None = None" for kind, names in OF_METHODS.items() for name in names.split()}


def described(parameter: inspect.Parameter) -> str:
    """Write a parameter's type and default, as the tables above have them."""
    kind = get_args(parameter.annotation)[0]
    name = kind.__name__ if isinstance(kind, type) else str(kind).replace("pathlib.", "")
    return f"{name} = {parameter.default}"


def help_of(parameter: inspect.Parameter) -> Any:
    """Return Typer's option of a parameter."""
    return get_args(parameter.annotation)[1]


def test_every_flag_is_there_as_before() -> None:
    """Names, types and defaults of all 59 flags are those of the table, and each has a help text."""
    parameters = inspect.signature(cli.train).parameters
    assert {name: described(parameter) for name, parameter in parameters.items()} == WANTED
    assert len(WANTED) == 60 and all(help_of(parameter).help for parameter in parameters.values())


def test_help_shows_every_flag() -> None:
    """`manyhats train --help` lists each flag with its help text."""
    app = typer.Typer()
    app.command()(cli.train)
    result = CliRunner().invoke(app, ["--help"], terminal_width=400, env={"COLUMNS": "400"})
    shown = " ".join(result.output.split())
    for name, parameter in inspect.signature(cli.train).parameters.items():
        assert flag(name) in shown and help_of(parameter).help.replace("\\\\", "\\") in shown, name


def test_every_option_of_every_method_is_a_flag() -> None:
    """Every field of a method's options has a flag with a help text, and every such flag a method that reads it."""
    parameters = inspect.signature(cli.train).parameters
    flags = {name: parameter for name, parameter in parameters.items() if help_of(parameter).rich_help_panel == PANEL}
    read = {name for method in METHODS.values() for name in method.options.names()}
    assert read == flags.keys()
    assert all(help_of(parameter).help for parameter in flags.values())
    assert {method.options for method in METHODS.values()} <= set(option_classes())


def test_an_option_is_added_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new field of a class makes a flag, which its methods read and the others refuse by name."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Extended(FixedScaleOptions):
        warmth: float = option(0.5, "how warm")

    [parameter] = [parameter for parameter in flags_of_methods() if parameter.name == "warmth"]
    assert described(parameter) == "float | None = None" and help_of(parameter).help == "how warm"
    monkeypatch.setitem(METHODS, "rslora", dataclasses.replace(METHODS["rslora"], options=Extended))
    assert options_of("rslora", {"warmth": 0.7}).as_dict()["warmth"] == 0.7
    with pytest.raises(OptionError, match="--warmth is not an option of --method lora, which reads --r, --alpha,"):
        options_of("lora", {"warmth": 0.7})


def test_a_manifest_lists_options_in_the_order_of_old() -> None:
    """Options that methods share stand last, so that equal runs of old and new versions write equal bytes."""
    names = {name: " ".join(METHODS[name].options.names()) for name in METHODS}
    assert names["lora"] == "r alpha dropout use_rslora target_modules layers"
    assert names["adalora"] == "init_r target_r alpha dropout target_modules layers"
    assert names["oft"] == "block_size dropout target_modules layers"
    assert names["ia3"] == "target_modules feedforward_modules layers"
    assert names["prefix_tuning"] == "num_virtual_tokens init_text prefix_projection encoder_hidden_size"
    assert names["p_tuning"] == "num_virtual_tokens encoder_reparameterization_type encoder_hidden_size"
    assert names["selective"] == "parameters layers" and names["full"] == ""


def test_compare_and_job_files_have_the_flags_of_train(tmp_path: Path) -> None:
    """`compare` takes the very parameters of `train`, and a file of jobs their names and types."""
    ours, theirs = inspect.signature(cli.train).parameters, inspect.signature(compare).parameters
    assert [*theirs] == ["out", "methods", *SHARED]
    assert all(described(theirs[name]) == described(ours[name]) for name in SHARED)
    file = tmp_path / "jobs.yaml"
    file.write_text("jobs: [{data: a.jsonl, out: b, r: 4, use-rslora: true, layers: 1, steps: 2}]")
    [job] = read_jobs(file, cli.train, without=("jobs",), needed=("data", "out"))
    assert job.keys() == WANTED.keys() - {"jobs"}
    assert (job["r"], job["use_rslora"], job["layers"], job["steps"], job["alpha"]) == (4, True, "1", 2, None)


def test_the_plan_is_the_source_of_its_flags() -> None:
    """A field of the plan with a help text is a flag with the field's default; one without has none."""
    flags = {parameter.name: parameter.default for parameter in flags_of(Plan)}
    fields = {field.name: field for field in dataclasses.fields(Plan)}
    assert flags.keys() == {name for name, field in fields.items() if HELP in field.metadata}
    assert {"warmup", "floor", "weight_decay", "clip"} == fields.keys() - flags.keys()
    assert all(flags[name] == fields[name].default for name in flags.keys() - {"lr"}) and flags["lr"] is None


def test_a_plan_that_cannot_be_meant_is_refused() -> None:
    """A limit that is not above 0, or is no number, is named by its flag."""
    for name, value in (("batch_size", 0), ("lr", float("nan")), ("save_steps", -1)):
        given: dict[str, Any] = {"lr": 1.0, name: value}
        with pytest.raises(OptionError, match=f"{flag(name)} must be a number above 0"):
            Plan(**given)


def test_flags_need_no_torch() -> None:
    """The command line is there before torch is imported, so that `--help` and mistakes answer at once."""
    code = "import sys, training.cli, training.compare.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_options_without_fields_are_none() -> None:
    """A method without options reads none, and says so."""
    assert MethodOptions.names() == [] and METHODS["full"].options is MethodOptions
    with pytest.raises(OptionError, match="--r is not an option of --method full, which reads none of its own"):
        options_of("full", {"r": 1})
