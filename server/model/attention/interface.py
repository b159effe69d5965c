"""The attention interface of transformers, through which a base calls paged attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adapters_store.base.spec import KVShape
from server.model.attention.attend import attend
from server.model.attention.paged_batch import PagedBatch
from server.model.backends.attention_params import AttentionParams
from server.model.errors import UnsupportedBaseError

ATTENTION_NAME = "manyhats"


class AttentionProbe:
    """Stands in for a `PagedBatch` to learn from one forward how each layer attends, whatever the config calls it."""

    def __init__(self) -> None:
        self.shapes: dict[int, KVShape] = {}
        self.params_of_layer: dict[int, AttentionParams] = {}

    def see(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """Note the shapes of query [T, H, d], key and value [T, kv heads, d]; answer zeros."""
        self.shapes[layer] = KVShape(key.shape[1], key.shape[2], value.shape[2])
        self.params_of_layer[layer] = params
        return query.new_zeros(query.shape[0], query.shape[1], value.shape[2])


HARMLESS = {
    "dropout",
    "is_causal",
    "position_ids",
    "output_attentions",
    "use_cache",
    "cache_position",
    "head_mask",
    "output_router_logits",
}


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    paged: PagedBatch | AttentionProbe | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' interface asks: q [1, H, T, d], k and v [1, kv heads, T, d] -> [1, T, H, d_v]."""
    unknown = sorted(name for name, thing in other.items() if thing is not None and name not in HARMLESS)
    if paged is None or attention_mask is not None or unknown:
        raise UnsupportedBaseError(
            f"{type(module).__name__} calls attention with "
            + (", ".join(unknown) or ("a mask of its own" if paged is not None else "no `paged` argument"))
            + ", which this server does not know"
        )
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    params = AttentionParams(
        query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window or 0, softcap or 0.0
    )
    if isinstance(paged, AttentionProbe):
        return paged.see(layer, q, k, v, params)[None], None
    qkv = torch.cat([part.flatten(1) for part in (q, k, v)], 1)
    not_rotated = qkv.new_empty(len(qkv), 0)
    return attend(paged, layer, qkv, not_rotated, not_rotated, params)[None], None


def install() -> None:
    """Register `manyhats` with transformers: the attention, and the mask that it does not need."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, _attention)
    AttentionMaskInterface.register(ATTENTION_NAME, lambda *_args, **_kwargs: None)
