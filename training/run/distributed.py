"""The processes that `accelerate launch` started for one run; without it, the one there is.

Each has the whole model and takes its share of every step's rows; sums of gradients are exchanged, so that the result
is that of one process but for the order of summation.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Processes:
    """`rank` of `size`; the main one, 0, reads the clock, shows, and writes."""

    def __init__(self, is_cpu: bool) -> None:
        from accelerate import PartialState  # type: ignore[import-untyped]

        state = PartialState(cpu=is_cpu)
        self.rank: int = state.process_index
        self.size: int = state.num_processes
        self._state = state

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def device(self, wanted: str) -> str:
        """Each process its own device, where there are several."""
        return str(self._state.device) if self.size > 1 else wanted

    def share(self, rows: Sequence[T]) -> Sequence[T]:
        """This process's rows of all."""
        return rows[self.rank :: self.size]

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Make every gradient the sum of all processes'. A parameter without one has zeros."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients: list[Tensor] = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def sum(self, *numbers: float) -> list[float]:
        """Each number's sum over all processes."""
        if self.size == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self._state.device)
        torch.distributed.all_reduce(tensor)
        found: list[float] = tensor.tolist()
        return found

    def agree(self, number: float) -> float:
        """The main process's number."""
        return self.sum(number if self.is_main else 0.0)[0]

    def wait(self) -> None:
        """Until all are here."""
        self._state.wait_for_everyone()

    def leave(self) -> None:
        """End this process, where there are several and all is done.

        At once: while an interpreter ends, threads of torch's gloo can abort it when a peer has gone just before.
        """
        if self.size > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def close(self) -> None:
        """Leave the group, where there is one."""
        if self.size > 1:
            self._state.destroy_process_group()
