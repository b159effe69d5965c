"""All decoder layers of a base in one call of a backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters_store.base.spec import KVShape
from server.model.attention import params
from server.model.attention.kv_cache import KVCache
from server.model.attention.paged_batch import PagedBatch
from server.model.backends.cpu import decoder
from server.model.backends.cpu.weights import PackedProduct
from server.model.instrument.layers import Attention, GatedMLP, RMSNorm
from server.model.instrument.linear import AdapterLinear
from server.model.row_adapters import SiteGroup
from server.model.slots.slots import AdapterSlots

STEADY = {"default", "linear", "llama3", "yarn"}  # kinds of rotary embeddings that no length of a sequence changes
KNOWN = 8192  # positions whose turns are kept: 4 MiB of SmolLM2


class FusedDecoder:
    """The forward of layers whose parts are fused, h + attention(norm(h)), then h + mlp(norm(h)), as one kernel.

    It is that of the first; the others hand on what it gave. The stock forwards call the parts, which use the same
    kernels, so that the results are the same bits.
    """

    def __init__(self, layers: list[Any], adapter_slots: AdapterSlots, groups: list[SiteGroup]) -> None:
        self.stock, self.adapter_slots = [layer.forward for layer in layers], adapter_slots
        self.layers, self.groups = layers, groups
        self.item_type = layers[0].mlp.down.product.arrays[0][:0, 0, 0]
        self.records = np.zeros(0, decoder.LAYER)
        self.cache: KVCache | None = None  # that `records` have addresses of
        self.norm: RMSNorm | None = None  # that `last` has the address of
        self.last = np.zeros(0, decoder.NORM)

    def __call__(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        cos, sin = (part[0] for part in kwargs["position_embeddings"])
        return self.run(hidden_states[0], (cos, sin), kwargs["paged"])[None]

    def run(self, hidden: Tensor, rotary: tuple[Tensor, ...], paged: PagedBatch, norm: RMSNorm | None = None) -> Tensor:
        """hidden [T, size] through the layers, and the norm behind them; turns = (cos, sin), each [T, turned]."""
        if paged.cache is not self.cache or norm is not self.norm:
            self.cache, self.records = paged.cache, self._records(paged.cache)
            self.norm, self.last = norm, np.array([] if norm is None else [_norm(norm)], decoder.NORM)
        cos, sin = (part.numpy() for part in rotary)
        out = decoder.decoder_layers(
            hidden.numpy(),
            self.records,
            self.last,
            (cos, sin, cos[:, :0]),
            paged.arrays(),
            (self.item_type, paged.cache.arrays(0)[0][:0, 0, 0, 0]),
            self.adapter_slots.arrays(self.adapter_slots.tokens),
            torch.get_num_threads(),
        )
        return torch.from_numpy(out)

    def install(self) -> None:
        """Compute so from now on."""
        self.layers[0].forward = self
        for layer in self.layers[1:]:
            layer.forward = _hand_on
        self.adapter_slots.inside |= {int(own.sites[0]) for own in self.groups}

    def _records(self, cache: KVCache) -> NDArray[np.void]:
        """What the kernel takes of every layer."""
        records = np.zeros(len(self.layers), decoder.LAYER)
        for record, layer, own in zip(records, self.layers, self.groups, strict=True):
            attends, mlp = layer.self_attn, layer.mlp
            record["input_norm"], record["mlp_norm"] = map(
                _norm, (layer.input_layernorm, layer.post_attention_layernorm)
            )
            record["qkv"], record["out"] = map(_linear, (attends.qkv, attends.out))
            record["gate_up"], record["down"] = map(_linear, (mlp.gate_up, mlp.down))
            record["attention"], record["mlp"], record["layer"] = map(_group, (attends.group, mlp.group, own))
            record["cache"] = _cache(cache, attends.layer_idx)
            record["params"] = _params(attends, cache.shapes[attends.layer_idx])
            record["activation"] = mlp.gate
        return records


class RotaryTable:
    """Cosines and sines of positions by the base's own module, those of the first `KNOWN` once and for all.

    Only where a position's are always the same.
    """

    def __init__(self, rotary: Any) -> None:
        self.rotary = rotary
        self.table: tuple[Tensor, ...] = ()
        if getattr(rotary, "rope_type", "") in STEADY:
            self.table = self._compute(torch.arange(KNOWN))

    def _compute(self, position_ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(part[0] for part in self.rotary(torch.empty(0), position_ids[None]))

    def __call__(self, position_ids: Tensor) -> tuple[Tensor, ...]:
        """position_ids [T] -> (cos, sin), each [T, turned]."""
        if not self.table or int(position_ids.max()) >= KNOWN:
            return self._compute(position_ids)
        return tuple(part.index_select(0, position_ids) for part in self.table)


class DirectForward:
    """The forward of a model whose layers are one call, without what transformers does between its parts.

    Between steps all of Python and torch leave the CPU's caches for the weights, so that every call costs several times
    what it does in a loop of its own: with fewer of them, here and in the sampler, a step of one row of SmolLM2 takes
    9.4 to 10 ms instead of 10.6. `base.forward` is the slow twin.
    """

    def __init__(self, model: Any, layers: FusedDecoder) -> None:
        stock = model.get_decoder()
        self.embed, self.rotary, self.layers = model.get_input_embeddings(), RotaryTable(stock.rotary_emb), layers
        self.norm, self.head = stock.norm, model.get_output_embeddings()
        self.inside = self.norm if isinstance(self.norm, RMSNorm) else None

    def __call__(self, token_ids: Tensor, position_ids: Tensor, wanted: Tensor, paged: PagedBatch) -> Tensor:
        """token_ids [T], position_ids [T], wanted [R] indices of T -> logits [R, vocabulary] in fp32."""
        hidden = self.embed(token_ids[None])[0]
        hidden = self.layers.run(hidden, self.rotary(position_ids), paged, self.inside)
        if self.inside is None:
            hidden = self.norm(hidden[None])[0]
        logits: Tensor = self.head(hidden.index_select(0, wanted)[None])[0]
        return logits.float()


def _hand_on(hidden_states: Tensor, **_other: Any) -> Tensor:
    return hidden_states


def _group(group: SiteGroup) -> tuple[Any, ...]:
    return group.number, len(group.sites), group.sites.ctypes.data, group.columns.ctypes.data


def _norm(norm: RMSNorm) -> tuple[Any, ...]:
    return norm.weight.data_ptr(), norm.eps, _group(norm.group)


def _linear(linear: AdapterLinear) -> tuple[Any, ...]:
    product = linear.product
    if not isinstance(product, PackedProduct):
        raise TypeError("a layer in one call needs packed weights")
    weight, start, scales, bias = product.arrays
    addresses = [array.ctypes.data for array in (start, scales, bias)]
    sizes = len(weight), weight.shape[1], product.size_out
    return weight.ctypes.data, *sizes, *addresses, len(scales), _group(linear.group)


def _cache(cache: KVCache, layer: int) -> tuple[Any, ...]:
    keys, values = cache.keys[layer], cache.values[layer]
    return keys.data_ptr(), values.data_ptr(), tuple(keys.shape), tuple(values.shape), cache.block_size


def _params(attends: Attention, shape: KVShape) -> tuple[Any, ...]:
    scaling, window, softcap = attends.params.numbers()
    heads = params.num_heads(int(attends.qkv.group.columns[-1]), shape)
    return scaling, softcap, window, heads, shape.value_dim, attends.is_rotated


def is_whole(layer: Any) -> bool:
    """Whether all parts of a layer are fused, and there are no others."""
    kinds = {"self_attn": Attention, "mlp": GatedMLP, "input_layernorm": RMSNorm, "post_attention_layernorm": RMSNorm}
    return {name: type(child) for name, child in layer.named_children()} == kinds and layer.mlp.gate is not None
