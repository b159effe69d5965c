"""The base's linear layers: weights packed for the machine, then whatever the batch's hats add.

How a product is computed is chosen in one place, `choose_product`: on CPU by the kernels, with weights in the
precision's bits and arithmetic in fp32, so that a row's result is the same to the last bit whatever it is computed
beside; elsewhere by torch's own linear in the precision's type.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.model.backends.base import SCALE_IN, Packer
from server.model.row_adapters import SiteGroup
from server.model.slots.slots import AdapterSlots


class AdapterLinear(nn.Module):
    """Linear layers of the base that share an input, and what patches add: y = W x + b, then the slots' primitives.

    Several are one product, whose output has theirs side by side. `is_head` marks the output head, which sees only the
    rows that are sampled.
    """

    def __init__(
        self,
        linears: Sequence[nn.Linear | Conv1D],
        pack: Packer,
        adapter_slots: AdapterSlots,
        sites: Sequence[str],
        is_head: bool,
    ) -> None:
        super().__init__()
        self.product = pack(*stacked(linears))
        self.adapter_slots, self.is_head = adapter_slots, is_head
        self.group, self.parts = adapter_slots.group(*sites), [adapter_slots.group(site) for site in sites]

    def forward(self, x: Tensor) -> Tensor:
        acts = self.adapter_slots.acts[self.group.number]
        if len(self.parts) > 1 and acts[SCALE_IN]:
            return torch.cat([self._alone(x, part, number) for number, part in enumerate(self.parts)], -1)
        x = self.adapter_slots.enter(self.group, x, self.is_head)
        y = self.product(x)
        self.adapter_slots.apply(self.group, x, y, self.is_head)
        return y

    def _alone(self, x: Tensor, part: SiteGroup, number: int) -> Tensor:
        """One of several layers, where hats scale their inputs differently."""
        x = self.adapter_slots.enter(part, x, self.is_head)
        first, last = self.group.columns[number : number + 2]
        y = self.product(x)[..., first:last].contiguous()
        self.adapter_slots.apply(part, x, y, self.is_head)
        return y


def stacked(linears: Sequence[nn.Linear | Conv1D]) -> tuple[Tensor, Tensor | None]:
    """The weight [sum of out, in] and the bias of layers side by side, without one where none has one."""
    weights = [one.weight.detach().T if isinstance(one, Conv1D) else one.weight.detach() for one in linears]
    biases = [
        weight.new_zeros(len(weight)) if one.bias is None else one.bias.detach()
        for one, weight in zip(linears, weights, strict=True)
    ]
    has_bias = any(one.bias is not None for one in linears)
    return torch.cat(weights), torch.cat(biases) if has_bias else None
