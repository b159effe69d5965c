"""Run all decoder layers of a base in one call of its backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from server.model.attention.paged_batch import PagedBatch
from server.model.backends.base import DecoderLayer, WholeDecoder
from server.model.instrument.layers import Attention, GatedMLP, RMSNorm
from server.model.row_adapters import SiteGroup
from server.model.slots.slots import AdapterSlots

STEADY = {"default", "linear", "llama3", "yarn", "proportional"}  # rotary kinds whose factors no length changes
KNOWN = 8192  # positions whose cosines and sines are kept: 4 MiB of SmolLM2


class FusedDecoder:
    """The forward of layers whose parts are fused, h + attention(norm(h)), then h + mlp(norm(h)), in one call.

    `compute` is the backend's. It is installed as the forward of the first layer; the others hand on what it gave. The
    stock forwards call the parts, which compute the same bits. `sites` are those at which it applies adapters itself.
    """

    def __init__(
        self, layers: list[Any], adapter_slots: AdapterSlots, groups: list[SiteGroup], compute: WholeDecoder
    ) -> None:
        self.stock, self.adapter_slots = [layer.forward for layer in layers], adapter_slots
        self.layers, self.compute = layers, compute
        self.sites = {int(own.sites[0]) for own in groups}

    def __call__(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Compute hidden_states [1, T, size] -> [1, T, size], as transformers calls a layer."""
        cos, sin = (part[0] for part in kwargs["position_embeddings"])
        return self.run(hidden_states[0], (cos, sin), kwargs["paged"])[None]

    def run(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], paged: PagedBatch, norm: RMSNorm | None = None
    ) -> Tensor:
        """Compute hidden [T, size] through the layers, and the norm behind them; rotary = (cos, sin) [T, rotated]."""
        adapters, part = self.adapter_slots.step.of_tokens, None if norm is None else norm.part
        return self.compute(hidden, rotary, paged.layout, paged.cache.layers, adapters, part)

    def install(self) -> None:
        """Compute so from now on."""
        self.layers[0].forward = self
        for layer in self.layers[1:]:
            layer.forward = _hand_on


def describe_layer(layer: Any, group: SiteGroup) -> DecoderLayer:
    """Describe a layer whose parts are all fused, for `Backend.whole_decoder`."""
    attends, mlp = layer.self_attn, layer.mlp
    return DecoderLayer(
        input_norm=layer.input_layernorm.part,
        qkv=attends.qkv.part,
        layer=attends.layer_idx,
        params=attends.params,
        is_rotated=attends.is_rotated,
        out=attends.out.part,
        attention_group=attends.group,
        mlp_norm=layer.post_attention_layernorm.part,
        gate_up=mlp.gate_up.part,
        gate=mlp.gate,
        down=mlp.down.part,
        mlp_group=mlp.group,
        group=group,
    )


class RotaryTable:
    """Cosines and sines of positions by the base's own module, those of the first `KNOWN` once and for all.

    They are kept only if a position's are always the same.
    """

    def __init__(self, rotary: Any) -> None:
        self.rotary = rotary
        self.table: tuple[Tensor, Tensor] | None = None
        if getattr(rotary, "rope_type", "") in STEADY:
            self.table = self._compute(torch.arange(KNOWN))

    def _compute(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary(torch.empty(0), position_ids[None])
        return cos[0], sin[0]

    def __call__(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return position_ids [T] -> (cos, sin), each [T, rotated]."""
        if self.table is None or int(position_ids.max()) >= KNOWN:
            return self._compute(position_ids)
        cos, sin = self.table
        return cos.index_select(0, position_ids), sin.index_select(0, position_ids)


class DirectForward:
    """The forward of a model whose layers are one call, without what transformers does between its parts.

    Between steps all of Python and torch leave the CPU's caches for the weights, so that every call costs several times
    what it does in a loop of its own: with fewer of them, here and in the sampler, a step of one row of SmolLM2 takes
    9.4 to 10 ms instead of 10.6. `load.forward` is the slow twin.
    """

    def __init__(self, model: Any, layers: FusedDecoder) -> None:
        stock = model.get_decoder()
        self.embed, self.rotary, self.layers = model.get_input_embeddings(), RotaryTable(stock.rotary_emb), layers
        self.norm, self.head = stock.norm, model.get_output_embeddings()
        self.fused_norm = self.norm if isinstance(self.norm, RMSNorm) else None

    def __call__(self, token_ids: Tensor, position_ids: Tensor, wanted: Tensor, paged: PagedBatch) -> Tensor:
        """Compute token_ids [T], position_ids [T], wanted [R] indices of T -> logits [R, vocabulary] in fp32."""
        hidden = self.embed(token_ids[None])[0]
        hidden = self.layers.run(hidden, self.rotary(position_ids), paged, self.fused_norm)
        if self.fused_norm is None:
            hidden = self.norm(hidden[None])[0]
        logits: Tensor = self.head(hidden.index_select(0, wanted)[None])[0]
        return logits.float()


def _hand_on(hidden_states: Tensor, **_other: Any) -> Tensor:
    return hidden_states


def is_whole(layer: Any) -> bool:
    """Whether all parts of a layer are fused, and there are no others."""
    kinds = {"self_attn": Attention, "mlp": GatedMLP, "input_layernorm": RMSNorm, "post_attention_layernorm": RMSNorm}
    return {name: type(child) for name, child in layer.named_children()} == kinds and layer.mlp.gate is not None
