"""Compute Llama-like decoder layers in one call: the kernels of their parts, without Python between them.

Layers are records of sizes and addresses, so that one compiled kernel serves any number of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from server.model.backends.codes import PROJECTION, SCALE_IN
from server.model.backends.cpu.adapters import apply, enter, list_prefetch
from server.model.backends.cpu.attention import KernelParams, attend
from server.model.backends.cpu.layers import add, gate, rms_norm
from server.model.backends.cpu.loops import ItemType
from server.model.backends.cpu.product import product
from server.model.backends.cpu.vector import FLOATS, PANEL, copy, view
from server.model.row_adapters import SiteGroup

INTEGERS = np.empty(0, np.int64)
INT, FLOAT = np.int64, np.float32
# Sites that share an input: `SiteGroup`, with the addresses of its arrays.
GROUP = np.dtype([("number", INT), ("parts", INT), ("sites", INT), ("columns", INT)])
NORM = np.dtype([("weight", INT), ("eps", FLOAT), ("group", GROUP)], align=True)
# `PackedProduct` with the addresses of its arrays; scales and bias have `factors` items.
LINEAR = np.dtype(
    [(name, INT) for name in ("weight", "panels", "size_in", "size_out", "start", "scales", "bias", "factors")]
    + [("group", GROUP)]
)
CACHE = np.dtype([("keys", INT), ("values", INT), ("key_shape", INT, 4), ("value_shape", INT, 4), ("block_size", INT)])
PARAMS = np.dtype(
    [("scaling", FLOAT), ("softcap", FLOAT), ("window", INT), ("heads", INT), ("d_v", INT), ("is_rotated", INT)]
)
_IN_ORDER = [
    *(("input_norm", NORM), ("qkv", LINEAR), ("cache", CACHE), ("params", PARAMS), ("out", LINEAR)),
    *(("attention", GROUP), ("mlp_norm", NORM), ("gate_up", LINEAR), ("activation", INT), ("down", LINEAR)),
    *(("mlp", GROUP), ("layer", GROUP)),
]
LAYER = np.dtype(_IN_ORDER)


class Rotary(NamedTuple):
    """Cosines and sines [T, rotated] of a step's positions, and `none` [T, 0] for layers that do not rotate."""

    cos: NDArray[np.float32]
    sin: NDArray[np.float32]
    none: NDArray[np.float32]


class ItemTypes(NamedTuple):
    """The types of items of weights and of the KV cache."""

    weights: ItemType
    cache: ItemType


@njit(inline="always")
def _group(group):
    """Return a `SiteGroup`, as `apply` takes it, of its record."""
    sites, columns = view(group.sites, (group.parts,), INTEGERS), view(group.columns, (group.parts + 1,), INTEGERS)
    return SiteGroup(group.number, sites, columns)


@njit(cache=True)
def _norm(x, norm, args):
    """Compute what an `RMSNorm` and its adapters do."""
    out = np.empty_like(x)
    rms_norm(x, view(norm.weight, (x.shape[1],), FLOATS), norm.eps, out)
    apply(x, x, out, _group(norm.group), args)
    return out


@njit(cache=True)
def _product(x, linear, first, last, item_type, threads, prefetch_list):
    """Compute panels [first, last) of W x + b; `prefetch_list` is read afterwards."""
    begin = first * PANEL
    out = np.empty((x.shape[0], min(last * PANEL, linear.size_out) - begin), np.float32)
    weight = view(linear.weight, (linear.panels, linear.size_in, PANEL), item_type.sample)[first:last]
    start = view(linear.start, (linear.panels * PANEL,), FLOATS)[begin:]
    scales, bias = view(linear.scales, (linear.factors,), FLOATS), view(linear.bias, (linear.factors,), FLOATS)
    product(x, weight, start, scales[begin:], bias[begin:], out, threads, prefetch_list, item_type)
    return out


@njit(cache=True)
def _linear(x, linear, item_type, args, threads):
    """Compute what an `AdapterLinear` does."""
    group = _group(linear.group)
    acts = args.acts[group.number]
    if acts[SCALE_IN]:
        return _site_by_site(x, linear, item_type, args, threads)
    prefetch_list = list_prefetch(x.shape[1], group, args) if acts[PROJECTION] else np.empty((0, 2), np.int64)
    out = _product(x, linear, np.int64(0), linear.panels, item_type, threads, prefetch_list)
    apply(x, x, out, group, args)
    return out


@njit(inline="always")
def _site_by_site(x, linear, item_type, args, threads):
    """Compute `_linear` if adapters scale the input of each site in a way of its own."""
    group = _group(linear.group)
    sites, columns = group.sites, group.columns
    out, nothing = np.empty((x.shape[0], linear.size_out), np.float32), np.empty((0, 2), np.int64)
    for part in range(sites.shape[0]):
        mine, first, last = x.copy(), columns[part], columns[part + 1]
        enter(mine, sites[part], args)
        panel = first // PANEL
        panels = _product(mine, linear, panel, (last + PANEL - 1) // PANEL, item_type, threads, nothing)
        for r in range(x.shape[0]):
            copy(panels[r, first - panel * PANEL :], out[r, first:last])
        own = SiteGroup(group.number, sites[part : part + 1], columns[part : part + 2])
        apply(mine, mine, out, own, args)
    return out


@njit(inline="always")
def _attend(qkv, params, cache, rotary, step, item_type):
    """Compute what an `Attention` does between its products: [T, heads * d_v]."""
    k, v = cache.key_shape, cache.value_shape
    keys, values = (
        view(cache.keys, (k[0], k[1], k[2], k[3]), item_type.sample),
        view(cache.values, (v[0], v[1], v[2], v[3]), item_type.sample),
    )
    cos, sin = (rotary.cos, rotary.sin) if params.is_rotated else (rotary.none, rotary.none)
    out = np.empty((qkv.shape[0], params.heads, params.d_v), np.float32)
    how = KernelParams(params.scaling, params.window, params.softcap)
    attend(qkv, cos, sin, keys, values, cache.block_size, step, how, out, item_type)
    return out.reshape(qkv.shape[0], params.heads * params.d_v)


@njit(inline="always")
def _layer(hidden, layer, rotary, step, item_types, args, threads):
    """Compute h + attention(norm(h)), then h + mlp(norm(h))."""
    item_type = item_types.weights
    normed = _norm(hidden, layer.input_norm, args)
    attended = _attend(
        _linear(normed, layer.qkv, item_type, args, threads),
        layer.params,
        layer.cache,
        rotary,
        step,
        item_types.cache,
    )
    change = _linear(attended, layer.out, item_type, args, threads)
    apply(normed, hidden, change, _group(layer.attention), args)
    middle = np.empty_like(hidden)
    add(hidden, change, middle)
    normed = _norm(middle, layer.mlp_norm, args)
    gate_up = _linear(normed, layer.gate_up, item_type, args, threads)
    gated = np.empty((hidden.shape[0], gate_up.shape[1] // 2), np.float32)
    gate(gate_up, layer.activation, gated)
    change = _linear(gated, layer.down, item_type, args, threads)
    apply(normed, middle, change, _group(layer.mlp), args)
    out = np.empty_like(hidden)
    add(middle, change, out)
    apply(hidden, middle, out, _group(layer.layer), args)
    return out


@njit(cache=True)
def decoder_layers(hidden, layers, last, rotary, step, item_types, args, threads):
    """Return hidden [T, size] through `layers`, an array of `LAYER`, and through `last`, an array of `NORM`.

    `rotary` is `Rotary`, `step` is `AttentionTiles`, `item_types` is `ItemTypes`, `args` is `AdapterArgs`.
    """
    for number in range(layers.shape[0]):
        hidden = _layer(hidden, layers[number], rotary, step, item_types, args, threads)
    for number in range(last.shape[0]):
        hidden = _norm(hidden, last[number], args)
    return hidden
