"""The command `manyhats train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from training.errors import TrainingError

Option = typer.Option


def train(
    data: Annotated[Path, Option(help="JSONL or CSV: prompt + completion, or messages")],
    out: Annotated[Path, Option(help="folder of the artifact")],
    method: Annotated[str, Option(help="what to train: lora")] = "lora",
    base: Annotated[str, Option(help="smollm2-135m, a Hugging Face folder, or a hub id")] = "smollm2-135m",
    eval: Annotated[Path | None, Option(help="rows to score on (else a tenth of --data is held out)")] = None,
    max_seconds: Annotated[float | None, Option(help="stop after so many seconds")] = None,
    epochs: Annotated[float | None, Option(help="stop after so many passes (3 if no limit is given)")] = None,
    steps: Annotated[int | None, Option(help="stop after so many steps")] = None,
    seed: Annotated[int, Option(help="the same seed, the same weights")] = 0,
    batch_size: Annotated[int, Option(help="rows a step")] = 8,
    lr: Annotated[float, Option(help="learning rate at its highest")] = 3e-3,
    r: Annotated[int, Option(help="LoRA's rank")] = 8,
    alpha: Annotated[float, Option(help="LoRA's alpha")] = 16,
    dropout: Annotated[float, Option(help="LoRA's dropout")] = 0.0,
    use_rslora: Annotated[bool, Option(help="scale by alpha / sqrt(r)")] = False,
    target_modules: Annotated[str, Option(help="all-linear, or names joined by commas")] = "all-linear",
    layers: Annotated[str, Option(help="all, last:N, or numbers and ranges like 0,4-7")] = "last:10",
    prompt_column: Annotated[str, Option(help="the column of prompts")] = "prompt",
    completion_column: Annotated[str, Option(help="the column of answers")] = "completion",
    template: Annotated[str, Option(help="text around a prompt: 'Customer: {prompt}\\nIntent: {completion}'")] = "",
    max_length: Annotated[int, Option(help="most tokens of a row")] = 1024,
    save_dtype: Annotated[str, Option(help="fp32, fp16 or bf16: of the stored weights")] = "fp32",
    device: Annotated[str, Option(help="cpu or cuda")] = "cpu",
    cache: Annotated[Path | None, Option(help="folder of converted bases")] = None,
) -> None:
    """Train a hat for a base, score it beside the base, and write an artifact that the server takes."""
    from training.data import Columns
    from training.job import Job, run_job
    from training.methods import MethodOptions
    from training.show import Show
    from training.template import Template, parse_template
    from training.trainer import Plan

    show = Show(Console(stderr=True))
    try:
        job = Job(
            method=method,
            base=base,
            data=data,
            out=out,
            eval=eval,
            columns=Columns(prompt_column, completion_column),
            template=parse_template(template) if template else Template(),
            options=MethodOptions(r, alpha, dropout, use_rslora, target_modules, layers),
            plan=Plan(max_seconds, epochs, steps, batch_size, lr, seed=seed),
            max_length=max_length,
            save_dtype=save_dtype,
            device=device,
            cache=cache,
        )
        done = run_job(job, show)
    except TrainingError as error:
        raise _stop(show.console, str(error)) from error
    except OSError as error:
        raise _stop(show.console, f"{out} cannot be written: {error.strerror or error}") from error
    show.scores(done.before, done.after)
    show.say(f"{out}: {done.num_bytes:,} bytes, {done.run.steps} steps in {done.run.seconds:.0f} s")


def _stop(console: Console, reason: str) -> typer.Exit:
    console.print(f"[bold red]manyhats train:[/] {escape(reason)}", highlight=False, soft_wrap=True)
    return typer.Exit(1)
