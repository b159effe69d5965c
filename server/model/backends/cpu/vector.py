"""The two inner loops that every product on the CPU is made of, written in LLVM's own vectors.

`tile_RxP` multiplies R rows of x by P panels of 16 columns, `dots_RxJ` takes R x J dot products along memory. What is
summed in which order depends on the length of the sum alone, never on R, P or J, and multiplications are fused into
additions explicitly: so a row's result is the same, bit for bit, whatever it is computed beside. Compilers that
vectorise by themselves promise neither.

Matrices are kept in 32, 16 or 8 bits, and widened to fp32 as they are read; `item_type` is an array of their type, of
which only the type is used: float32, uint16 (the bits of an IEEE half; Numba's CPU has no float16) or int8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8
PANEL = 16  # columns that lie side by side in a packed matrix: two vectors, so that six rows fill the sixteen registers
SPAN = 256
FLOATS = np.empty(0, np.float32)
_I64, _F32 = ir.IntType(64), ir.FloatType()
_VECTOR = ir.VectorType(_F32, LANES)
_FLOAT_ARRAY = types.Array(types.float32, 1, "C")
_STORED = {types.float32: (_F32, 4), types.uint16: (ir.HalfType(), 2), types.int8: (ir.IntType(8), 1)}


def whole_panels(size: int) -> int:
    """A number of columns, rounded up to what the kernels read at once."""
    return -(-size // PANEL) * PANEL


Read = Callable[[], Any]  # emits what reads a vector


class _Emit:
    """Instructions on memory by address: every offset is in items of `size` bytes."""

    def __init__(self, builder: Any, item_type: Any) -> None:
        self.builder, (self.stored, self.size) = builder, _STORED[item_type.dtype]

    def at(self, address: Any, offset: Any, size: int) -> Any:
        return self.builder.add(address, self.builder.mul(offset, _I64(size)))

    def floats(self, address: Any, lanes: int = LANES) -> Any:
        kind = ir.VectorType(_F32, lanes) if lanes > 1 else _F32
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=4)

    def store(self, value: Any, address: Any) -> None:
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer()), align=4)

    def widened(self, address: Any, lanes: int = LANES) -> Any:
        """`lanes` items of the matrix as fp32."""
        kind = ir.VectorType(self.stored, lanes) if lanes > 1 else self.stored
        value = self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=self.size)
        wide = ir.VectorType(_F32, lanes) if lanes > 1 else _F32
        if self.size == 2:
            return self.builder.fpext(value, wide)
        return self.builder.sitofp(value, wide) if self.size == 1 else value

    def splat(self, value: Any) -> Any:
        first = self.builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.IntType(32)(0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        return self.builder.shuffle_vector(first, ir.Constant(_VECTOR, ir.Undefined), zeros)

    def splat_at(self, address: Any) -> Any:
        """The float at an address in all lanes."""
        return self.splat(self.floats(address, 1))

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        name = f"llvm.fma.v{LANES}f32" if a.type == _VECTOR else "llvm.fma.f32"
        known = self.builder.module.globals.get(name)
        function = known or ir.Function(self.builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
        return self.builder.call(function, [a, b, c])

    def prefetch(self, address: Any) -> None:
        """Ask for a line of memory that will be read soon."""
        name, byte, number = "llvm.prefetch.p0", ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = self.builder.module.globals.get(name) or ir.Function(self.builder.module, kind, name)
        to_read, to_keep, data = number(0), number(3), number(1)
        self.builder.call(function, [self.builder.inttoptr(address, byte), to_read, to_keep, data])

    def total(self, vector: Any) -> Any:
        """The sum of a vector's lanes, as a tree."""
        parts = [self.builder.extract_element(vector, ir.IntType(32)(lane)) for lane in range(LANES)]
        while len(parts) > 1:
            half = len(parts) // 2
            parts = [self.builder.fadd(parts[at], parts[at + half]) for at in range(half)]
        return parts[0]

    def products(self, lefts: Sequence[Read], rights: Sequence[Read], sums: list[Any]) -> list[Any]:
        """Each sum, row by row, and the product of its left and its right.

        The fewer of both are held, the others are read one by one: all at once they would not fit the registers.
        """
        changed, are_lefts_held = [*sums], len(lefts) <= len(rights)
        held = [read() for read in (lefts if are_lefts_held else rights)]
        for number, read in enumerate(rights if are_lefts_held else lefts):
            value = read()
            for place, other in enumerate(held):
                left, right, row, column = (
                    (other, value, place, number) if are_lefts_held else (value, other, number, place)
                )
                cell = row * len(rights) + column
                changed[cell] = self.fma(left, right, sums[cell])
        return changed

    def loop(self, first: Any, last: Any, step: int, carried: list[Any], body: Any) -> list[Any]:
        """Emit for i in range(first, last, step): carried = body(i, carried)."""
        builder, entry = self.builder, self.builder.block
        head, inside, after = (builder.append_basic_block(name) for name in ("head", "inside", "after"))
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(_I64)
        values = [builder.phi(value.type) for value in carried]
        builder.cbranch(builder.icmp_signed("<", index, last), inside, after)
        builder.position_at_end(inside)
        changed = body(index, values)
        following = builder.add(index, _I64(step))
        for phi, before, later in zip([index, *values], [first, *carried], [following, *changed], strict=True):
            phi.add_incoming(before, entry)
            phi.add_incoming(later, builder.block)
        builder.branch(head)
        builder.position_at_end(after)
        return values


def _tile(rows: int, panels: int) -> Any:
    num_vectors = panels * PANEL // LANES
    at_vector = [(column * LANES // PANEL, column * LANES % PANEL) for column in range(num_vectors)]

    @intrinsic
    def tile(_typing: Any, x: Any, w: Any, start: Any, out: Any, strides: Any, item_type: Any) -> Any:
        """out[r, c] = start[r, c] + sum over i < k of x[r, i] w[i, c], in order of i, and in spans whose
        sums are then added: a long sum in one go loses digits. x, w, start and out are addresses.

        `strides`, in items: k; from row to row of x, of start, of out; from row to row of w within a panel, from panel
        to panel. And in bytes: how far from a panel memory is asked for that is read later, and its steps: one stream
        of reads alone does not fill the way to memory.
        """

        def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            x, w, start, out, strides, _ = args
            k, x_stride, start_stride, out_stride, w_step, w_panel, prefetch_offset, prefetch_stride = (
                cgutils.unpack_tuple(builder, strides)  # `product.TileStrides`
            )
            emit, cells = (
                _Emit(builder, item_type),
                [(row, column) for row in range(rows) for column in range(num_vectors)],
            )
            xs = [emit.at(x, builder.mul(x_stride, _I64(row)), 4) for row in range(rows)]
            panel_of = [emit.at(w, builder.mul(w_panel, _I64(panel)), emit.size) for panel in range(panels)]
            ws = [builder.add(panel_of[panel], _I64(lane * emit.size)) for panel, lane in at_vector]

            def place(base: Any, stride: Any, row: int, column: int) -> Any:
                return emit.at(base, builder.add(builder.mul(stride, _I64(row)), _I64(column * LANES)), 4)

            def step(index: Any, sums: list[Any]) -> list[Any]:
                below, later = (
                    builder.mul(index, w_step),
                    builder.add(prefetch_offset, builder.mul(index, prefetch_stride)),
                )
                for address in panel_of:
                    emit.prefetch(builder.add(address, later))
                lefts = [partial(emit.splat_at, emit.at(address, index, 4)) for address in xs]
                rights = [partial(emit.widened, emit.at(address, below, emit.size)) for address in ws]
                return emit.products(lefts, rights, sums)

            def part(first: Any, begun: list[Any]) -> list[Any]:
                beyond = builder.add(first, _I64(SPAN))
                last = builder.select(builder.icmp_signed("<", beyond, k), beyond, k)
                return emit.loop(first, last, 1, begun, step)

            def more(first: Any, _: list[Any]) -> list[Any]:
                for at, value in zip(places, part(first, zeros), strict=True):
                    emit.store(builder.fadd(emit.floats(at), value), at)
                return []

            zeros = [ir.Constant(_VECTOR, [_F32(0.0)] * LANES) for _ in cells]
            begun = [emit.floats(place(start, start_stride, row, column)) for row, column in cells]
            places = [place(out, out_stride, row, column) for row, column in cells]
            for at, value in zip(places, part(_I64(0), begun), strict=True):
                emit.store(value, at)
            emit.loop(_I64(SPAN), k, SPAN, [], more)
            return context.get_dummy_value()

        return types.void(x, w, start, out, strides, item_type), codegen

    return tile


def _dots(rows: int, columns: int) -> Any:
    @intrinsic
    def dots(
        _typing: Any, x: Any, x_stride: Any, a: Any, a_stride: Any, k: Any, out: Any, out_stride: Any, item_type: Any
    ) -> Any:
        """out[r, j] = sum over i < k of x[r, i] a[j, i]; addresses and strides in items."""

        def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            x, x_stride, a, a_stride, k, out, out_stride, _ = args
            emit, cells = _Emit(builder, item_type), [(row, column) for row in range(rows) for column in range(columns)]
            xs = [emit.at(x, builder.mul(x_stride, _I64(row)), 4) for row in range(rows)]
            matrix = [emit.at(a, builder.mul(a_stride, _I64(column)), emit.size) for column in range(columns)]
            whole = builder.and_(k, _I64(-LANES))

            def step(lanes: int) -> Any:
                def inner(index: Any, sums: list[Any]) -> list[Any]:
                    lefts = [partial(emit.floats, emit.at(address, index, 4), lanes) for address in xs]
                    rights = [partial(emit.widened, emit.at(address, index, emit.size), lanes) for address in matrix]
                    return emit.products(lefts, rights, sums)

                return inner

            zeros = [ir.Constant(_VECTOR, [_F32(0.0)] * LANES) for _ in cells]
            sums = emit.loop(_I64(0), whole, LANES, zeros, step(LANES))
            sums = emit.loop(whole, k, 1, [emit.total(vector) for vector in sums], step(1))
            for (row, column), value in zip(cells, sums, strict=True):
                emit.store(value, emit.at(out, builder.add(builder.mul(out_stride, _I64(row)), _I64(column)), 4))
            return context.get_dummy_value()

        return types.void(x, x_stride, a, a_stride, k, out, out_stride, item_type), codegen

    return dots


# Six rows of one panel are twelve sums in registers; fewer rows take more panels, so that no sum waits for the last.
tile_1x4, tile_2x2, tile_3x2 = _tile(1, 4), _tile(2, 2), _tile(3, 2)
tile_1x1, tile_2x1, tile_3x1, tile_4x1, tile_5x1, tile_6x1 = (_tile(rows, 1) for rows in range(1, 7))
dots_1x8, dots_1x1, dots_4x2, dots_4x1 = _dots(1, 8), _dots(1, 1), _dots(4, 2), _dots(4, 1)


@intrinsic
def largest(_typing: Any, _address: Any, _count: Any) -> Any:
    """The largest of `count` floats at an address; a NaN is passed over. (No compiler makes vectors of that loop.)"""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        emit, (address, count) = _Emit(builder, _FLOAT_ARRAY), args
        lowest = _F32(float("-inf"))

        def larger(a: Any, b: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        def step(lanes: int) -> Any:
            return lambda index, tops: [larger(emit.floats(emit.at(address, index, 4), lanes), tops[0])]

        whole = builder.and_(count, _I64(-LANES))
        tops = emit.loop(_I64(0), whole, LANES, [ir.Constant(_VECTOR, [lowest] * LANES)], step(LANES))
        lanes = [builder.extract_element(tops[0], ir.IntType(32)(lane)) for lane in range(LANES)]
        return emit.loop(whole, count, 1, [reduce(larger, lanes)], step(1))[0]

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def narrowed(_typing: Any, _value: Any, item_type: Any) -> Any:
    """A float as one of `item_type`'s items, 32 or 16 bits; one that is too large for 16 is infinite."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if item_type.dtype == types.float32:
            return args[0]
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return item_type.dtype(types.float32, item_type), codegen


@intrinsic
def widened(_typing: Any, address: Any, item_type: Any) -> Any:
    """Return one item of a matrix as fp32."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return _Emit(builder, item_type).widened(args[0], 1)

    return types.float32(address, item_type), codegen


@intrinsic
def _pointer(_typing: Any, _address: Any, item_type: Any) -> Any:
    """An address as one of `item_type`'s items."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(item_type.dtype)(types.int64, item_type), codegen


@njit(inline="always")
def at(array):
    """Return an array's address."""
    return np.int64(array.ctypes.data)


@njit(inline="always")
def copy(source, out):
    """Copy a row. From 0 on, so that the compiler sees no negative index, and makes vectors of it.

    Numba's assignment to a slice brings much code that is slow to compile.
    """
    for i in range(out.shape[0]):
        out[i] = source[i]


@njit(inline="always")
def view(address, shape, item_type):
    """Return what lies at an address, as an array of this shape and of `item_type`'s type."""
    return carray(_pointer(address, item_type), shape)
