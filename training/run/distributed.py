"""The processes that `accelerate launch` started for one run; without it, this process alone.

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
    """The calling process among those of the run: `rank` of `size`; 0, the main one, reads the clock and writes."""

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
        """Return the device to use: the wanted one, or with several processes each one's own."""
        return str(self._state.device) if self.size > 1 else wanted

    def share(self, rows: Sequence[T]) -> Sequence[T]:
        """Return the rows, of all, that this process takes."""
        return rows[self.rank :: self.size]

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Make every gradient the sum of all processes'; a parameter without a gradient counts as zeros."""
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
        """Return each number's sum over all processes."""
        if self.size == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self._state.device)
        torch.distributed.all_reduce(tensor)
        sums: list[float] = tensor.tolist()
        return sums

    def agree(self, number: float) -> float:
        """Return the main process's number in every process."""
        return self.sum(number if self.is_main else 0.0)[0]

    def wait(self) -> None:
        """Wait until all processes are here."""
        self._state.wait_for_everyone()

    def leave(self) -> None:
        """End this process at once, if there are several and all is done.

        While an interpreter ends, threads of torch's gloo can abort it if a peer has gone just before.
        """
        if self.size > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def close(self) -> None:
        """Leave the process group, if there are several processes."""
        if self.size > 1:
            self._state.destroy_process_group()
