"""The command `manyhats train`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from training.errors import OptionError, PushError, TrainingError, sentence

Option = typer.Option
API_KEY = "TRAIN_API_KEY"  # no MANYHATS_ variable: those are the server's settings alone
NEEDED = ("data", "out")  # of every job
OF_PUSH = ("push", "task", "note", "force", "api_key")  # of one run
WITH_JOBS = ("jobs", "resume")  # what is said beside --jobs, and not in its file
PANEL = "Options of methods (one that the chosen method does not read is refused)"


def _of_method(text: str) -> Any:
    return Option(help=text, rich_help_panel=PANEL)


# What only some methods read; None is "not given", and the method's own default holds.
OF_METHODS = (
    "r",
    "alpha",
    "dropout",
    "use_rslora",
    "target_modules",
    "layers",
    "init_r",
    "target_r",
    "block_size",
    "feedforward_modules",
    "bottleneck_size",
    "placement",
    "non_linearity",
    "scaling",
    "ln_before",
    "ln_after",
    "num_virtual_tokens",
    "init_text",
    "num_ranks",
    "encoder_reparameterization_type",
    "encoder_hidden_size",
    "prefix_projection",
    "num_frozen_tokens",
    "epsilon",
    "parameters",
    "token_indices",
)


def train(
    data: Annotated[
        Path | None, Option(help="JSONL, CSV or a data set folder: prompt + completion, or messages")
    ] = None,
    out: Annotated[Path | None, Option(help="folder of the artifact")] = None,
    method: Annotated[str, Option(help="what to train: lora, bottleneck, prompt_tuning, ia3, bitfit, …")] = "lora",
    base: Annotated[str, Option(help="smollm2-135m, a Hugging Face folder, or a hub id")] = "smollm2-135m",
    eval: Annotated[Path | None, Option(help="rows to score on (else a tenth of --data is held out)")] = None,
    max_seconds: Annotated[float | None, Option(help="stop after so many seconds")] = None,
    epochs: Annotated[float | None, Option(help="stop after so many passes (3 if no limit is given)")] = None,
    steps: Annotated[int | None, Option(help="stop after so many steps")] = None,
    num_answers: Annotated[
        int, Option(help="prompts that answers are written to, for ROUGE-L and BLEU, where answers are no labels")
    ] = 64,
    seed: Annotated[int, Option(help="the same seed, the same weights")] = 0,
    batch_size: Annotated[int, Option(help="rows at a time, over all processes")] = 8,
    gradient_accumulation_steps: Annotated[int, Option(help="how many times, before a step is taken")] = 1,
    gradient_checkpointing: Annotated[bool, Option(help="compute activations again: less memory, more time")] = False,
    lr: Annotated[float | None, Option(help="learning rate at its highest (else the method's own)")] = None,
    eval_steps: Annotated[int | None, Option(help="take the loss on the evaluation rows every so many steps")] = None,
    early_stopping_patience: Annotated[
        int | None, Option(help="stop when that has not fallen so many times (each epoch, or --eval-steps)")
    ] = None,
    save_steps: Annotated[int, Option(help="keep a checkpoint for --resume every so many steps")] = 100,
    resume: Annotated[bool, Option(help="go on with a run that was killed")] = False,
    prompt_column: Annotated[str, Option(help="the column of prompts")] = "prompt",
    completion_column: Annotated[str, Option(help="the column of answers")] = "completion",
    template: Annotated[str, Option(help="text around a prompt: 'Customer: {prompt}\\nIntent: {completion}'")] = "",
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
    r: Annotated[int | None, _of_method("rank")] = None,
    alpha: Annotated[float | None, _of_method("what the update is scaled by, over the rank")] = None,
    dropout: Annotated[float | None, _of_method("dropout in training")] = None,
    use_rslora: Annotated[bool | None, _of_method("scale by alpha / sqrt(r)")] = None,
    target_modules: Annotated[str | None, _of_method("all-linear, or names joined by commas")] = None,
    layers: Annotated[str | None, _of_method("all, last:N, or numbers and ranges like 0,4-7")] = None,
    init_r: Annotated[int | None, _of_method("adalora: each site's rank at first")] = None,
    target_r: Annotated[int | None, _of_method("adalora: the mean rank at last")] = None,
    block_size: Annotated[int | None, _of_method("oft: inputs that are turned together")] = None,
    feedforward_modules: Annotated[str | None, _of_method("ia3: modules whose input is scaled")] = None,
    bottleneck_size: Annotated[int | None, _of_method("bottleneck: its width")] = None,
    placement: Annotated[str | None, _of_method("bottleneck: houlsby, pfeiffer or parallel")] = None,
    non_linearity: Annotated[str | None, _of_method("bottleneck: relu, gelu, silu, tanh, …")] = None,
    scaling: Annotated[str | None, _of_method("bottleneck: a number, learned or channel")] = None,
    ln_before: Annotated[bool | None, _of_method("bottleneck: a layer norm before it")] = None,
    ln_after: Annotated[bool | None, _of_method("bottleneck: a layer norm after it")] = None,
    num_virtual_tokens: Annotated[int | None, _of_method("soft prompts: how many")] = None,
    init_text: Annotated[str | None, _of_method("soft prompts: the text they begin as, or random")] = None,
    num_ranks: Annotated[int | None, _of_method("multitask_prompt_tuning: ranks of the task's factor")] = None,
    encoder_reparameterization_type: Annotated[str | None, _of_method("p_tuning: MLP or LSTM")] = None,
    encoder_hidden_size: Annotated[int | None, _of_method("p_tuning, prefix_tuning: the encoder's width")] = None,
    prefix_projection: Annotated[bool | None, _of_method("prefix_tuning: train through an MLP")] = None,
    num_frozen_tokens: Annotated[int | None, _of_method("cartridge: first tokens that stay")] = None,
    epsilon: Annotated[float | None, _of_method("cpt: how far a token may move")] = None,
    parameters: Annotated[str | None, _of_method("selective: words in parameters' names, by commas")] = None,
    token_indices: Annotated[str | None, _of_method("trainable_tokens: seen, or ids like 5,9-12")] = None,
) -> None:
    """Train a hat for a base, score it beside the base, and write an artifact that the server takes."""
    _run(dict(locals()))


def _run(given: dict[str, Any]) -> None:
    from training.report.progress import ProgressDisplay
    from training.run.distributed import Processes

    processes = Processes(is_cpu=given["device"] == "cpu")
    display = ProgressDisplay(Console(stderr=True, quiet=not processes.is_main))
    try:
        num_broken = _train_many(given, display, processes) if given["jobs"] else _train_one(given, display, processes)
        processes.leave()
    except (TrainingError, OSError) as error:
        raise stop(display.console, sentence(error, given["out"] or given["jobs"])) from error
    finally:
        processes.close()
    if num_broken:
        raise typer.Exit(1)


def _train_one(given: dict[str, Any], display: Any, processes: Any) -> int:
    from training.run.pipeline import run_job

    for name in NEEDED:
        if given[name] is None:
            raise OptionError(f"--{name} is missing: name it, or a file of many jobs with --jobs.")
    job, target = job_of(given), _target_of(given)
    done = run_job(job, display, processes)
    if done is not None:
        _tell(job, done, display)
        if target is not None:
            display.say(_pushed(target, job.out, given["force"]))
    return 0


def _target_of(given: dict[str, Any]) -> Any:
    """Where to push to, or None. The server is asked at once, so that a long run does not end before a closed door."""
    from training.methods import METHODS
    from training.push import Target

    if given["push"] is None:
        return None
    if given["method"] in METHODS and not METHODS[given["method"]].is_uploadable:
        raise OptionError(f"--push cannot be used with --method {given['method']}, which no server takes as a hat.")
    target = Target(given["push"], given["task"] or given["out"].name, given["api_key"], given["note"])
    target.served()
    return target


def _pushed(target: Any, out: Path, is_forced: bool) -> str:
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
) -> None:
    """Upload a PEFT folder to a server as a version of a task."""
    from training.push import Target, push_folder

    console = Console(stderr=True)
    try:
        said = push_folder(Target(url, task, api_key, note), folder, activate)
    except TrainingError as error:
        raise stop(console, str(error), "push") from error
    console.print(said, highlight=False, markup=False, soft_wrap=True)


def _train_many(given: dict[str, Any], display: Any, processes: Any) -> int:
    """How many of --jobs broke."""
    from training.joint.job_file import read_jobs
    from training.joint.run import Named, run_jobs

    for name, parameter in inspect.signature(train).parameters.items():
        if name not in WITH_JOBS and given[name] != parameter.default:
            flag = name.replace("_", "-")
            if name in OF_PUSH:
                raise OptionError(f"--{flag} cannot stand beside --jobs: `manyhats push` takes each artifact.")
            raise OptionError(f"--{flag} cannot stand beside --jobs: write `{name}` into {given['jobs']}.")
    named = []
    for number, entry in enumerate(read_jobs(given["jobs"], train, without=("jobs", *OF_PUSH), needed=NEEDED), start=1):
        try:
            named.append(Named(number, job_of({**entry, "resume": entry["resume"] or given["resume"]})))
        except OptionError as error:
            raise OptionError(f"job {number} ({entry['out']}): {error}") from error
    return run_jobs(named, display, processes, lambda job, done: _tell(job, done, display))


def _tell(job: Any, done: Any, display: Any) -> None:
    from training.methods import METHODS

    display.scores(done.before, done.after)
    display.say(f"{job.out}: {done.num_bytes:,} bytes, {done.run.steps} steps in {done.run.seconds:.0f} s")
    if not METHODS[job.method].is_uploadable:
        display.say(f"{job.method} is for comparison: what it wrote is a new base, which no server takes as a hat.")


def job_of(given: dict[str, Any]) -> Any:
    """The job that options of `train`, by name, ask for. Raises `OptionError`."""
    from training.data.dataset import Columns
    from training.data.template import Template, parse_template
    from training.methods import method_named
    from training.run.job import Job
    from training.run.schedule import Plan

    plan = {name: given[name] for name in Plan.__dataclass_fields__ if name in given}
    own = {name: given[name] for name in Job.__dataclass_fields__ if name in given}
    lr = method_named(given["method"]).lr if given["lr"] is None else given["lr"]
    return Job(
        **{
            **own,
            "columns": Columns(given["prompt_column"], given["completion_column"]),
            "template": parse_template(given["template"]) if given["template"] else Template(),
            "options": {name: given[name] for name in OF_METHODS if given[name] is not None},
            "plan": Plan(**{**plan, "lr": lr}),
            "is_resumed": given["resume"],
        }
    )


def stop(console: Console, reason: str, command: str = "train") -> typer.Exit:
    """Say why a command ends."""
    console.print(f"[bold red]manyhats {command}:[/] {escape(reason)}", highlight=False, soft_wrap=True)
    return typer.Exit(1)
