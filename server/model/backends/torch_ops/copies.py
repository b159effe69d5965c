"""Copies from the host to the device: slots, for which no step waits, and the small arrays of every step.

On CUDA a slot is filled from pinned memory on a side stream, so that neither the engine's thread nor the steps that
run meanwhile wait; the first step that uses the slot makes its own stream wait for the copy's event. On a CPU the
host's memory is the device's: nothing is copied, the slot reads what was loaded. This is the one place that knows
streams and pinned memory. Not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 8  # bytes: of the largest item that is sent


class DeviceCopies:
    """Copies to one device. `cuda` is what has the streams; a test gives a fake."""

    def __init__(self, device: str, cuda: Any = torch.cuda) -> None:
        self.device, self.cuda = torch.device(device), cuda
        self._stream = cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._events: dict[Hashable, Any] = {}  # of copies that nothing has waited for

    def pin(self, host: Tensor) -> Tensor:
        """Return the same in memory that the device reads by itself; any thread."""
        return host if self._stream is None else host.pin_memory()

    def start(self, key: Hashable, host: Iterable[Tensor]) -> list[Tensor]:
        """Begin to copy pinned tensors; nothing may read what is returned before `wait` was called with this key.

        A CPU gets the tensors themselves: nobody may write into them any more.

        Memory is of the current stream: the copy waits for what still reads what lay there before, and the memory is
        not given to others before the copy has ended, even where nobody ever waited.
        """
        parts = list(host)
        if self._stream is None:
            return [part if part.device == self.device else part.to(self.device) for part in parts]
        copied = [torch.empty_like(part, device=self.device) for part in parts]
        self._stream.wait_stream(self.cuda.current_stream(self.device))
        with self.cuda.stream(self._stream):
            for target, part in zip(copied, parts, strict=True):
                target.copy_(part, non_blocking=True)
        for target in copied:
            target.record_stream(self._stream)
        self._events[key] = self._stream.record_event()
        return copied

    def wait(self, key: Hashable) -> None:
        """Make the current stream, not this thread, wait for a copy before its first use."""
        if event := self._events.pop(key, None):
            self.cuda.current_stream(self.device).wait_event(event)

    def release(self, key: Hashable) -> None:
        """Forget a copy: what was copied is used no more."""
        self._events.pop(key, None)

    def send(self, *arrays: NDArray[Any]) -> list[Tensor]:
        """Return a step's small arrays on the device, by one copy on the current stream."""
        if self._stream is None:
            return [torch.from_numpy(array).to(self.device) for array in arrays]
        ends = np.cumsum([-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays]).tolist()
        staged = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
        for array, begin in zip(arrays, [0, *ends], strict=False):
            staged.numpy()[begin : begin + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        sent = staged.to(self.device, non_blocking=True)
        return [
            sent[begin : begin + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
            for array, begin in zip(arrays, [0, *ends], strict=False)
        ]
