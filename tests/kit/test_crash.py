"""Acknowledged is durable, unacknowledged is absent or whole: a few of the rounds of `python -m tests.kit.crash`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.crash import Loop, crash_loop, has_strace

pytestmark = pytest.mark.skipif(
    not has_strace(), reason="strace is not here (apt-get install strace), or may not trace"
)


@pytest.fixture(scope="module")
def loop(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    """A data folder with an old version, and forks of a server."""
    with crash_loop(tiny_base, tmp_path_factory.mktemp("crash")) as made:
        yield made


def test_a_crash_at_any_moment(loop: Loop) -> None:
    """Killed at a middle and the last fsync and at the rename: what was acknowledged is there, and all is whole."""
    last = loop.count("fsync")
    assert last >= 5
    seen = {loop.kill("fsync", number).partition(": ")[2] for number in (last // 2, last)}
    seen.add(loop.kill("rename", 1).partition(": ")[2])
    assert "absent" in seen and seen <= {"absent", "whole", "acknowledged"}


@pytest.mark.parametrize(
    ("calls", "error", "number"),
    [("fsync", "EIO", 2), ("rename", "EIO", 1), ("write", "ENOSPC", 2), ("pwrite64", "ENOSPC", 1)],
)
def test_a_disk_that_fails(loop: Loop, calls: str, error: str, number: int) -> None:
    """A disk that refuses an fsync, a rename or a write: 507, nothing is kept, and the service goes on."""
    assert loop.fail(calls, error, number).endswith("507")
