"""The base's linear layers: weights packed for the machine, then whatever the batch's hats add.

How a product is computed is chosen in one place, `choose_product`: on CPU by the kernels, with weights in the
precision's bits and arithmetic in fp32, so that a row's result is the same to the last bit whatever it is computed
beside; elsewhere by torch's own linear in the precision's type.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import llvmlite.binding
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.model.attention import UnsupportedBaseError
from server.model.bank import Group, SlotBank
from server.model.kernels.product import NO_ERRANDS, product
from server.model.kernels.vector import PANEL, whole_panels
from server.model.packed import SCALE_IN

Product = Callable[[Tensor], Tensor]  # x [..., in] -> y [..., out], the bias added
Packer = Callable[[Tensor, Tensor | None], Product]  # weight [out, in], bias [out] -> Product
FP16_MAX = 65504.0
INT8_MAX = 127
NONE = np.empty(0, np.float32)


def rounded(weight: Tensor, precision: str) -> Tensor:
    """What a product on the CPU keeps of a weight [out, in]. Raises `UnsupportedBaseError` where it does not fit."""
    if precision == "fp16":
        largest = weight.abs().max().item()
        if not largest <= FP16_MAX:
            raise UnsupportedBaseError(
                f"a weight of {largest:g} does not fit 16 bits; serve this base with --precision fp32"
            )
        return weight.half().float()
    if precision == "int8":
        scales = _scales(weight)
        return (weight / scales).round() * scales
    return weight


def _scales(weight: Tensor) -> Tensor:
    """[out, 1]: the largest magnitude of each output, over 127."""
    return weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / INT8_MAX


def pack_torch(weight: Tensor, bias: Tensor | None) -> Product:
    """torch's own linear: any device, any dtype; the slow twin of the others."""
    return lambda x: nn.functional.linear(x, weight, bias)


def pack_fp32(weight: Tensor, bias: Tensor | None) -> Product:
    """The weight as it is."""
    return _pack(_panels(weight), bias, len(weight))


def pack_fp16(weight: Tensor, bias: Tensor | None) -> Product:
    """The weight in 16 bits."""
    return _pack(_panels(weight.half()).view(np.uint16), bias, len(weight))


def pack_int8(weight: Tensor, bias: Tensor | None) -> Product:
    """The weight in 8 bits with a scale per output."""
    scales = _scales(weight)
    return _pack(_panels((weight / scales).round().to(torch.int8)), bias, len(weight), scales[:, 0])


def _panels(weight: Tensor) -> NDArray[np.generic]:
    """[out, in] -> [panels, in, 16]: columns side by side, zeros behind the last."""
    size_out, size_in = weight.shape
    whole = torch.zeros(whole_panels(size_out), size_in, dtype=weight.dtype)
    whole[:size_out] = weight
    return whole.view(-1, PANEL, size_in).transpose(1, 2).contiguous().numpy()


@dataclass(frozen=True)
class PackedProduct:
    """x [..., in] -> [..., out] by the kernel; `arrays` are what it takes: panels, start, scales, bias."""

    size_out: int
    arrays: tuple[NDArray[np.generic], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        out = rows.new_empty(len(rows), self.size_out)
        product(rows.numpy(), *self.arrays, out.numpy(), torch.get_num_threads(), NO_ERRANDS)
        return out.view(*x.shape[:-1], self.size_out)


def _pack(panels: NDArray[np.generic], bias: Tensor | None, size_out: int, scales: Tensor | None = None) -> Product:
    start = np.zeros(len(panels) * PANEL, np.float32)
    added, factors = NONE, NONE
    if scales is not None:
        added = np.zeros(size_out, np.float32) if bias is None else bias.numpy().copy()
        factors = scales.numpy().copy()
    elif bias is not None:
        start[:size_out] = bias.numpy()

    return PackedProduct(size_out, (panels, start, factors, added))


PACKERS: dict[str, Packer] = {"fp32": pack_fp32, "fp16": pack_fp16, "int8": pack_int8}


def has_halves() -> bool:
    """Whether this CPU widens 16-bit floats by itself."""
    return platform.machine() in ("aarch64", "arm64") or bool(llvmlite.binding.get_host_cpu_features().get("f16c"))


def choose_precision(precision: str, device: str) -> str:
    """What `auto` means here; a device that is not here, or that has no good product for a precision, is refused."""
    on_cpu = torch.device(device).type == "cpu"
    usable = [name for name in PACKERS if name != "fp16" or has_halves()] if on_cpu else ["fp32", "bf16", "fp16"]
    if precision not in ("auto", *usable):
        raise UnsupportedBaseError(
            f"precision {precision} is not served on {device}; choose auto or {', '.join(usable)}"
        )
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedBaseError(f"device {device} is not here: torch {torch.__version__} finds no GPU; use cpu")
    if precision == "auto":
        return ("fp16" if has_halves() else "fp32") if on_cpu else "bf16"
    return precision


def choose_product(precision: str, device: str) -> Packer:
    """The packer for a precision that `choose_precision` gave."""
    return PACKERS[precision] if torch.device(device).type == "cpu" else pack_torch


class HatLinear(nn.Module):
    """Linear layers of the base that share an input, and what patches add: y = W x + b, then the slots' primitives.

    Several are one product, whose output has theirs side by side. `is_head` marks the output head, which sees only the
    rows that are sampled.
    """

    def __init__(
        self, linears: Sequence[nn.Linear | Conv1D], pack: Packer, bank: SlotBank, sites: Sequence[str], is_head: bool
    ) -> None:
        super().__init__()
        self.product = pack(*stacked(linears))
        self.bank, self.is_head = bank, is_head
        self.group, self.parts = bank.group(*sites), [bank.group(site) for site in sites]

    def forward(self, x: Tensor) -> Tensor:
        acts = self.bank.acts[self.group.number]
        if len(self.parts) > 1 and acts[SCALE_IN]:
            return torch.cat([self._alone(x, part, number) for number, part in enumerate(self.parts)], -1)
        x = self.bank.enter(self.group, x, self.is_head)
        y = self.product(x)
        self.bank.apply(self.group, x, y, self.is_head)
        return y

    def _alone(self, x: Tensor, part: Group, number: int) -> Tensor:
        """One of several layers, where hats scale their inputs differently."""
        x = self.bank.enter(part, x, self.is_head)
        first, last = self.group.columns[number : number + 2]
        y = self.product(x)[..., first:last].contiguous()
        self.bank.apply(part, x, y, self.is_head)
        return y


def stacked(linears: Sequence[nn.Linear | Conv1D]) -> tuple[Tensor, Tensor | None]:
    """The weight [sum of out, in] and the bias of layers side by side, without one where none has one."""
    weights = [one.weight.detach().T if isinstance(one, Conv1D) else one.weight.detach() for one in linears]
    biases = [
        weight.new_zeros(len(weight)) if one.bias is None else one.bias.detach()
        for one, weight in zip(linears, weights, strict=True)
    ]
    has_bias = any(one.bias is not None for one in linears)
    return torch.cat(weights), torch.cat(biases) if has_bias else None
