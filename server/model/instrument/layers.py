"""Layers that replace a base's own: RMS norm, gated MLP, attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from server.model.attention import attend
from server.model.attention.paged_batch import PagedBatch
from server.model.attention.params import AttentionParams
from server.model.backends import cpu
from server.model.backends.base import Packer
from server.model.backends.cpu import layers
from server.model.instrument.linear import AdapterLinear
from server.model.instrument.recognise import norm_eps
from server.model.row_adapters import SiteGroup
from server.model.slots.slots import AdapterSlots


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), where some bases keep the weight less one (arXiv:1910.07467)."""

    def __init__(self, norm: Any, offset: float, group: SiteGroup) -> None:
        super().__init__()
        self.group = group
        self.weight = nn.Parameter(norm.weight.detach().float() + offset, requires_grad=False)
        self.eps = norm_eps(norm)

    def forward(self, x: Tensor) -> Tensor:
        if not cpu.supports(x.device.type, x.dtype):
            return functional.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        out = torch.empty_like(rows)
        layers.rms_norm(rows.numpy(), self.weight.numpy(), np.float32(self.eps), out.numpy())
        return out.view(x.shape)


class GatedMLP(nn.Module):
    """y = W_down (act(W_gate x) * W_up x): gate and up are one product (arXiv:2002.05202)."""

    def __init__(self, mlp: Any, site: str, adapter_slots: AdapterSlots, pack: Packer) -> None:
        super().__init__()
        self.gate_up = AdapterLinear(
            [mlp.gate_proj, mlp.up_proj], pack, adapter_slots, [f"{site}.gate_proj", f"{site}.up_proj"], False
        )
        self.down = AdapterLinear([mlp.down_proj], pack, adapter_slots, [f"{site}.down_proj"], False)
        self.group = adapter_slots.group(site)
        self.act_fn = mlp.act_fn
        self.gate = next((code for name, code in layers.GATES.items() if _is_act(mlp.act_fn, name)), None)

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)
        if self.gate is None or not cpu.supports(x.device.type, x.dtype):
            gate, up = gate_up.chunk(2, -1)
            return self.down(self.act_fn(gate) * up)  # type: ignore[no-any-return]
        out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        layers.gate(gate_up.view(-1, gate_up.shape[-1]).numpy(), self.gate, out.view(-1, out.shape[-1]).numpy())
        return self.down(out)  # type: ignore[no-any-return]


def _is_act(act: Any, name: str) -> bool:
    return type(act) is type(ACT2FN[name])


class Attention(nn.Module):
    """Attention with q, k and v as one product; queries and keys are turned in the kernel where `is_rotated`."""

    def __init__(
        self,
        stock: Any,
        site: str,
        adapter_slots: AdapterSlots,
        pack: Packer,
        params: AttentionParams,
        is_rotated: bool = True,
    ) -> None:
        super().__init__()
        projections = [stock.q_proj, stock.k_proj, stock.v_proj]
        sites = [f"{site}.q_proj", f"{site}.k_proj", f"{site}.v_proj"]
        self.qkv = AdapterLinear(projections, pack, adapter_slots, sites, False)
        self.out = AdapterLinear([stock.o_proj], pack, adapter_slots, [f"{site}.o_proj"], False)
        self.group = adapter_slots.group(site)
        self.layer_idx, self.params, self.is_rotated = stock.layer_idx, params, is_rotated

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], paged: PagedBatch, **_other: Any
    ) -> tuple[Tensor, None]:
        qkv = self.qkv(hidden_states)[0]
        if self.is_rotated:
            cos, sin = (part[0] for part in position_embeddings)
        else:
            cos = sin = qkv.new_empty(len(qkv), 0)
        attended = attend.attend(paged, self.layer_idx, qkv, cos, sin, self.params)
        return self.out(attended.flatten(1)[None]), None
