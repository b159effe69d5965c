"""Count the cores that this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CGROUPS, OF_THIS_PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def num_cores() -> int:
    """Return how many cores this process may use: those that it may run on, within its container's CPU quotas.

    A fraction of a core is no core: threads that together want more than the quota all stand still for the rest of a
    period.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([allowed, *_quotas()])))


def _quotas() -> Iterator[float]:
    """Yield the quotas, in cores, of this process's control group and of all groups around it, of both versions."""
    for folder in _groups():
        if (numbers := _numbers(folder / "cpu.max")) and len(numbers) == 2:
            yield numbers[0] / numbers[1]
        quota, period = _numbers(folder / "cpu.cfs_quota_us"), _numbers(folder / "cpu.cfs_period_us")
        if quota and period and quota[0] > 0:
            yield quota[0] / period[0]


def _groups() -> Iterator[Path]:
    """Yield the folders of the groups. Within a container a group's own path may not be visible, its root is."""
    try:
        lines = OF_THIS_PROCESS.read_text().splitlines()
    except OSError:
        lines = ["0::/"]
    for line in lines:
        _number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "" or "cpu" in controllers.split(","):
            own = PurePosixPath(path.lstrip("/"))
            for group in (own, *own.parents):
                yield CGROUPS / controllers / group


def _numbers(path: Path) -> list[int]:
    """Return the numbers in a file; none if it is not there or says "max"."""
    try:
        return [int(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return []
