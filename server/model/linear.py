"""The base's linear layers: weights packed for the machine, then whatever the batch's hats add.

Which product is used is chosen in one place, `choose_product`, by device and precision:

* fp32 on CPU: oneDNN with reordered weights. A row's result does not depend on the batch, bit for bit.
* fp16 on CPU (x86): FBGEMM, 16-bit weights with fp32 arithmetic; the default there, for it reads half the bytes.
* elsewhere: torch's own linear in the precision's dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.model.attention import UnsupportedBaseError
from server.model.bank import SlotBank

Product = Callable[[Tensor], Tensor]  # x [..., in] -> y [..., out], the bias added
Packer = Callable[[Tensor, Tensor | None], Product]  # weight [out, in], bias [out] -> Product
FP16_MAX = 65504.0


def pack_torch(weight: Tensor, bias: Tensor | None) -> Product:
    """torch's own linear: any device, any dtype; the slow twin of the others."""
    return lambda x: nn.functional.linear(x, weight, bias)


def pack_onednn(weight: Tensor, bias: Tensor | None) -> Product:
    """oneDNN in fp32 with the weight reordered once.

    For some shapes it sums in another order when there are very few rows (seen at 1 row, 1536 -> 576). Then those rows
    are computed beside copies of themselves, so that a row's result never depends on how many there are.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)
    run = torch.ops.mkldnn._linear_pointwise.default
    trial = torch.randn(8, weight.shape[1], generator=torch.Generator().manual_seed(0))
    many = run(trial, packed, bias, "none", [], "")
    least = next(
        n for n in (1, 2, 4, 8) if n == 8 or torch.equal(run(trial[:n], packed, bias, "none", [], ""), many[:n])
    )

    def product(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if 0 < len(rows) < least:
            return run(rows.repeat(least, 1), packed, bias, "none", [], "")[: len(rows)].view(*x.shape[:-1], -1)  # type: ignore[no-any-return]
        return run(x, packed, bias, "none", [], "")  # type: ignore[no-any-return]

    return product


def pack_fbgemm(weight: Tensor, bias: Tensor | None) -> Product:
    """FBGEMM with the weight in 16 bits and arithmetic in fp32."""
    largest = weight.abs().max().item()
    if not largest <= FP16_MAX:
        raise UnsupportedBaseError(
            f"a weight of {largest:g} does not fit 16 bits; serve this base with --precision fp32"
        )
    packed = torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), bias)
    run = torch.ops.quantized.linear_dynamic_fp16.default
    return lambda x: run(x, packed)


def has_fbgemm() -> bool:
    """Whether this torch was built with FBGEMM (x86 only)."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def choose_precision(precision: str, device: str) -> str:
    """What `auto` means here; a precision that this device has no good product for is refused."""
    on_cpu = torch.device(device).type == "cpu"
    if precision == "auto":
        return ("fp16" if has_fbgemm() else "fp32") if on_cpu else "bf16"
    usable = (["fp32", "fp16"] if has_fbgemm() else ["fp32"]) if on_cpu else ["fp32", "bf16", "fp16"]
    if precision not in usable:
        raise UnsupportedBaseError(
            f"precision {precision} is not served on {device}; choose auto or {', '.join(usable)}"
        )
    return precision


def choose_product(precision: str, device: str) -> Packer:
    """The packer for a precision that `choose_precision` gave."""
    if torch.device(device).type != "cpu":
        return pack_torch
    if precision == "fp16":
        return pack_fbgemm
    return pack_onednn if torch.backends.mkldnn.is_available() else pack_torch


class HatLinear(nn.Module):
    """A linear layer of the base that the batch's patches act on: y = W x + b, then the slots' primitives.

    `is_head` marks the output head, which sees only the rows that are sampled.
    """

    def __init__(self, linear: nn.Linear | Conv1D, pack: Packer, bank: SlotBank, site: str, is_head: bool) -> None:
        super().__init__()
        weight = linear.weight.detach()
        bias = None if linear.bias is None else linear.bias.detach()
        self.product = pack(weight.T if isinstance(linear, Conv1D) else weight, bias)
        self.bank, self.site, self.is_head = bank, bank.site_index(site), is_head

    def forward(self, x: Tensor) -> Tensor:
        x = self.bank.enter(self.site, x, self.is_head)
        y = self.product(x)
        self.bank.apply(self.site, x, y, self.is_head)
        return y
