"""Llama-like decoder layers in one call: the same kernels as their parts, without Python between them.

Layers are records of sizes and addresses, so that one compiled kernel serves any number of them.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from server.model.backends.base import PROJECTION, SCALE_IN
from server.model.backends.cpu.adapters import apply, enter, list_prefetch
from server.model.backends.cpu.attention import attend
from server.model.backends.cpu.layers import add, gate, rms_norm
from server.model.backends.cpu.product import product
from server.model.backends.cpu.vector import FLOATS, PANEL, view

INTEGERS = np.empty(0, np.int64)
INT, FLOAT = np.int64, np.float32
# Sites that share an input: `adapter_slots.Group`, with the addresses of its arrays.
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


@njit(cache=True)
def _group(group):
    """As `apply` takes it."""
    sites, columns = view(group.sites, (group.parts,), INTEGERS), view(group.columns, (group.parts + 1,), INTEGERS)
    return group.number, sites, columns


@njit(cache=True)
def _norm(x, norm, row_adapters):
    """What an `RMSNorm` and its hats compute."""
    out = np.empty_like(x)
    rms_norm(x, view(norm.weight, (x.shape[1],), FLOATS), norm.eps, out)
    apply(x, x, out, _group(norm.group), row_adapters)
    return out


@njit(cache=True)
def _product(x, linear, first, last, item_type, threads, prefetch_list):
    """Panels [first, last) of W x + b; `prefetch_list` is read afterwards."""
    begin = first * PANEL
    out = np.empty((x.shape[0], min(last * PANEL, linear.size_out) - begin), np.float32)
    weight = view(linear.weight, (linear.panels, linear.size_in, PANEL), item_type)[first:last]
    start = view(linear.start, (linear.panels * PANEL,), FLOATS)[begin:]
    scales, bias = view(linear.scales, (linear.factors,), FLOATS), view(linear.bias, (linear.factors,), FLOATS)
    product(x, weight, start, scales[begin:], bias[begin:], out, threads, prefetch_list)
    return out


@njit(cache=True)
def _linear(x, linear, item_type, row_adapters, threads):
    """What a `AdapterLinear` computes."""
    group = _group(linear.group)
    acts = row_adapters[5][group[0]]
    if acts[SCALE_IN]:
        return _site_by_site(x, linear, item_type, row_adapters, threads)
    prefetch_list = list_prefetch(x.shape[1], group, row_adapters) if acts[PROJECTION] else np.empty((0, 2), np.int64)
    out = _product(x, linear, 0, linear.panels, item_type, threads, prefetch_list)
    apply(x, x, out, group, row_adapters)
    return out


@njit(cache=True)
def _site_by_site(x, linear, item_type, row_adapters, threads):
    """`_linear` where hats scale the input of each site in a way of its own."""
    number, sites, columns = _group(linear.group)
    out, nothing = np.empty((x.shape[0], linear.size_out), np.float32), np.empty((0, 2), np.int64)
    for part in range(sites.shape[0]):
        mine, first, last = x.copy(), columns[part], columns[part + 1]
        enter(mine, sites[part], row_adapters)
        panel = first // PANEL
        panels = _product(mine, linear, panel, (last + PANEL - 1) // PANEL, item_type, threads, nothing)
        out[:, first:last] = panels[:, first - panel * PANEL : last - panel * PANEL]
        apply(mine, mine, out, (number, sites[part : part + 1], columns[part : part + 2]), row_adapters)
    return out


@njit(cache=True)
def _attend(qkv, params, cache, rotary, paged, item_type):
    """What an `Attention` computes between its products: [T, heads * d_v]."""
    k, v = cache.key_shape, cache.value_shape
    keys, values = (
        view(cache.keys, (k[0], k[1], k[2], k[3]), item_type),
        view(cache.values, (v[0], v[1], v[2], v[3]), item_type),
    )
    cos, sin = (rotary[0], rotary[1]) if params.is_rotated else (rotary[2], rotary[2])
    out = np.empty((qkv.shape[0], params.heads, params.d_v), np.float32)
    how = params.scaling, params.window, params.softcap
    attend(qkv, cos, sin, keys, values, cache.block_size, *paged, how, out)
    return out.reshape(qkv.shape[0], params.heads * params.d_v)


@njit(cache=True)
def _layer(hidden, layer, rotary, paged, item_types, row_adapters, threads):
    """h + attention(norm(h)), then h + mlp(norm(h))."""
    item_type, cache_item_type = item_types
    normed = _norm(hidden, layer.input_norm, row_adapters)
    attended = _attend(
        _linear(normed, layer.qkv, item_type, row_adapters, threads),
        layer.params,
        layer.cache,
        rotary,
        paged,
        cache_item_type,
    )
    change = _linear(attended, layer.out, item_type, row_adapters, threads)
    apply(normed, hidden, change, _group(layer.attention), row_adapters)
    middle = np.empty_like(hidden)
    add(hidden, change, middle)
    normed = _norm(middle, layer.mlp_norm, row_adapters)
    gate_up = _linear(normed, layer.gate_up, item_type, row_adapters, threads)
    gated = np.empty((hidden.shape[0], gate_up.shape[1] // 2), np.float32)
    gate(gate_up, layer.activation, gated)
    change = _linear(gated, layer.down, item_type, row_adapters, threads)
    apply(normed, middle, change, _group(layer.mlp), row_adapters)
    out = np.empty_like(hidden)
    add(middle, change, out)
    apply(hidden, middle, out, _group(layer.layer), row_adapters)
    return out


@njit(cache=True)
def decoder_layers(hidden, layers, last, rotary, paged, item_types, row_adapters, threads):
    """hidden [T, size] -> [T, size], through `layers`, an array of `LAYER`, and through `last`, an array of `NORM`.

    turns = (cos, sin, none), each [T, turned]; units are empty arrays of the types of weights and of the cache;
    paged is as `attend` takes it, worn as `apply` does.
    """
    for number in range(layers.shape[0]):
        hidden = _layer(hidden, layers[number], rotary, paged, item_types, row_adapters, threads)
    for number in range(last.shape[0]):
        hidden = _norm(hidden, last[number], row_adapters)
    return hidden
