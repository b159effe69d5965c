"""Count what of an instrumented model is fused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from adapters_store.base.spec import BaseSpec
from server.core import ForwardReport, FusedCount
from server.model.backends.base import Backend
from server.model.instrument.layers import Attention, GatedMLP, RMSNorm
from server.model.instrument.whole_decoder import DirectForward, FusedDecoder


def report_forward(model: nn.Module, spec: BaseSpec, backend: Backend, forward: Any) -> ForwardReport:
    """Say how a base is computed: `model` with its parts replaced, `forward` the function that steps call."""
    is_direct = isinstance(forward, DirectForward)
    return ForwardReport(
        backend=backend.name,
        precision=backend.precision,
        num_threads=torch.get_num_threads(),
        num_layers=spec.num_layers,
        attentions=_count(model, [layer.attention for layer in spec.layers], Attention),
        gated_blocks=_count(model, [layer.mlp or layer.layer for layer in spec.layers], GatedMLP),
        norms=_count(model, spec.norms, RMSNorm),
        is_whole_decoder=is_direct
        or any(isinstance(_forward(model, layer.layer), FusedDecoder) for layer in spec.layers),
        is_direct=is_direct,
    )


def _count(model: nn.Module, sites: Iterable[str], kind: type[nn.Module]) -> FusedCount:
    modules = [model.get_submodule(site) for site in sites]
    return FusedCount(sum(isinstance(module, kind) for module in modules), len(modules))


def _forward(model: nn.Module, site: str) -> object:
    return model.get_submodule(site).forward
