"""Fix the factors of rotary embeddings for good.

For some kinds (longrope, dynamic NTK) transformers chooses them by the largest position of a call. A call here holds
many sequences, in chunks, whose keys are kept: a row's angles would depend on its neighbours and on its length so far.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

STEADY = {"default", "linear", "llama3", "yarn", "proportional"}  # kinds whose factors no length changes


def fix_rotary(model: nn.Module, max_tokens: int) -> set[str]:
    """Keep the factors that a sequence of `max_tokens` has, for sequences of any length; return the kinds that changed.

    vLLM does the same: factors by the longest sequence that is served.
    """
    fixed = set()
    module: Any
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        of_layers = kinds if isinstance(kinds, dict) else {None: kinds}
        changing = {layer: kind for layer, kind in of_layers.items() if isinstance(kind, str) and kind not in STEADY}
        for layer in changing:
            _choose(module, max_tokens, {} if layer is None else {"layer_type": layer})
        if changing:
            steady = {layer: "default" if layer in changing else kind for layer, kind in of_layers.items()}
            module.rope_type = steady if isinstance(kinds, dict) else "default"  # it chooses no more
        fixed |= {*changing.values()}
    return fixed


def _choose(module: Any, max_tokens: int, of_layer: dict[str, str]) -> None:
    """Make a stock module choose its factors, by computing the angles of the last position."""
    device = next(module.buffers()).device
    module(torch.empty(0, device=device), torch.tensor([[max_tokens - 1]], device=device), **of_layer)
