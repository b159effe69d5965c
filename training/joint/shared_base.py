"""A forward and backward pass shared by many jobs: the base computes all their rows, each adapter only its own.

Each job's adapter is attached to a twin of the base, a model of the same weights. In the pass another twin runs, once,
over all jobs' positions in one line; at a module that an adapter changes, the base's output for that job's positions
goes through PEFT's layer as if the adapter's own twin had computed it. Attention stays within a job's rows. So each job
computes what it would alone, in tensors of the same shapes and with the same dropout; only the base's own products are
over more rows at once.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from training.base import Base
from training.data.batch import Batch, cut_before_head, label_logits, make_batch
from training.data.dataset import TokenizedRow
from training.errors import BaseError
from training.methods.trainable import TrainableAdapter
from training.run.trainer import PendingStep

ATTENTION_NAME = "manyhats_jobs"  # name of our attention in transformers
INSIDE = "base_model.model."  # prefix of the base's modules in a PeftModel
NEAR = 1e-3  # the most that rounding may change a logit

Shape = tuple[int, ...]


def twin(base: Base) -> Base:
    """Return another model of the same weights, into which a method may put layers that the first does not have."""
    shared = {id(tensor): tensor for tensor in (*base.model.parameters(), *base.model.buffers())}
    other = replace(base, model=copy.deepcopy(base.model, shared))
    other.__dict__.update(spec=base.spec, identity=base.identity, num_parameters=base.num_parameters)  # computed once
    return other


class TwinAdapter:
    """An adapter on its twin, whose layers are called one by one, with random numbers of its own."""

    def __init__(self, adapter: TrainableAdapter) -> None:
        self.model = adapter.model
        modules = adapter.model.named_modules()
        self.layers = {
            name.removeprefix(INSIDE): module for name, module in modules if isinstance(module, BaseTunerLayer)
        }
        self._random: Any = torch.cuda if adapter.model.device.type == "cuda" else torch
        self._state = self._random.get_rng_state()

    def seed(self, seed: int) -> None:
        """Seed the adapter's own random numbers."""
        with self._own_random():
            torch.manual_seed(seed)

    def answer(self, site: str, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
        """Return the output of the adapter's layer at a site, whose base module gives `y` for `inputs`."""
        layer = self.layers[site]
        layer.base_layer.forward = lambda *_inputs, **_more: y
        try:
            with self._own_random():
                answer: Tensor = layer(*inputs)
        finally:
            del layer.base_layer.forward
        return answer

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        outside = self._random.get_rng_state()
        self._random.set_rng_state(self._state)
        try:
            yield
        finally:
            self._state = self._random.get_rng_state()
            self._random.set_rng_state(outside)


@dataclass(frozen=True)
class Segment:
    """The rows of a job in a shared pass."""

    adapter: TwinAdapter
    batch: Batch


class SharedBase:
    """The model that computes the shared passes. Raises `BaseError` for a base that cannot be shared so."""

    def __init__(self, base: Base, dtype: torch.dtype = torch.float32) -> None:
        _check(base)
        self._base, self._model, self._dtype = base, twin(base).model, dtype
        AttentionInterface.register(ATTENTION_NAME, _attend)
        AttentionMaskInterface.register(ATTENTION_NAME, lambda *_args, **_more: None)
        self._model.set_attn_implementation(ATTENTION_NAME)

    def backward(self, pending_steps: Mapping[TwinAdapter, PendingStep]) -> dict[TwinAdapter, float]:
        """Leave each step's gradients on its adapter's parameters; return each one's mean loss over label tokens."""
        losses = dict.fromkeys(pending_steps, 0.0)
        for adapter, pending in pending_steps.items():
            adapter.seed(pending.seed)
        for parts in itertools.zip_longest(*(pending.parts for pending in pending_steps.values())):
            rows = {adapter: part for adapter, part in zip(pending_steps, parts, strict=True) if part is not None}
            means = {adapter: loss / pending_steps[adapter].num_labels for adapter, loss in self._losses(rows).items()}
            torch.stack(list(means.values())).sum().backward()
            for adapter, loss in means.items():
                losses[adapter] += loss.item()
        return losses

    @torch.inference_mode()
    def check_isolation(self, rows: Mapping[TwinAdapter, Sequence[TokenizedRow]]) -> None:
        """Raise `BaseError` unless each adapter's logits in a shared pass are those of its own twin."""
        segments = self._segments(rows)
        for segment in segments:
            segment.adapter.model.eval()
        for segment, ours in zip(segments, self._logits(segments), strict=True):
            alone = label_logits(segment.adapter.model, segment.batch)
            if not (ours - alone).abs().max() < NEAR:
                raise BaseError(f"The jobs of {self._base.name} disturb each other in one batch: train them alone.")

    def _losses(self, rows: Mapping[TwinAdapter, Sequence[TokenizedRow]]) -> dict[TwinAdapter, Tensor]:
        """Return each adapter's loss, summed over its label tokens."""
        segments = self._segments(rows)
        with torch.autocast(self._model.device.type, self._dtype, enabled=self._dtype != torch.float32):
            logits = self._logits(segments)
        return {
            segment.adapter: cross_entropy(own, segment.batch.targets, reduction="sum")
            for segment, own in zip(segments, logits, strict=True)
        }

    def _segments(self, rows: Mapping[TwinAdapter, Sequence[TokenizedRow]]) -> list[Segment]:
        return [Segment(adapter, make_batch(own, self._model.device)) for adapter, own in rows.items()]

    def _logits(self, segments: Sequence[Segment]) -> Sequence[Tensor]:
        """Return the logits [num_labels, vocabulary] of each segment."""
        batches = [segment.batch for segment in segments]
        ids, labels = (
            torch.cat([getattr(batch, name).flatten() for batch in batches])[None] for name in ("ids", "labels")
        )
        positions = torch.cat([torch.arange(batch.ids.shape[1]).repeat(len(batch.ids)) for batch in batches])[None]
        with cut_before_head(self._model, labels), _adapters_on(self._model, segments):
            logits: Tensor = self._model(
                input_ids=ids, position_ids=positions.to(ids.device), use_cache=False, segments=segments
            ).logits
        sizes = [len(batch.targets) for batch in batches]
        return logits[: sum(sizes)].float().split(sizes)  # type: ignore[no-any-return]


def _check(base: Base) -> None:
    model = base.model
    if model.config._attn_implementation != "sdpa":
        raise BaseError(f"{base.name} computes attention in a way of its own: train its jobs one by one.")
    drops = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    if any([*drops, getattr(model.config.get_text_config(), "attention_dropout", 0)]):
        raise BaseError(f"{base.name} has dropout of its own, which jobs in one batch would share: train them alone.")


@contextmanager
def _adapters_on(model: Any, segments: Sequence[Segment]) -> Iterator[None]:
    """Put the outputs of the segments' adapters in the place of the model's own, inside the block."""
    head = model.get_output_embeddings()
    handles = []
    for site in {site: None for segment in segments for site in segment.adapter.layers}:
        module = model.get_submodule(site)
        shapes = [_labels(segment) if module is head else _positions(segment) for segment in segments]
        handles.append(module.register_forward_hook(_answer(site, segments, shapes)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _answer(site: str, segments: Sequence[Segment], shapes: Sequence[Shape]) -> Callable[..., Any]:
    """Return a forward hook that gives each segment the output of its adapter's layer."""

    def answer(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output
        own_inputs = [
            _cut(x, shapes) for x in inputs[:1]
        ]  # the tensor that PEFT's layers read, if it was passed by position
        answers = [
            segment.adapter.answer(site, own, own_y) if site in segment.adapter.layers else own_y
            for segment, own_y, *own in zip(segments, _cut(y, shapes), *own_inputs, strict=True)
        ]
        joined = _join(answers, shapes)
        if len(shapes[0]) == 1:  # of the head, which may have padding rows behind those of the labels
            joined = torch.cat([joined, y[len(joined) :]])
        joined = joined.view_as(y)
        return (joined, *output[1:]) if isinstance(output, tuple) else joined

    return answer


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: None,
    segments: Sequence[Segment],
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Compute transformers' own attention [1, heads, positions, dim] over each segment's rows by themselves.

    Causal masks are enough: rows are padded on the right, and outputs at padding are not read.
    """
    shapes = [_positions(segment) for segment in segments]
    own = zip(*(_cut(tensor.transpose(1, 2), shapes) for tensor in (query, key, value)), strict=True)
    answers = [
        sdpa_attention_forward(
            module, *(tensor.transpose(1, 2) for tensor in qkv), _window(qkv[0], sliding_window), **more
        )[0]
        for qkv in own
    ]
    return _join(answers, shapes)[None], None


def _window(query: Tensor, size: int | None) -> Tensor | None:
    """Return a mask [length, length], True if a position [row] sees another [column]; None if all is seen."""
    length = query.shape[1]
    if size is None or length <= size:
        return None
    ones = torch.ones(length, length, dtype=torch.bool, device=query.device)
    return ones.tril().triu(1 - size)


def _positions(segment: Segment) -> Shape:
    return tuple(segment.batch.ids.shape)


def _labels(segment: Segment) -> Shape:
    return (len(segment.batch.targets),)


def _cut(tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """Cut [1, positions, …] into each segment's [rows, length, …], and the head's [num_labels, …] likewise."""
    flat, sizes = tensor if len(shapes[0]) == 1 else tensor.squeeze(0), [math.prod(shape) for shape in shapes]
    parts = torch.unsafe_split_with_sizes(flat[: sum(sizes)], sizes)  # a layer may write into them
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


def _join(parts: Sequence[Tensor], shapes: Sequence[Shape]) -> Tensor:
    """Join the segments' tensors into one line, as before `_cut`."""
    return torch.cat([part.flatten(0, len(shape) - 1) for part, shape in zip(parts, shapes, strict=True)])
