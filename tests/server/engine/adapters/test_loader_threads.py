"""The threads that load adapters leave the cores to the steps."""

from __future__ import annotations

import os
import threading
from queue import SimpleQueue

import psutil
import torch

from server.engine.adapters.loader_threads import NICENESS, LoaderThreads, give_way


def test_loaders_compute_alone_and_give_way() -> None:
    """A loader's operators start no threads, and run at low priority once it gives way; others stay as they were."""
    torch.set_num_threads(2)
    large = torch.ones(1000, 1000)
    large.mul(large)  # the caller's own count is in use
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    try:
        loaders, results = LoaderThreads(3), SimpleQueue[tuple[int, int, int]]()

        def look() -> None:
            give_way()
            before = psutil.Process().num_threads()
            large.mul(large).abs().max()
            torch.linalg.svd(large[:50, :50])
            more = psutil.Process().num_threads() - before
            results.put((torch.get_num_threads(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), more))

        for _ in range(9):
            loaders.spawn(look)
        assert {results.get(timeout=30) for _ in range(9)} == {(1, max(NICENESS, mine), 0)}
        assert torch.get_num_threads() == 2
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == mine
        others: list[int] = []
        other = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert others == [2]
    finally:
        torch.set_num_threads(1)
