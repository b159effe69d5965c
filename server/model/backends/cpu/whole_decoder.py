"""Run all decoder layers of a base in one call of a kernel, over records of their parts' addresses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.model.backends.attention_params import AttentionParams, KVLayer, num_heads
from server.model.backends.base import DecoderLayer, LinearPart, NormPart
from server.model.backends.cpu import decoder
from server.model.backends.cpu.adapter_ops import PreparedRows
from server.model.backends.cpu.attention import AttentionTiles
from server.model.backends.cpu.loops import item_type
from server.model.backends.cpu.weights import PackedProduct
from server.model.row_adapters import SiteGroup


class CpuWholeDecoder:
    """Computes `layers`, whose products were packed here. The records of one cache are kept until another comes."""

    def __init__(self, layers: Sequence[DecoderLayer]) -> None:
        self._layers = layers
        self._item_type = _packed(layers[0].down).item_type
        self._kv: Sequence[KVLayer] | None = None  # that `_records` have addresses of
        self._records = np.zeros(0, decoder.LAYER)
        self._item_types = decoder.ItemTypes(self._item_type, self._item_type)
        self._norm: NormPart | None = None  # that `_last` has the address of
        self._last = np.zeros(0, decoder.NORM)

    def __call__(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        layout: AttentionTiles,
        kv: Sequence[KVLayer],
        adapters: PreparedRows,
        norm: NormPart | None,
    ) -> Tensor:
        """Compute hidden [T, size] -> [T, size], see `WholeDecoder`."""
        if kv is not self._kv or norm is not self._norm:  # loading moves weights before it makes the steps' cache
            self._kv, self._records = kv, self._record_layers(kv)
            self._item_types = decoder.ItemTypes(self._item_type, item_type(kv_arrays(kv[0])[0].dtype))
            self._norm, self._last = norm, np.array([] if norm is None else [_norm(norm)], decoder.NORM)
        cos, sin = rotary[0].numpy(), rotary[1].numpy()
        out = decoder.decoder_layers(
            hidden.numpy(),
            self._records,
            self._last,
            decoder.Rotary(cos, sin, cos[:, :0]),
            layout,
            self._item_types,
            adapters.args,
            torch.get_num_threads(),
        )
        return torch.from_numpy(out)

    def _record_layers(self, kv: Sequence[KVLayer]) -> NDArray[np.void]:
        records = np.zeros(len(self._layers), decoder.LAYER)
        for record, layer in zip(records, self._layers, strict=True):
            record["input_norm"], record["mlp_norm"] = _norm(layer.input_norm), _norm(layer.mlp_norm)
            for name in ("qkv", "out", "gate_up", "down"):
                record[name] = _linear(getattr(layer, name))
            record["attention"], record["mlp"] = _group(layer.attention_group), _group(layer.mlp_group)
            record["layer"], record["activation"] = _group(layer.group), layer.gate
            of_layer = kv[layer.layer]
            record["cache"], record["params"] = _cache(of_layer), _params(layer, of_layer)
        return records


def kv_arrays(layer: KVLayer) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """Return a layer's keys and values as the kernels take them; halves by their bits, see `vector`."""
    keys, values = layer.keys.numpy(), layer.values.numpy()
    return (keys.view(np.uint16), values.view(np.uint16)) if keys.dtype == np.float16 else (keys, values)


def kernel_params(params: AttentionParams) -> tuple[np.float32, int, np.float32]:
    """Return (scaling, window, softcap) in the kernels' types."""
    return np.float32(params.scaling), params.window, np.float32(params.cap)


def _packed(part: LinearPart) -> PackedProduct:
    if not isinstance(part.product, PackedProduct):
        raise TypeError("a whole decoder needs products that this backend packed")
    return part.product


def _group(group: SiteGroup) -> tuple[Any, ...]:
    return group.number, len(group.sites), group.sites.ctypes.data, group.columns.ctypes.data


def _norm(norm: NormPart) -> tuple[Any, ...]:
    return norm.weight.data_ptr(), norm.eps, _group(norm.group)


def _linear(part: LinearPart) -> tuple[Any, ...]:
    product = _packed(part)
    weight, start, scales, bias = product.arrays
    addresses = [array.ctypes.data for array in (start, scales, bias)]
    sizes = len(weight), weight.shape[1], product.size_out
    return weight.ctypes.data, *sizes, *addresses, len(scales), _group(part.group)


def _cache(kv: KVLayer) -> tuple[Any, ...]:
    return kv.keys.data_ptr(), kv.values.data_ptr(), tuple(kv.keys.shape), tuple(kv.values.shape), kv.block_size


def _params(layer: DecoderLayer, kv: KVLayer) -> tuple[Any, ...]:
    scaling, window, softcap = kernel_params(layer.params)
    heads = num_heads(int(layer.qkv.group.columns[-1]), kv.shape)
    return scaling, softcap, window, heads, kv.shape.value_dim, layer.is_rotated
