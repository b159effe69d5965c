"""Number formats by the names that options have: `fp32`, `fp16`, `bf16`, and `auto` for the device's own choice."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = ("auto", "fp32", "bf16")  # of the arithmetic


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the forward pass; `auto` is bf16 on a GPU that computes in it, and fp32 elsewhere.

    On a CPU bf16 is slower than fp32.
    """
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_bf16 else torch.float32
    return DTYPES[precision]
