"""The most memory that a stretch of work took."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil
import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): the peak becomes what is resident now


class PeakMemory:
    """Of a device, from now on: `base` bytes at the beginning, `peak()` the most since."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.base = torch.cuda.memory_allocated(device)
        else:
            self.base = psutil.Process().memory_info().rss
            _reset()

    def peak(self) -> int:
        """Where the system cannot begin anew, the most since the process began."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _high_water()


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
