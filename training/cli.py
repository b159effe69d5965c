"""The commands `manyhats train` and `manyhats push`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from adapters_store.escapes import json_line, printable
from training.errors import OptionError, PushError, TrainingError, sentence, stop
from training.flags import add_flags, flags_of, flags_of_methods
from training.options import flag, option_classes
from training.other_names import OtherNames
from training.run.schedule import Plan

Option = typer.Option
API_KEY = "MANYHATS_API_KEY"
NEEDED = ("data", "out")  # of every job
PUSH_OPTIONS = ("push", "task", "note", "force", "api_key")  # of a single run
JOBS_OPTIONS = ("jobs", "resume")  # may stand beside --jobs; every other option belongs into its file


def train(
    data: Annotated[
        Path | None, Option(help="JSONL, CSV or a data set folder: prompt + completion, or messages")
    ] = None,
    out: Annotated[Path | None, Option(help="folder of the artifact")] = None,
    method: Annotated[str, Option(help="what to train: lora, bottleneck, prompt_tuning, ia3, bitfit, …")] = "lora",
    base: Annotated[str, Option(help="smollm2-135m, a Hugging Face folder, or a hub id")] = "smollm2-135m",
    eval: Annotated[Path | None, Option(help="rows to score on (else a tenth of --data is held out)")] = None,
    num_answers: Annotated[
        int, Option(help="prompts that answers are written to, for ROUGE-L and BLEU, where answers are no labels")
    ] = 64,
    resume: Annotated[bool, Option(help="go on with a run that was killed")] = False,
    prompt_column: Annotated[str, Option(help="the column of prompts")] = "prompt",
    completion_column: Annotated[str, Option(help="the column of answers")] = "completion",
    template: Annotated[str, Option(help="text around a prompt: 'Customer: {prompt}\\nIntent: {completion}'")] = "",
    form: Annotated[
        str, Option(help="labels, or a file with a JSON schema: the form of every answer, which the artifact carries")
    ] = "",
    tool_format: Annotated[
        str, Option(help="format of calls of tools, or a file with its texts, if the base's chat template has none")
    ] = "",
    max_length: Annotated[int, Option(help="most tokens of a row")] = 1024,
    precision: Annotated[str, Option(help="auto, fp32 or bf16: of the training's arithmetic")] = "auto",
    save_dtype: Annotated[str, Option(help="fp32, fp16 or bf16: of the stored weights")] = "fp32",
    device: Annotated[str, Option(help="cpu or cuda")] = "cpu",
    cache: Annotated[Path | None, Option(help="folder of converted bases")] = None,
    jobs: Annotated[
        Path | None, Option(help="a YAML file of many jobs, by the names of these flags, that train in one batch")
    ] = None,
    push: Annotated[str | None, Option(help="URL of a server to upload to; activated where it is better")] = None,
    task: Annotated[str | None, Option(help="the task to push to (else the name of --out)")] = None,
    note: Annotated[str, Option(help="a note on the pushed version")] = "",
    force: Annotated[bool, Option(help="activate what is pushed, better or not")] = False,
    api_key: Annotated[str | None, Option(help="the server's key", envvar=API_KEY)] = None,
    **plan_and_method: Any,
) -> None:
    """Train an adapter for a base, score it beside the base, and write an artifact that the server takes."""
    given = dict(locals())
    _run({**given.pop("plan_and_method"), **given})


add_flags(train, [*flags_of(Plan), *flags_of_methods()])
train.options = {"cls": OtherNames}  # type: ignore[attr-defined]


def _run(given: dict[str, Any]) -> None:
    """Train one job or a file of them, and exit with 1 if any failed."""
    from training.report.progress import ProgressDisplay
    from training.run.distributed import Processes

    processes = Processes(is_cpu=given["device"] == "cpu")
    display = ProgressDisplay(Console(stderr=True, quiet=not processes.is_main))
    try:
        num_failed = _train_many(given, display, processes) if given["jobs"] else _train_one(given, display, processes)
        processes.leave()
    except (TrainingError, OSError) as error:
        raise stop(display.console, sentence(error, given["out"] or given["jobs"])) from error
    finally:
        processes.close()
    if num_failed:
        raise typer.Exit(1)


def _train_one(given: dict[str, Any], display: Any, processes: Any) -> int:
    """Train the job that the flags describe, and push it if they say so; return the number of failed jobs, 0."""
    from training.run.pipeline import run_job

    for name in NEEDED:
        if given[name] is None:
            raise OptionError(f"{flag(name)} is missing: name it, or a file of many jobs with --jobs.")
    job, target = job_of(given), _target_of(given)
    done = run_job(job, display, processes)
    if done is not None:
        _report(job, done, display)
        if target is not None:
            display.say(_pushed(target, job.out, given["force"]))
    return 0


def _target_of(given: dict[str, Any]) -> Any:
    """Return the task of --push, or None without the flag.

    The server is asked at once, so that no long run ends at a server that cannot be reached. Raises `PushError`.
    """
    from training.methods import METHODS
    from training.push import Target

    if given["push"] is None:
        return None
    if given["method"] in METHODS and not METHODS[given["method"]].is_uploadable:
        raise OptionError(
            f"--push cannot be used with --method {given['method']}, which no server takes as an adapter."
        )
    target = Target(given["push"], given["task"] or given["out"].name, given["api_key"], given["note"])
    target.served()
    return target


def _pushed(target: Any, out: Path, is_forced: bool) -> str:
    """Push an artifact, and say what came of it. Raises `PushError` with the command that tries again."""
    from training.push import push_if_better

    try:
        return push_if_better(target, out, is_forced)
    except PushError as error:
        again = f"manyhats push {out} --task {target.task} --url {target.url}"
        raise PushError(f"{error} The artifact is in {out}; push it with: {again}") from error


def push(
    folder: Annotated[Path, typer.Argument(help="a PEFT folder")],
    task: Annotated[str, Option(help="the task that it becomes a version of")],
    url: Annotated[str, Option(help="the server")] = "http://127.0.0.1:8000",
    note: Annotated[str, Option(help="a note on the version")] = "",
    activate: Annotated[bool, Option(help="route the task's requests to it")] = True,
    api_key: Annotated[str | None, Option(help="the server's key", envvar=API_KEY)] = None,
    json_: Annotated[bool, typer.Option("--json", help="print the server's answer as one JSON object")] = False,
) -> None:
    """Upload a PEFT folder to a server as a version of a task."""
    from adapters_store.format.selection import describe_ignored, find_ignored
    from training.push import Target, push_folder

    console = Console(stderr=True)
    try:
        pushed = push_folder(Target(url, task, api_key, note), folder, activate)
    except TrainingError as error:
        raise stop(console, str(error), "push") from error
    if json_:
        print(json_line(pushed.answer))  # noqa: T201 - the answer
    else:
        console.print(printable(pushed.sentence), highlight=False, markup=False, soft_wrap=True)
    if ignored := find_ignored(folder):
        told = f"Not sent, {describe_ignored(ignored)}."
        console.print(printable(told), highlight=False, markup=False, soft_wrap=True)


def _train_many(given: dict[str, Any], display: Any, processes: Any) -> int:
    """Train the jobs of --jobs together; return how many failed."""
    from training.joint.job_file import read_jobs
    from training.joint.run import Named, run_jobs

    for name, parameter in inspect.signature(train).parameters.items():
        if name not in JOBS_OPTIONS and given[name] != parameter.default:
            if name in PUSH_OPTIONS:
                raise OptionError(f"{flag(name)} cannot stand beside --jobs: `manyhats push` takes each artifact.")
            raise OptionError(f"{flag(name)} cannot stand beside --jobs: write `{name}` into {given['jobs']}.")
    named = []
    entries = read_jobs(given["jobs"], train, without=("jobs", *PUSH_OPTIONS), needed=NEEDED)
    for number, entry in enumerate(entries, start=1):
        try:
            named.append(Named(number, job_of({**entry, "resume": entry["resume"] or given["resume"]})))
        except OptionError as error:
            raise OptionError(f"job {number} ({entry['out']}): {error}") from error
    return run_jobs(named, display, processes, lambda job, done: _report(job, done, display))


def _report(job: Any, done: Any, display: Any) -> None:
    """Show the scores of a job that is done, and what it wrote."""
    from training.methods import METHODS

    display.scores(done.before, done.after)
    display.say(f"{job.out}: {done.num_bytes:,} bytes, {done.run.steps} steps in {done.run.seconds:.0f} s")
    if not METHODS[job.method].is_uploadable:
        display.say(
            f"{job.method} is for comparison: what it wrote is a new base, which no server takes as an adapter."
        )


def job_of(given: dict[str, Any]) -> Any:
    """Return the job that values of `train`'s flags, by name, describe. Raises `OptionError`.

    An option of methods that is None or left out keeps the method's default.
    """
    from training.data.dataset import Columns
    from training.data.template import Template, parse_template
    from training.methods import method_named
    from training.run.job import Job

    plan = {name: given[name] for name in Plan.__dataclass_fields__ if name in given}
    own = {name: given[name] for name in Job.__dataclass_fields__ if name in given}
    method_options = {name for options in option_classes() for name in options.names()}
    lr = method_named(given["method"]).lr if given["lr"] is None else given["lr"]
    return Job(
        **{
            **own,
            "columns": Columns(given["prompt_column"], given["completion_column"]),
            "template": parse_template(given["template"]) if given["template"] else Template(),
            "options": {name: value for name, value in given.items() if name in method_options and value is not None},
            "plan": Plan(**{**plan, "lr": lr}),
            "is_resumed": given["resume"],
        }
    )
