"""The number of cores is what a process may use: its affinity, and the quotas of the groups that it is in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adapters_store import cores
from server.settings import Settings
from tests.house.sources import PACKAGES, files


@pytest.fixture(autouse=True)
def _machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 16 cores whose control groups are files of the test's own."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(16)))
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "OF_THIS_PROCESS", tmp_path / "own")


@pytest.mark.parametrize(
    ("own", "written", "wanted"),
    [
        ("0::/\n", {}, 16),
        ("0::/\n", {"cpu.max": "max 100000"}, 16),
        ("0::/\n", {"cpu.max": "400000 100000"}, 4),
        ("0::/\n", {"cpu.max": "250000 100000"}, 2),
        ("0::/\n", {"cpu.max": "20000 100000"}, 1),
        ("0::/\n", {"cpu.max": "9900000 100000"}, 16),
        ("0::/\n", {"cpu.max": "rubbish"}, 16),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "200000 100000", "a/cpu.max": "300000 100000"}, 2),
        ("0::/not/visible\n", {"cpu.max": "500000 100000"}, 5),
        ("4:cpu,cpuacct:/c\n3:memory:/m\n", {"cpu,cpuacct/c/cpu.cfs_quota_us": "600000"}, 16),
        (
            "4:cpu,cpuacct:/c\n",
            {"cpu,cpuacct/c/cpu.cfs_quota_us": "600000", "cpu,cpuacct/c/cpu.cfs_period_us": "100000"},
            6,
        ),
        ("4:cpu:/c\n", {"cpu/c/cpu.cfs_quota_us": "-1", "cpu/c/cpu.cfs_period_us": "100000"}, 16),
        (None, {"cpu.max": "700000 100000"}, 7),
    ],
)
def test_quotas(tmp_path: Path, own: str | None, written: dict[str, str], wanted: int) -> None:
    """The least of the quotas of a group and of those around it, in whole cores, bounds the number."""
    if own is not None:
        (tmp_path / "own").write_text(own)
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores.num_cores() == wanted


def test_all_who_count_cores_count_these(tmp_path: Path) -> None:
    """The engine's threads and the compilers have that number, and nobody counts the machine's cores besides."""
    (tmp_path / "cpu.max").write_text("300000 100000")
    assert Settings().num_threads == 3 and cores.num_cores() == 3
    counting = [
        path.name for path in files(*PACKAGES) if "cpu_count" in path.read_text() or "affinity(" in path.read_text()
    ]
    assert counting == ["cores.py"]
