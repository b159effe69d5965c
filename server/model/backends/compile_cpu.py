"""Compile the CPU kernels ahead, part by part, so that several processes can share the work.

`python -m server.model.backends.compile_cpu PRECISION` reads names of `PARTS` from its standard input, a line each,
compiles that part into the cache on disk, and answers with the same line. It ends with its input. Nothing is computed:
only the types of the sample arguments count, and they are those that a loaded base calls the kernels with.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from server.model.backends.choose import choose_precision
from server.model.backends.codes import KINDS
from server.model.backends.cpu import adapters, attention, decoder, layers
from server.model.backends.cpu.adapters import AdapterArgs
from server.model.backends.cpu.attention import AttentionTiles, KernelParams
from server.model.backends.cpu.decoder import ItemTypes, Rotary
from server.model.backends.cpu.loops import ItemType, loops
from server.model.backends.cpu.product import NO_PREFETCH, product
from server.model.backends.cpu.vector import PANEL
from server.model.errors import UnsupportedBaseError
from server.model.precision import has_halves
from server.model.row_adapters import SiteGroup

ITEM_TYPE_OF = {"fp32": np.float32, "fp16": np.uint16, "int8": np.int8}  # of packed weights, as `weights` packs them
Call = tuple[Any, tuple[Any, ...]]  # a kernel, and samples of its arguments or their types


class Samples:
    """Smallest arguments of every kernel at one precision (`fp32`, `fp16` or `int8`)."""

    def __init__(self, precision: str) -> None:
        self.weight = np.zeros((1, 1, PANEL), ITEM_TYPE_OF[precision])
        self.stored = np.zeros(0, np.uint16 if precision != "fp32" and has_halves() else np.float32)
        self.item_type = ItemType(self.weight[:0, 0, 0], 0, 0)  # addresses are data
        self.stored_type = ItemType(self.stored, 0, 0)
        self.row, self.rows = np.zeros(1, np.float32), np.zeros((1, 1), np.float32)
        self.ids, self.pairs = np.zeros(1, np.int64), np.zeros((1, 1), np.int64)
        self.group = SiteGroup(0, self.ids, self.ids)
        table = np.zeros((len(KINDS), 1, 1, 3), np.int64)
        acts = np.zeros((1, len(KINDS)), np.bool_)
        self.row_adapters = AdapterArgs(self.pairs, self.ids, self.row, self.ids, table, acts, 0, *self.stored_type)
        self.paged = AttentionTiles(self.ids, self.ids, self.pairs, self.pairs, self.ids)
        self.rotary = Rotary(self.rows, self.rows, self.rows)
        self.layers = np.zeros(1, decoder.LAYER)
        self.of_layer = numba.typeof(self.layers).dtype  # the types of what a layer's record holds

    def loops(self) -> list[Call]:
        """Loops over matrices, of weights and of adapters."""
        return [call for dtype in dict.fromkeys((self.weight.dtype, self.stored.dtype)) for call in loops(dtype)]

    def products(self) -> list[Call]:
        """Products of linear layers, and scales of what goes into them."""
        arrays = self.weight, self.row, self.row, self.row
        return [
            (product, (self.rows, *arrays, self.rows, 1, NO_PREFETCH, self.item_type)),
            (adapters.enter, (self.rows, 0, self.row_adapters)),
        ]

    def attention(self) -> list[Call]:
        """Paged attention over the KV cache."""
        cache = np.zeros((1, 1, 1, 1), self.stored.dtype)
        params, out = KernelParams(np.float32(1.0), 0, np.float32(0.0)), np.zeros((1, 1, 1), np.float32)
        arguments = self.rows, self.rows, self.rows, cache, cache, 1, self.paged, params, out, self.stored_type
        return [(attention.attend, arguments)]

    def adapters(self) -> list[Call]:
        """Low-rank updates, bottlenecks, scales and biases."""
        return [(adapters.apply, (self.rows, self.rows, self.rows, self.group, self.row_adapters))]

    def adapter_rows(self) -> list[Call]:
        """Changed rows of the embedding and of the head."""
        ids, weight = np.zeros(1, np.int32), np.float32(1.0)
        return [
            (adapters.head_rows, (self.rows, self.rows, ids, np.int64(0), weight, self.stored_type)),
            (adapters.embed_rows, (self.ids, self.rows, ids, np.int64(0), weight, self.stored_type)),
        ]

    def norms(self) -> list[Call]:
        """Norms, gates and the choice of the best token."""
        return [
            (layers.rms_norm, (self.rows, self.row, np.float32(0.0), self.rows)),
            (layers.gate, (self.rows, 0, self.rows)),
            (layers.best, (self.rows, self.ids)),
        ]

    def layer_parts(self) -> list[Call]:
        """A layer's products and norms with the adapters on them."""
        linear, norm = self.of_layer.typeof("qkv"), self.of_layer.typeof("input_norm")
        return [
            (decoder._linear, (self.rows, linear, self.item_type, self.row_adapters, 1)),
            (decoder._norm, (self.rows, norm, self.row_adapters)),
        ]

    def decoder(self) -> list[Call]:
        """The layers as one call; it is made of all parts before it."""
        last, item_types = np.zeros(0, decoder.NORM), ItemTypes(self.item_type, self.stored_type)
        arguments = self.rows, self.layers, last, self.rotary, self.paged, item_types, self.row_adapters, 1
        return [(decoder.decoder_layers, arguments)]


# The name of a part, as it is shown, and what compiles it.
PARTS: dict[str, Callable[[Samples], list[Call]]] = {
    "adapters": Samples.adapters,
    "attention": Samples.attention,
    "loops": Samples.loops,
    "products": Samples.products,
    "norms": Samples.norms,
    "adapter rows": Samples.adapter_rows,
    "layer parts": Samples.layer_parts,
    "decoder": Samples.decoder,
}


def compile_part(name: str, precision: str) -> None:
    """Compile a part of `PARTS` for a precision, or take it from the cache on disk."""
    for kernel, samples in PARTS[name](Samples(precision)):
        kernel.compile(types_of(kernel, samples))


def types_of(kernel: Any, samples: tuple[Any, ...]) -> tuple[numba.types.Type, ...]:
    """The types by which Numba finds a compiled kernel; a sample may be a type itself."""
    return tuple(each if isinstance(each, numba.types.Type) else kernel.typeof_pyval(each) for each in samples)


def main() -> None:
    """Compile what standard input names; see the module."""
    try:
        precision = choose_precision(sys.argv[1], "cpu")
    except UnsupportedBaseError:  # the engine tells the operator
        sys.exit(2)
    for line in sys.stdin:
        compile_part(line.strip(), precision)
        print(line.strip(), flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    main()
