"""What the CPU computes itself because no library has it: products that no neighbour changes, paged attention, hats.

Rooms above call these where `serve` says so, and the slow twins in plain torch elsewhere.
"""

from __future__ import annotations

import torch


def serve(device: str, dtype: torch.dtype) -> bool:
    """Whether these kernels serve activations of this type on this device: the one place where that is chosen."""
    return torch.device(device).type == "cpu" and dtype == torch.float32
