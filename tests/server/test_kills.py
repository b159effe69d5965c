"""Streams of every kind end as they do alone, whenever the engine is killed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.server import kills
from tests.server.world import serve_real

pytestmark = pytest.mark.anyio


async def test_streams_survive_a_kill(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """Sixteen streams of the base and seven methods, greedy and sampled, are what each is alone, though it dies."""
    async with serve_real(tiny_base, tmp_path / "data", max_running=16, max_waiting=64) as site:
        await kills.upload_all(site, tiny_base, tmp_path)
        tally = await kills.strike(site, 1, signal.SIGKILL, max_tokens=48)
    assert (tally.num_right, tally.wrong) == (kills.NUM_STREAMS, [])
