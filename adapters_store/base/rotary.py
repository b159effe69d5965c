"""Fix the factors of rotary embeddings for good, as a server and a trainer must both do.

For some kinds (longrope, dynamic NTK) transformers chooses them by the largest position of a call. A call holds many
sequences, in chunks, whose keys are kept: a row's angles would depend on its neighbours and on its length so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

CHANGING = ("longrope", "dynamic")  # the kinds whose factors depend on length


def fix_rotary(model: nn.Module, max_tokens: int) -> str:
    """Keep the factors that a sequence of `max_tokens` has, for sequences of any length; return their choice's name.

    vLLM does the same: factors by the longest sequence that is served.
    """
    choice = rotary_choice(model, max_tokens)
    for module, kinds, changing in _changing(model):
        for layer in changing:
            _choose(module, max_tokens, {} if layer is None else {"layer_type": layer})
        steady = {layer: "default" if layer in changing else kind for layer, kind in kinds.items()}
        module.rope_type = steady if isinstance(module.rope_type, dict) else "default"  # it chooses no more
    return choice


def rotary_choice(model: nn.Module, max_tokens: int) -> str:
    """Name the factors that sequences of up to `max_tokens` have: "longrope over 4096 tokens"; "" if none change."""
    names = set()
    for module, _kinds, changing in _changing(model):
        for layer, kind in changing.items():
            border = _border(module, layer, kind)
            side = "up to" if max_tokens <= border else "over" if kind == "longrope" else f"at {max_tokens} of"
            names.add(f"{kind} {side} {border} tokens")
    return ", ".join(sorted(names))


def _changing(model: nn.Module) -> Iterator[tuple[Any, dict[str | None, str], dict[str | None, str]]]:
    """Yield each rotary module that chooses, its kinds by type of layer (None: all), and those that change."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        of_layers: dict[str | None, str] = kinds if isinstance(kinds, dict) else {None: str(kinds)}
        changing = {layer: kind for layer, kind in of_layers.items() if kind in CHANGING}
        if changing:
            yield module, of_layers, changing


def _border(module: Any, layer: str | None, kind: str) -> int:
    """Return the tokens up to which a module's factors are those of its short sequences."""
    if kind != "longrope":
        return int(module.original_max_seq_len)
    parameters = module.config.rope_parameters if layer is None else module.config.rope_parameters[layer]
    return int(parameters["original_max_position_embeddings"])


def _choose(module: Any, max_tokens: int, of_layer: dict[str, str]) -> None:
    """Make a stock module choose its factors, by computing the angles of the last position."""
    device = next(module.buffers()).device
    module(torch.empty(0, device=device), torch.tensor([[max_tokens - 1]], device=device), **of_layer)
