"""Pack linear weights for the CPU kernels: fp32, fp16 or int8 panels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.model.backends.base import Linear, PackLinear
from server.model.backends.cpu.loops import ItemType, item_type
from server.model.backends.cpu.product import NO_PREFETCH, product
from server.model.backends.cpu.vector import PANEL, whole_panels
from server.model.errors import UnsupportedBaseError

FP16_MAX = 65504.0
ROUNDED_ROWS = 128
INT8_MAX = 127
NONE = np.empty(0, np.float32)


def rounded(weight: Tensor, precision: str) -> Tensor:
    """Return what a product keeps of a weight [out, in]. Raises `UnsupportedBaseError` if it does not fit.

    It goes by some rows at a time, which stay in the CPU's cache.
    """
    if precision == "fp32":
        return weight
    kept = torch.empty_like(weight)
    for part, target in zip(weight.split(ROUNDED_ROWS), kept.split(ROUNDED_ROWS), strict=True):
        target.copy_(_rounded(part, precision))
    return kept


def _rounded(weight: Tensor, precision: str) -> Tensor:
    if precision == "fp16":
        largest = weight.abs().max().item()
        if not largest <= FP16_MAX:
            raise UnsupportedBaseError(
                f"a weight of {largest:g} does not fit 16 bits; serve this base with --precision fp32"
            )
        return weight.half().float()
    scales = _scales(weight)
    return (weight / scales).round() * scales


def _scales(weight: Tensor) -> Tensor:
    """Return [out, 1], the largest magnitude of each output, over 127."""
    return weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / INT8_MAX


def pack_fp32(weight: Tensor, bias: Tensor | None) -> Linear:
    """Pack a weight [out, in] as it is."""
    return _pack(_panels(weight), bias, len(weight))


def pack_fp16(weight: Tensor, bias: Tensor | None) -> Linear:
    """Pack a weight [out, in] in 16 bits."""
    return _pack(_panels(weight.half()).view(np.uint16), bias, len(weight))


def pack_int8(weight: Tensor, bias: Tensor | None) -> Linear:
    """Pack a weight [out, in] in 8 bits with a scale per output."""
    scales = _scales(weight)
    return _pack(_panels((weight / scales).round().to(torch.int8)), bias, len(weight), scales[:, 0])


def _panels(weight: Tensor) -> NDArray[np.generic]:
    """Lay [out, in] out as [panels, in, 16]: columns side by side, zeros behind the last."""
    size_out, size_in = weight.shape
    whole = torch.zeros(whole_panels(size_out), size_in, dtype=weight.dtype)
    whole[:size_out] = weight
    return whole.view(-1, PANEL, size_in).transpose(1, 2).contiguous().numpy()


@dataclass(frozen=True)
class PackedProduct:
    """A packed layer, x [..., in] -> [..., out]; `arrays` are what the kernel takes: panels, start, scales, bias."""

    size_out: int
    item_type: ItemType
    arrays: tuple[NDArray[np.generic], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        out = rows.new_empty(len(rows), self.size_out)
        product(rows.numpy(), *self.arrays, out.numpy(), torch.get_num_threads(), NO_PREFETCH, self.item_type)
        return out.view(*x.shape[:-1], self.size_out)


def _pack(panels: NDArray[np.generic], bias: Tensor | None, size_out: int, scales: Tensor | None = None) -> Linear:
    start = np.zeros(len(panels) * PANEL, np.float32)
    added, factors = NONE, NONE
    if scales is not None:
        added = np.zeros(size_out, np.float32) if bias is None else bias.numpy().copy()
        factors = scales.numpy().copy()
    elif bias is not None:
        start[:size_out] = bias.numpy()

    return PackedProduct(size_out, item_type(panels.dtype), (panels, start, factors, added))


PACKERS: dict[str, PackLinear] = {"fp32": pack_fp32, "fp16": pack_fp16, "int8": pack_int8}
