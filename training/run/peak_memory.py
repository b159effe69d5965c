"""Peak memory of a stretch of work, on a GPU or in this process."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil
import torch
from torch import nn

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): the peak becomes what is resident now


class PeakMemory:
    """Measures memory from its creation on, on the device of a loaded base.

    It reads every weight first: weights of a mapped file are in memory only then, and would be counted as the work's.
    """

    def __init__(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.sum()
        self._device = next(model.parameters()).device
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._base = torch.cuda.memory_allocated(self._device)
        else:
            self._base = psutil.Process().memory_info().rss
            _reset()

    def base_and_peak(self) -> tuple[int, int]:
        """Return the bytes at the beginning and the most since; the most of the process if it cannot be reset."""
        if self._device.type == "cuda":
            return self._base, torch.cuda.max_memory_allocated(self._device)
        return self._base, max(self._base, _high_water())  # other threads may free some before the reset


def _reset() -> None:
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        return


def _high_water() -> int:
    try:
        lines = STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
