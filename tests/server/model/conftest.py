"""One thread for all tests of the model room: they are small, and the cores may be shared."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from server.model.backends.cpu.threads import set_num_threads


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small products gain nothing from threads that wait for each other."""
    before = torch.get_num_threads()
    set_num_threads(1)
    yield
    set_num_threads(before)
