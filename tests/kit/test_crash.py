"""Acknowledged is durable, unacknowledged is absent or whole: a few of the rounds of `python -m tests.kit.crash`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kit.crash import Body, Loop, crash_loop, has_strace

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
    [
        ("fsync", "EIO", 2),
        ("fdatasync", "EIO", 1),
        ("rename", "EIO", 1),
        ("write", "ENOSPC", 2),
        ("pwrite64", "ENOSPC", 1),
    ],
)
def test_a_disk_that_fails(loop: Loop, calls: str, error: str, number: int) -> None:
    """A disk that refuses an fsync, a rename or a write: 507, nothing is kept, and the service goes on."""
    assert loop.fail(calls, error, number).endswith("507")


def test_an_upload_has_no_sync_that_sqlite_passes_over(loop: Loop) -> None:
    """SQLite's sync of its folder, whose error it passes over, came with the connection; what is left is the log's."""
    assert loop.count("fdatasync") == 1


@pytest.mark.parametrize("is_last", [False, True])
def test_a_disk_that_fails_under_one_file(loop: Loop, is_last: bool) -> None:
    """So it is where the upload is one safetensors file, at its first and its last write."""
    of_file = replace(loop, new=Body.of_file(loop.root / "hat-1"))
    assert of_file.fail("write", "ENOSPC", of_file.count("write") if is_last else 1).endswith("507")
