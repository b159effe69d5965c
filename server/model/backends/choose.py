"""Choose a precision and a backend: the one place that knows which there are."""

from __future__ import annotations

from collections.abc import Callable

import torch

from server.model.backends.base import Backend
from server.model.backends.cpu.backend import CpuBackend
from server.model.backends.cpu.weights import PACKERS
from server.model.backends.torch_ops.backend import TorchOpsBackend
from server.model.errors import UnsupportedBaseError
from server.model.precision import has_halves

BACKENDS: dict[str, Callable[[str, str], Backend]] = {  # by the type of device; others are computed by torch
    "cpu": lambda precision, _device: CpuBackend(precision),
}


def choose_precision(precision: str, device: str) -> str:
    """Return a precision by name, `auto` resolved for this machine.

    Raises `UnsupportedBaseError` if the device is not here, or has no good product for the precision.
    """
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


def choose_backend(precision: str, device: str) -> Backend:
    """Make the backend for a precision on a device. Raises `UnsupportedBaseError`, see `choose_precision`."""
    precision = choose_precision(precision, device)
    make = BACKENDS.get(torch.device(device).type)
    return TorchOpsBackend(precision, device) if make is None else make(precision, device)
