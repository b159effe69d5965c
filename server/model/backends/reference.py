"""Formulas in plain torch, on any device, to which every backend is held."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from adapters_store.primitives import Bottleneck, PrefixEmbeds, Primitive, Rows, Scale
from server.model.backends.attention_params import KVLayer
from server.model.backends.codes import BIAS, DELTA, PROJECTION, ROWS, SCALE_OUT
from server.model.row_adapters import RowAdapters, SiteGroup

Find = Callable[[int, int, int], Primitive | None]  # (kind, site, slot) -> what that slot does there
ARGMAX_BLOCK = 256


def linear_reference(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return torch's own linear layer of a weight [out, in] and a bias [out]: x [..., in] -> y [..., out]."""
    return lambda x: nn.functional.linear(x, weight, bias)


def store_reference(layer: KVLayer, blocks: Tensor, offsets: Tensor, key: Tensor, value: Tensor) -> None:
    """Write keys [n, kv heads, dim] and values of n positions, given as blocks [n] and the places [n] in them."""
    layer.keys[blocks, :, : key.shape[-1], offsets] = key.to(layer.keys.dtype)
    layer.values[blocks, :, offsets, : value.shape[-1]] = value.to(layer.values.dtype)


def best_reference(logits: Tensor) -> Tensor:
    """Return the first of the largest of each row of logits [R, vocabulary], -1 if one is not finite: [R] int64."""
    finite = torch.isfinite(logits.amax(-1)) & torch.isfinite(logits.amin(-1))
    return torch.where(finite, _argmax(logits), -1)


def _argmax(logits: Tensor) -> Tensor:
    """Return the first of equals of each row; torch's own argmax takes ten times as long as its amax."""
    blocks = logits.unflatten(-1, (-1, math.gcd(logits.shape[-1], ARGMAX_BLOCK)))
    best: Tensor = blocks.amax(-1).argmax(-1)
    of_best = blocks[torch.arange(len(best), device=best.device), best]
    place: Tensor = best * blocks.shape[-1] + of_best.argmax(-1)
    return place


def embed_rows_reference(rows: Rows, token_ids: Tensor, y: Tensor, weight: float) -> None:
    """Add weight dE[j] to the rows of y [T, size] whose token of token_ids [T] is ids[j]."""
    token_ids = token_ids.to(rows.ids.dtype)
    place = torch.searchsorted(rows.ids, token_ids).clamp(max=len(rows.ids) - 1)
    changed = rows.ids[place] == token_ids
    y.copy_(torch.where(changed[:, None], y + weight * rows.de[place], y))  # by `y[changed]` a GPU would be waited for


def scale_reference(find: Find, kind: int, site: int, y: Tensor, rows: RowAdapters) -> None:
    """Multiply y [rows, size] in place by 1 + w (v - 1) of every adapter that a row uses."""
    for span, slot_weights in rows.segments():
        for slot, weight in slot_weights:
            primitive = find(kind, site, slot)
            if isinstance(primitive, Scale):
                y[span] *= primitive.factor(weight)


def apply_reference(find: Find, group: SiteGroup, x: Tensor, stream: Tensor, y: Tensor, rows: RowAdapters) -> None:
    """Change y [rows, out] in place by the primitives' own formulas, site by site of a group with the input x.

    `stream` [rows, size] is the residual stream, for bottlenecks that read it.
    """
    for part, site in enumerate(group.sites.tolist()):
        mine = y[:, group.columns[part] : group.columns[part + 1]]
        scale_reference(find, SCALE_OUT, site, mine, rows)
        for span, slot_weights in rows.segments():
            update_reference(find, site, x[span], stream[span], mine[span], slot_weights)


def update_reference(
    find: Find,
    site: int,
    x: Tensor,
    stream: Tensor,
    y: Tensor,
    slot_weights: list[tuple[int, float]],
    skipped: tuple[type[Primitive], ...] = (),
) -> None:
    """Add every update of rows that use the same adapters to y, those of the output last, except `skipped` kinds."""
    late: list[tuple[Bottleneck, float]] = []
    for slot, weight in slot_weights:
        for kind in (DELTA, ROWS, BIAS, PROJECTION):
            primitive = find(kind, site, slot)
            if isinstance(primitive, Bottleneck) and primitive.of == "output":
                late.append((primitive, weight))
            elif isinstance(primitive, Bottleneck):
                y += weight * primitive.update(stream if primitive.of == "stream" else x)
            elif isinstance(primitive, Rows):
                y[:, primitive.ids] += weight * (x @ primitive.de.T)
            elif primitive is not None and not isinstance(primitive, (Scale, PrefixEmbeds, *skipped)):
                y += weight * primitive.update(x)  # type: ignore[union-attr]
    for bottleneck, weight in late:
        y += weight * bottleneck.update(y)
