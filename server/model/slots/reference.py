"""Primitives in plain torch, to which the backends are held."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapters_store.primitives import Bottleneck, PrefixEmbeds, Primitive, Rows, Scale
from server.model.backends.base import BIAS, DELTA, PROJECTION, ROWS, SCALE_OUT
from server.model.row_adapters import RowAdapters, SiteGroup

if TYPE_CHECKING:
    from server.model.slots.slots import AdapterSlots


def embed_rows(rows: Rows, token_ids: Tensor, y: Tensor, weight: float) -> None:
    """y [T, size] += weight dE[j] where the token is ids[j]."""
    token_ids = token_ids.to(rows.ids.dtype)
    place = torch.searchsorted(rows.ids, token_ids).clamp(max=len(rows.ids) - 1)
    changed = rows.ids[place] == token_ids
    y.copy_(torch.where(changed[:, None], y + weight * rows.de[place], y))  # by `y[changed]` a GPU would be waited for


def scale_reference(adapter_slots: AdapterSlots, kind: int, site: int, y: Tensor, row_adapters: RowAdapters) -> None:
    """The slow twin of `adapters.scale`, in plain torch on any device."""
    for span, slot_weights in row_adapters.segments():
        for slot, weight in slot_weights:
            primitive = adapter_slots.primitive(kind, site, slot)
            if isinstance(primitive, Scale):
                y[span] *= primitive.factor(weight)


def apply_reference(
    adapter_slots: AdapterSlots, group: SiteGroup, x: Tensor, y: Tensor, row_adapters: RowAdapters
) -> None:
    """The slow twin of the kernels, in plain torch on any device: the primitives' own formulas, site by site."""
    for part, site in enumerate(group.sites.tolist()):
        mine = y[:, group.columns[part] : group.columns[part + 1]]
        scale_reference(adapter_slots, SCALE_OUT, site, mine, row_adapters)
        for span, slot_weights in row_adapters.segments():
            update_reference(adapter_slots, site, x[span], mine[span], span, slot_weights)


def update_reference(
    adapter_slots: AdapterSlots,
    site: int,
    x: Tensor,
    y: Tensor,
    span: slice,
    slot_weights: list[tuple[int, float]],
    but: tuple[type[Primitive], ...] = (),
) -> None:
    """Every update of rows that wear the same, those of the output last, `but` some that are made elsewhere."""
    late: list[tuple[Bottleneck, float]] = []
    for slot, weight in slot_weights:
        for kind in (DELTA, ROWS, BIAS, PROJECTION):
            primitive = adapter_slots.primitive(kind, site, slot)
            if isinstance(primitive, Bottleneck) and primitive.of == "output":
                late.append((primitive, weight))
            elif isinstance(primitive, Bottleneck):
                stream = (
                    adapter_slots.stream.reshape(-1, adapter_slots.stream.shape[-1])[span]
                    if primitive.of == "stream"
                    else x
                )
                y += weight * primitive.update(stream)
            elif isinstance(primitive, Rows):
                y[:, primitive.ids] += weight * (x @ primitive.de.T)
            elif primitive is not None and not isinstance(primitive, (Scale, PrefixEmbeds, *but)):
                y += weight * primitive.update(x)  # type: ignore[union-attr]
    for bottleneck, weight in late:
        y += weight * bottleneck.update(y)
