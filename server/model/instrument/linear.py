"""The base's linear layers: weights packed by the backend, then what the adapters of the batch add."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.model.backends.base import LinearPart, PackLinear
from server.model.backends.codes import SCALE_IN
from server.model.row_adapters import SiteGroup
from server.model.slots.slots import IDLE, AdapterSlots


class AdapterLinear(nn.Module):
    """Linear layers of the base that share an input, and what patches add: y = W x + b, then the slots' primitives.

    Several are one product, whose output has theirs side by side. `is_head` marks the output head, which sees only the
    rows that are sampled.
    """

    def __init__(
        self,
        linears: Sequence[nn.Linear | Conv1D],
        pack: PackLinear,
        adapter_slots: AdapterSlots,
        sites: Sequence[str],
        is_head: bool,
    ) -> None:
        super().__init__()
        self.product = pack(*stacked(linears))
        self.adapter_slots, self.is_head = adapter_slots, is_head
        self.group, self.parts = adapter_slots.group(*sites), [adapter_slots.group(site) for site in sites]
        self.part = LinearPart(self.product, self.group)  # for a whole decoder

    def forward(self, x: Tensor) -> Tensor:
        """Compute x [..., in] -> y [..., sum of out]."""
        acts = self.adapter_slots.step.acts.of_group[self.group.number]
        if acts == IDLE:
            return self.product(x)
        if len(self.parts) > 1 and acts[SCALE_IN]:
            return torch.cat([self._alone(x, part, number) for number, part in enumerate(self.parts)], -1)
        x = self.adapter_slots.enter(self.group, x, self.is_head)
        y = self.product(x)
        self.adapter_slots.apply(self.group, x, y, self.is_head)
        return y

    def _alone(self, x: Tensor, part: SiteGroup, number: int) -> Tensor:
        """Compute one of several layers, if adapters scale their inputs differently."""
        x = self.adapter_slots.enter(part, x, self.is_head)
        first, last = self.group.columns[number : number + 2]
        y = self.product(x)[..., first:last].contiguous()
        self.adapter_slots.apply(part, x, y, self.is_head)
        return y


def stacked(linears: Sequence[nn.Linear | Conv1D]) -> tuple[Tensor, Tensor | None]:
    """Return the weight [sum of out, in] of layers side by side, and the bias, None if none has one."""
    weights = [one.weight.detach().T if isinstance(one, Conv1D) else one.weight.detach() for one in linears]
    biases = [
        weight.new_zeros(len(weight)) if one.bias is None else one.bias.detach()
        for one, weight in zip(linears, weights, strict=True)
    ]
    has_bias = any(one.bias is not None for one in linears)
    return torch.cat(weights), torch.cat(biases) if has_bias else None
