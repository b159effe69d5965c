"""Parts of decoder layers, computed by a backend: RMS norm, gated feed-forward block, attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from server.model.attention.attend import attend
from server.model.attention.paged_batch import PagedBatch
from server.model.backends.attention_params import AttentionParams
from server.model.backends.base import Backend, NormPart, PackLinear
from server.model.backends.codes import GATE_CODES
from server.model.instrument.linear import AdapterLinear
from server.model.instrument.recognise import norm_eps
from server.model.row_adapters import SiteGroup
from server.model.slots.slots import AdapterSlots


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps); some bases keep the weight less one (arXiv:1910.07467)."""

    def __init__(self, norm: Any, offset: float, group: SiteGroup, backend: Backend) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach().float() + offset, requires_grad=False)
        self.eps = norm_eps(norm)
        self.part = NormPart(self.weight, self.eps, group)  # for a whole decoder
        self._rms_norm = backend.rms_norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the rows of x [..., size]."""
        return self._rms_norm(x, self.weight, self.eps)


class GatedMLP(nn.Module):
    """y = W_down (act(W_gate x) * W_up x): gate and up are one product (arXiv:2002.05202).

    `gate` is the code of its activation, None if no backend knows it.
    """

    def __init__(self, mlp: Any, site: str, adapter_slots: AdapterSlots, pack: PackLinear) -> None:
        super().__init__()
        self.gate_up = AdapterLinear(
            [mlp.gate_proj, mlp.up_proj], pack, adapter_slots, [f"{site}.gate_proj", f"{site}.up_proj"], False
        )
        self.down = AdapterLinear([mlp.down_proj], pack, adapter_slots, [f"{site}.down_proj"], False)
        self.group = adapter_slots.group(site)
        self.act_fn, self._gate = mlp.act_fn, adapter_slots.backend.gate
        self.gate = next((code for name, code in GATE_CODES.items() if _is_act(mlp.act_fn, name)), None)

    def forward(self, x: Tensor) -> Tensor:
        """Compute x [..., in] -> [..., in]."""
        gate_up = self.gate_up(x)
        if self.gate is None:
            gate, up = gate_up.chunk(2, -1)
            return self.down(self.act_fn(gate) * up)  # type: ignore[no-any-return]
        return self.down(self._gate(gate_up, self.gate))  # type: ignore[no-any-return]


def _is_act(act: Any, name: str) -> bool:
    return type(act) is type(ACT2FN[name])


class Attention(nn.Module):
    """Attention with q, k and v as one product; the backend rotates queries and keys if `is_rotated`."""

    def __init__(
        self,
        stock: Any,
        site: str,
        adapter_slots: AdapterSlots,
        pack: PackLinear,
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
        """Compute hidden_states [1, T, size] -> ([1, T, size], None), as transformers' attention modules answer."""
        qkv = self.qkv(hidden_states)[0]
        if self.is_rotated:
            cos, sin = (part[0] for part in position_embeddings)
        else:
            cos = sin = qkv.new_empty(len(qkv), 0)
        attended = attend(paged, self.layer_idx, qkv, cos, sin, self.params)
        return self.out(attended.flatten(1)[None]), None
