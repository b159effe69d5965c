"""The loops over matrices that all kernels share: compiled once for each type of item, and called by their address.

Numba copies whatever a kernel calls into that kernel, and compiles it there again. Long as these loops are, kernels
that held copies of them took three times as long to compile.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types
from numba.extending import intrinsic
from numba.np.numpy_support import from_dtype
from numpy.typing import NDArray

from server.model.backends.cpu.vector import (
    PANEL,
    dots_1x1,
    dots_1x8,
    dots_4x1,
    dots_4x2,
    tile_1x1,
    tile_1x4,
    tile_2x1,
    tile_2x2,
    tile_3x1,
    tile_3x2,
    tile_4x1,
    tile_5x1,
    tile_6x1,
)

ROWS = 6  # of x at a time: twelve sums fill the registers


class ItemType(NamedTuple):
    """The type of a matrix's items, as kernels take it: an empty array, and the addresses of the loops over those."""

    sample: NDArray[np.generic]
    multiply: int
    dots: int


class Strides(NamedTuple):
    """Strides of a product's operands in items, and of what is asked for from memory meanwhile in bytes.

    x, start and out by row, w by row within a panel and by panel. `prefetch_offset` says how far from a panel that lies
    which is read next; `later_address` what is wanted later, `later_stride` how many bytes of it a step asks for.
    """

    k: int
    x_row: int
    start_row: int
    out_row: int
    w_row: int
    w_panel: int
    prefetch_offset: int
    later_address: int
    later_stride: int


class TileStrides(NamedTuple):
    """The strides of one part of a product, as `vector`'s tiles take them: what they ask for is one stream."""

    k: int
    x_row: int
    start_row: int
    out_row: int
    w_row: int
    w_panel: int
    prefetch_offset: int
    prefetch_stride: int


@njit(cache=True)
def _one_panel(rows, x, w, start, out, strides, sample):
    """Run `tile` of one panel for 1 to 6 rows."""
    if rows == 6:
        tile_6x1(x, w, start, out, strides, sample)
    elif rows == 5:
        tile_5x1(x, w, start, out, strides, sample)
    elif rows == 4:
        tile_4x1(x, w, start, out, strides, sample)
    elif rows == 3:
        tile_3x1(x, w, start, out, strides, sample)
    elif rows == 2:
        tile_2x1(x, w, start, out, strides, sample)
    else:
        tile_1x1(x, w, start, out, strides, sample)


@njit(cache=True)
def _few_rows(rows, x, w, start, out, strides, sample):
    """Run `tile` of 4 panels for 1 row, of 2 for 2 or 3 rows."""
    if rows == 1:
        tile_1x4(x, w, start, out, strides, sample)
    elif rows == 2:
        tile_2x2(x, w, start, out, strides, sample)
    else:
        tile_3x2(x, w, start, out, strides, sample)


@njit(cache=True)
def multiply_loop(rows, panels, x, w, start, out, strides, sample):
    """Run `tile` for any number of rows and of panels; x, w, start and out are addresses.

    Six rows at a time: each of these parts asks for its share of what is read next, so that the reading is spread
    evenly, and if something is wanted later, the last part asks for that alone.
    """
    k = strides.k
    parts = (rows + ROWS - 1) // ROWS
    sharing = parts - 1 if strides.later_stride > 0 else parts
    prefetch_stride = (strides.w_row * sample.itemsize + sharing - 1) // max(1, sharing)
    for part in range(parts):
        first, few = rows * part // parts, rows * (part + 1) // parts - rows * part // parts
        x_at, start_at, out_at = (
            x + 4 * first * strides.x_row,
            start + 4 * first * strides.start_row,
            out + 4 * first * strides.out_row,
        )
        later = (
            (strides.prefetch_offset + part * k * prefetch_stride, prefetch_stride)
            if part < sharing
            else (strides.later_address - w, strides.later_stride)
        )
        mine = TileStrides(
            k, strides.x_row, strides.start_row, strides.out_row, strides.w_row, strides.w_panel, later[0], later[1]
        )
        panel, group = 0, 4 if few == 1 else 2
        while panel < panels:
            w_at, move = w + panel * strides.w_panel * sample.itemsize, 4 * panel * PANEL
            if few > 3 or panel + group > panels:
                _one_panel(few, x_at, w_at, start_at + move, out_at + move, mine, sample)
                panel += 1
            else:
                _few_rows(few, x_at, w_at, start_at + move, out_at + move, mine, sample)
                panel += group


@njit(cache=True)
def dots_loop(rows, x, x_stride, a, k, rank, out, out_stride, sample):
    """Write out [rows, rank] = x [rows, k] A^T for A [rank, k]; addresses and strides in items."""
    row = 0
    while row + 4 <= rows:
        x_at, out_at = x + 4 * row * x_stride, out + 4 * row * out_stride
        for j in range(0, rank - 1, 2):
            dots_4x2(x_at, x_stride, a + j * k * sample.itemsize, k, k, out_at + 4 * j, out_stride, sample)
        if rank % 2:
            j = rank - 1
            dots_4x1(x_at, x_stride, a + j * k * sample.itemsize, k, k, out_at + 4 * j, out_stride, sample)
        row += 4
    for r in range(row, rows):
        x_at, out_at = x + 4 * r * x_stride, out + 4 * r * out_stride
        whole = rank // 8 * 8
        for j in range(0, whole, 8):
            dots_1x8(x_at, x_stride, a + j * k * sample.itemsize, k, k, out_at + 4 * j, out_stride, sample)
        for j in range(whole, rank):
            dots_1x1(x_at, x_stride, a + j * k * sample.itemsize, k, k, out_at + 4 * j, out_stride, sample)


MULTIPLY = (types.int64,) * 6 + (types.NamedUniTuple(types.int64, len(Strides._fields), Strides),)
DOTS = (types.int64,) * 8


def loops(dtype: Any) -> list[tuple[Any, tuple[Any, ...]]]:
    """Return the loops over matrices of a type of NumPy, each with the types of its arguments."""
    sample = types.Array(from_dtype(np.dtype(dtype)), 1, "C")
    return [(multiply_loop, (*MULTIPLY, sample)), (dots_loop, (*DOTS, sample))]


@cache
def item_type(dtype: Any) -> ItemType:
    """Return the `ItemType` of a type of NumPy; its loops are compiled if they are not on disk."""
    return ItemType(np.empty(0, dtype), *(_address(loop, arguments) for loop, arguments in loops(dtype)))


def _address(loop: Any, arguments: tuple[Any, ...]) -> int:
    compiled = loop.get_compile_result(types.void(*arguments))
    address: int = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
    return address


def _call(field: str) -> Any:
    """Make what emits the call of a loop, by Numba's own convention; the `ItemType` with its address comes last."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        *numbers, item_type = signature.args
        kinds = (*numbers, item_type.types[0])
        places = (ItemType._fields.index(name) for name in ("sample", field))
        sample, address = (builder.extract_value(values[-1], place) for place in places)
        loop = context.call_conv.get_function_type(types.none, kinds)
        callee = builder.inttoptr(address, loop.as_pointer())
        context.call_conv.call_function(builder, callee, types.none, kinds, (*values[:-1], sample))
        return context.get_dummy_value()

    return codegen


# An intrinsic's arguments are typed here and used in the machine code alone.
@intrinsic
def multiply(_typing, rows, panels, x, w, start, out, strides, item_type):  # noqa: ARG001
    """Call `multiply_loop` by its address."""
    return types.void(*MULTIPLY, item_type), _call("multiply")


@intrinsic
def dots(_typing, rows, x, x_stride, a, k, rank, out, out_stride, item_type):  # noqa: ARG001
    """Call `dots_loop` by its address."""
    return types.void(*DOTS, item_type), _call("dots")
