"""Load a base, instrument transformers' own modules, and check that the instrumented base computes the same."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters_store.base.describe import describe, end_token_ids, linears
from adapters_store.base.identity import BaseUnavailableError, base_identity
from adapters_store.base.rotary import fix_rotary
from adapters_store.base.spec import BaseSpec, KVShape
from server import process_memory
from server.core import ForwardReport
from server.model.attention import interface
from server.model.attention.interface import AttentionProbe
from server.model.attention.kv_cache import KVCache
from server.model.backends.base import Backend
from server.model.backends.choose import choose_backend
from server.model.errors import UnsupportedBaseError
from server.model.instrument.fuser import CallRecorder, LayerFuser
from server.model.instrument.hooks import SiteHooks
from server.model.instrument.linear import AdapterLinear
from server.model.instrument.report import report_forward
from server.model.instrument.whole_decoder import DirectForward
from server.model.slots.slots import AdapterSlots
from server.model.verify import REFERENCE_TOKENS, Forward, ReferenceCheck, starts_at_borders

log = logging.getLogger(__name__)
FIXED = (
    "rotary factors that change with length are fixed to those of the longest sequence that is served (%s, for %d); "
    "a shorter --max-sequence-tokens chooses those of shorter sequences"
)


@dataclass
class InstrumentedBase:
    """The frozen model, instrumented: its forward takes T tokens of many sequences and a `PagedBatch`."""

    model: nn.Module
    spec: BaseSpec
    adapter_slots: AdapterSlots
    hooks: SiteHooks
    backend: Backend
    eos_token_ids: list[int]
    forward: Forward
    report: ForwardReport
    max_tokens: int  # of the longest sequence that it may be asked for


def load_base(
    folder: Path,
    name: str,
    precision: str,
    device: str,
    backend: Backend | None = None,
    max_tokens_of: Callable[[BaseSpec], int] = attrgetter("max_positions"),
) -> InstrumentedBase:
    """Load and instrument a Hugging Face folder, for a given backend or the one that is chosen.

    `max_tokens_of` says for the base's spec how long the longest sequence is that will be served.
    Raises `UnsupportedBaseError` with the reason if the base cannot be served rightly, and `FusedPartError` if our own
    code fails on a part of it.
    """
    backend = choose_backend(precision, device) if backend is None else backend
    model = _load_model(folder, backend.dtypes.others, backend.device)
    try:
        spec = describe(model, name, base_identity(folder).identity, folder)
    except BaseUnavailableError as error:
        raise UnsupportedBaseError(str(error)) from error
    backend.wake()
    _round(model, backend)
    with torch.inference_mode():
        max_tokens = max(1, min(spec.max_positions, max_tokens_of(spec)))
        with _foreign(spec.architecture):
            rotary = fix_rotary(model, max_tokens)
        if rotary:
            log.warning(FIXED, rotary, max_tokens)
        base = _instrument(model, spec, backend, max_tokens)
        base.report = msgspec.structs.replace(base.report, rotary=rotary)
        _release_files(model)
        return base


@contextmanager
def _foreign(architecture: str) -> Iterator[None]:
    """Turn errors of transformers' own code into a refusal: this server does not know the architecture."""
    try:
        yield
    except (TypeError, AttributeError, KeyError, ValueError, RuntimeError, IndexError) as error:
        raise UnsupportedBaseError(f"{architecture} cannot be instrumented: {type(error).__name__}: {error}") from error


def _load_model(folder: Path, dtype: torch.dtype, device: str) -> nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would be drawn into the log
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedBaseError(f"{folder} cannot be loaded as a decoder-only base: {reason}") from error
    return model.to(device).eval().requires_grad_(False)  # type: ignore[no-any-return]


def _round(model: nn.Module, backend: Backend) -> None:
    """Give every linear layer the weight that its product keeps, so that the comparison is of the arithmetic alone.

    A tied embedding stays as it was.
    """
    for linear in linears(model).values():
        weight, is_transposed = linear.weight.detach(), isinstance(linear, Conv1D)
        kept = backend.rounded(weight.T).T if is_transposed else backend.rounded(weight)
        linear.weight = nn.Parameter(kept, requires_grad=False)


def _instrument(model: Any, spec: BaseSpec, backend: Backend, max_tokens: int) -> InstrumentedBase:
    """Learn how the stock model attends, replace its parts and its linear layers, and compare."""
    interface.install()
    with _foreign(spec.architecture):
        reference = ReferenceCheck(model)
        model.set_attn_implementation(interface.ATTENTION_NAME)
    probe, recorder = AttentionProbe(), CallRecorder()
    hooks = SiteHooks(model, spec)
    parts = [site for layer in spec.layers for site in (layer.layer, layer.attention, layer.mlp) if site]
    watching = recorder.watching(model, [*spec.norms, *parts])
    with _foreign(spec.architecture), watching, hooks.learning(2 * REFERENCE_TOKENS):
        reference.run(partial(forward, model), probe)
    spec = replace(spec, kv=_learned_kv(spec, probe))
    adapter_slots = AdapterSlots(spec, backend)
    hooks.connect(adapter_slots)
    pack, head = backend.pack_linear, model.get_output_embeddings()
    cache = KVCache(spec.kv, 2, REFERENCE_TOKENS, backend)
    paged = reference.paged(cache)
    fused_decoder = LayerFuser(model, adapter_slots, pack, probe.params_of_layer, recorder, paged).fuse()
    for site, linear in linears(model).items():
        parent, _, child = site.rpartition(".")
        setattr(
            model.get_submodule(parent), child, AdapterLinear([linear], pack, adapter_slots, [site], linear is head)
        )
    compute: Forward = partial(forward, model)
    try:
        logits = reference.run(compute, paged)
    except AttributeError as error:  # a module of its own reads what our linear layers do not have
        raise UnsupportedBaseError(f"{spec.architecture} cannot be instrumented: {error}") from error
    reference.compare(logits, spec.architecture, adapter_slots.dtypes)
    if fused_decoder is not None:
        hooks.inside = fused_decoder.sites
        direct = DirectForward(model, fused_decoder)
        compute = direct if torch.equal(reference.run(direct, paged), logits) else compute
    starts = starts_at_borders(model.config.get_text_config().to_dict(), max_tokens)
    reference.check_apart(compute, paged, logits, starts, spec.architecture)
    report = report_forward(model, spec, backend, compute)
    ends = end_token_ids(model)
    return InstrumentedBase(model, spec, adapter_slots, hooks, backend, ends, compute, report, max_tokens)


def _release_files(model: nn.Module) -> None:
    """Leave nothing mapped of the base's files, which others can change, and give back what packing freed."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
    gc.collect()
    process_memory.trim()


def _learned_kv(spec: BaseSpec, probe: AttentionProbe) -> list[KVShape]:
    kv = [probe.shapes[layer] for layer in sorted(probe.shapes)]
    if sorted(probe.shapes) != list(range(spec.num_layers)) or len({shape.num_kv_heads for shape in kv}) != 1:
        raise UnsupportedBaseError(
            f"{spec.architecture} has {spec.num_layers} layers, of which attention of equal kv heads "
            f"was seen in {len(probe.shapes)}"
        )
    return kv


def forward(model: Any, token_ids: Tensor, position_ids: Tensor, wanted: Tensor, paged: Any) -> Tensor:
    """token_ids [T], position_ids [T], wanted [R] indices of T -> logits [R, vocabulary] in fp32."""
    out = model(
        input_ids=token_ids[None], position_ids=position_ids[None], use_cache=False, logits_to_keep=wanted, paged=paged
    )
    return out.logits[0].float()  # type: ignore[no-any-return]
