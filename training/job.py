"""One run from files to an artifact: load, score the base, train, score again, prove, write whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import platform
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import save

from adapters_store import bases
from adapters_store.artifact import FILES, FORMAT_VERSION, BaseRef, Manifest, write_folder
from training.data import Columns, Dataset, Row, check_varied, hold_out, read_dataset, tokenise
from training.errors import BaseError, OptionError
from training.evaluate import Scores, choices_of, evaluate, parity
from training.methods import MethodOptions, attach
from training.show import Show
from training.template import Template
from training.trainer import Plan, Run, Step, Trainer, check_plan

LOG = "train.jsonl"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Job:
    """All that one run depends on; equal jobs write equal weights."""

    method: str
    base: str
    data: Path
    out: Path
    eval: Path | None
    columns: Columns
    template: Template
    options: MethodOptions
    plan: Plan
    max_length: int = 1024
    save_dtype: str = "fp32"
    device: str = "cpu"
    cache: Path | None = None


@dataclass(frozen=True)
class Done:
    """What a run made."""

    run: Run
    before: Scores
    after: Scores
    num_bytes: int


def run_job(job: Job, show: Show) -> Done:
    """Train, and write the artifact. Raises `TrainingError` with a sentence; then nothing is written at `job.out`."""
    _check(job)
    with tempfile.TemporaryDirectory() as scratch:
        return _run(job, show, Path(scratch) / LOG)


def _run(job: Job, show: Show, log: Path) -> Done:
    folder = _resolve(job, show)
    tokenizer, model = _load(folder, job.device)
    train, held = _datasets(job, tokenizer)
    max_length = min(job.max_length, getattr(model.config, "max_position_embeddings", job.max_length))
    rows, held_rows = tokenise(train, tokenizer, max_length), tokenise(held, tokenizer, max_length)
    choices = choices_of(rows, held_rows)
    with show.bar("scoring the base", len(held_rows)) as more:
        before = evaluate(model, held_rows, choices, on_rows=more)
    torch.manual_seed(job.plan.seed)
    peft_model = attach(job.method, model, job.options, job.base)
    with log.open("w") as lines:
        run = _train(job, peft_model, rows, show, lines)
    _round(peft_model, DTYPES[job.save_dtype])  # score and prove what is stored, not what was trained
    with show.bar("scoring the adapter", len(held_rows)) as more:
        after = evaluate(peft_model, held_rows, choices, on_rows=more)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        method=job.method,
        base=_base_ref(job.base, folder),
        prompt_format=None if train.is_chat else job.template.prompt_format(),
        parity=parity(peft_model, held_rows, tokenizer.eos_token_id),
        training=_facts(job, train, run),
        evaluation={"data": held.path.name, "sha256": held.digest, "before": _scores(before), "after": _scores(after)},
    )
    return Done(run, before, after, _write(job, peft_model, manifest, log))


def _check(job: Job) -> None:
    check_plan(job.plan)
    if job.save_dtype not in DTYPES:
        raise OptionError(f"--save-dtype must be one of {', '.join(DTYPES)}, not {job.save_dtype}.")
    if job.out.exists() and not (job.out / "adapter_config.json").is_file():
        raise OptionError(f"--out {job.out} exists and is no artifact: name a new folder.")
    if others := sorted({path.name for path in job.out.glob("*")} - {*FILES, LOG}):
        raise OptionError(
            f"--out {job.out} holds {others[0]} beside an artifact, which would be lost: name a new folder."
        )
    job.out.parent.mkdir(parents=True, exist_ok=True)


def _resolve(job: Job, show: Show) -> Path:
    try:
        return bases.resolve_base(job.base, job.cache or bases.default_cache(), show.say)
    except bases.BaseError as error:
        raise BaseError(str(error)) from error


def _load(folder: Path, device: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise BaseError(f"The base in {folder} cannot be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise BaseError(f"The tokenizer in {folder} has no end-of-sequence token; an answer could not end.")
    try:
        return tokenizer, model.to(device).eval().requires_grad_(False)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise OptionError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error


def _datasets(job: Job, tokenizer: Any) -> tuple[Dataset, Dataset]:
    train = read_dataset(job.data, job.columns, job.template, tokenizer)
    check_varied(train)
    if job.eval is None:
        return hold_out(train, job.plan.seed)
    return train, read_dataset(job.eval, job.columns, job.template, tokenizer)


def _train(job: Job, model: Any, rows: list[Row], show: Show, log: TextIO) -> Run:
    with show.training() as tell:

        def on_step(step: Step) -> None:
            log.write(json.dumps(dataclasses.asdict(step)) + "\n")
            tell(step)

        return Trainer(model, rows, job.plan).run(on_step)


def _round(model: Any, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype).float()


def _base_ref(name: str, folder: Path) -> BaseRef:
    identity = bases.base_identity(folder)
    return BaseRef(name, identity.identity, identity.weights)


def _facts(job: Job, train: Dataset, run: Run) -> dict[str, Any]:
    """What people want to know of a run; sizes in bytes, times in seconds."""
    return {
        "data": train.path.name,
        "data_sha256": train.digest,
        "num_rows": len(train.examples),
        "options": dataclasses.asdict(job.options),
        "plan": dataclasses.asdict(job.plan),
        "steps": run.steps,
        "epochs": run.epochs,
        "seconds": round(run.seconds, 2),
        "tokens_per_second": round(run.tokens / max(run.seconds, 1e-9), 1),
        "loss": round(run.loss, 5),
        "trained_parameters": run.num_trained,
        "trained_share": round(run.num_trained / (run.num_parameters - run.num_trained), 6),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "torch": str(torch.__version__),
        "machine": platform.machine(),
    }


def _scores(scores: Scores) -> dict[str, Any]:
    return {
        name: round(value, 5) if isinstance(value, float) else value
        for name, value in dataclasses.asdict(scores).items()
    }


def _write(job: Job, model: Any, manifest: Manifest, log: Path) -> int:
    """The folder with the log among its files; the bytes of its weights."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    stored = {name: tensors[name].detach().to("cpu", DTYPES[job.save_dtype]).contiguous() for name in sorted(tensors)}
    weights = save(stored, metadata={"format": "pt"})
    config = json.loads(json.dumps(model.peft_config["default"].to_dict(), default=sorted))
    write_folder(job.out, config, weights, manifest, {LOG: log.read_bytes()})
    return len(weights)
