"""Recognise parts of a decoder layer by their names, their shapes and how the stock model called them.

Each function takes a stock module with the (args, kwargs) of one call, which are empty if it was never called. It says
whether the module has the shape of a known part; whether it also computes the same is found by computing.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

Kwargs = dict[str, Any]


def is_rms_norm(norm: Any, args: tuple[Any, ...], kwargs: Kwargs) -> bool:
    """Whether a norm has one weight [size] and an epsilon, and takes one tensor [..., size]."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or [name for name, _ in norm.named_parameters()] != ["weight"]:
        return False
    has_eps = isinstance(norm_eps(norm), float)
    return has_eps and _is_one_tensor(args, kwargs) and weight.dim() == 1 and args[0].shape[-1] == len(weight)


def norm_eps(norm: Any) -> Any:
    """A norm's epsilon under either of its names, else None."""
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else getattr(norm, "eps", None)


def is_gated(mlp: Any, args: tuple[Any, ...], kwargs: Kwargs) -> bool:
    """Whether a feed-forward block has gate, up and down projections of fitting sizes, and takes one tensor."""
    if not _has_linears(mlp, "gate_proj", "up_proj", "down_proj") or not _is_one_tensor(args, kwargs):
        return False
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    sizes = (gate.out_features, gate.in_features) == (up.out_features, up.in_features)
    return callable(getattr(mlp, "act_fn", None)) and sizes and down.in_features == gate.out_features


def is_attention(attention: Any, args: tuple[Any, ...], kwargs: Kwargs) -> bool:
    """Whether an attention has q, k, v and o projections, and gets a pair (cos, sin) and our batch."""
    if not _has_linears(attention, "q_proj", "k_proj", "v_proj", "o_proj") or not hasattr(attention, "layer_idx"):
        return False
    rotary = kwargs.get("position_embeddings")
    is_rotary = isinstance(rotary, tuple) and len(rotary) == 2 and all(isinstance(part, Tensor) for part in rotary)
    return is_rotary and "paged" in kwargs and (len(args) == 1) != ("hidden_states" in kwargs)


def _is_one_tensor(args: tuple[Any, ...], kwargs: Kwargs) -> bool:
    return len(args) == 1 and isinstance(args[0], Tensor) and not kwargs


def _has_linears(module: Any, *names: str) -> bool:
    """Whether a module has these linear layers, and nothing else that is trained."""
    if not all(isinstance(getattr(module, name, None), nn.Linear) for name in names):
        return False
    return {name.rpartition(".")[0] for name, _ in module.named_parameters()} == set(names)
