"""The artifact of a finished run: weights, PEFT's config, manifest, log and curves, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safetensors.torch import save

from adapters_store.format.folder import FORMAT_VERSION, Artifact, write_folder
from adapters_store.format.manifest import GenerationDefaults, Manifest, TaskForm
from adapters_store.methods import method_of
from training.base import Base
from training.data.dataset import TrainingData
from training.evaluation.parity import parity
from training.methods import METHODS
from training.methods.trainable import TrainableAdapter
from training.report.curves import CURVES, draw
from training.report.step_log import LOG, Step, lines
from training.run.job import Job
from training.run.precision import DTYPES


def write_artifact(
    job: Job,
    base: Base,
    data: TrainingData,
    adapter: TrainableAdapter,
    form: TaskForm | None,
    steps: Sequence[Step],
    training: Mapping[str, Any],
    evaluation: Mapping[str, Any],
) -> int:
    """Write a finalized adapter to `job.out`; return the bytes of its weights. Raises `OSError`.

    `training` and `evaluation` are the manifest's entries for people.
    """
    weights = _weights(adapter, job.save_dtype)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        method=_served_name(job.method, adapter),
        base=base.ref,
        prompt_format=None if data.train.is_chat else job.template.prompt_format(),
        generation=GenerationDefaults(temperature=0.0),  # as it was scored
        form=form,
        tools=data.tool_format if data.has_tools else None,
        ends=[base.tokenizer.eos_token_id],
        rotary=base.rotary,
        parity=parity(adapter.model, data.held_rows, data.train_rows, base.ends),
        training=dict(training),
        evaluation=dict(evaluation),
    )
    curves = draw(steps, f"{job.method} on {job.data.name}")
    write_folder(job.out, adapter.config(), weights, manifest, {LOG: lines(steps).encode(), CURVES: curves})
    return len(weights)


def _served_name(method: str, adapter: TrainableAdapter) -> str:
    """Return the server's name of the method; `full`, which no server takes, keeps its own."""
    if not METHODS[method].is_uploadable:
        return method
    return method_of(Artifact(adapter.config(), {}, None, "", 0)).name


def _weights(adapter: TrainableAdapter, save_dtype: str) -> bytes:
    """Return the bytes of adapter_model.safetensors, tensors in the order of their names."""
    tensors = adapter.tensors()
    stored = {name: tensors[name].detach().to("cpu", DTYPES[save_dtype]).contiguous() for name in sorted(tensors)}
    weights: bytes = save(stored, metadata={"format": "pt"})
    return weights
