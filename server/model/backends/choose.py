"""Choose a backend and a precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from server.model.backends.base import Packer, Product
from server.model.backends.cpu.weights import PACKERS
from server.model.errors import UnsupportedBaseError
from server.model.precision import has_halves


def pack_torch(weight: Tensor, bias: Tensor | None) -> Product:
    """torch's own linear: any device, any dtype; the slow twin of the others."""
    return lambda x: nn.functional.linear(x, weight, bias)


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
