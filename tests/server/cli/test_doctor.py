"""`manyhats doctor`: what would be served with, and each fault of a machine with what to do about it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from adapters_store.base import cache as caches
from server.cli import doctor as room
from server.cli.doctor import doctor, examine
from server.model.backends import kernel_cache
from server.model.backends.choose import choose_precision

FREE = 64 * 2**30


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home of the test's own, and memory enough."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=FREE))
    monkeypatch.setattr(room, "CGROUP", tmp_path / "none")
    monkeypatch.setattr(room, "_torch_cuda", lambda: None)


def run(*words: str) -> tuple[int, str]:
    """The command's exit code and what it printed."""
    import typer

    app = typer.Typer()
    app.command()(doctor)
    ended = CliRunner().invoke(app, list(words), env={"COLUMNS": "300"})
    return ended.exit_code, ended.output


def only_fault(base: Path | None = None) -> room.Fault:
    """The one fault that is found."""
    (fault,) = examine(None if base is None else str(base)).faults
    assert fault.do
    return fault


def test_a_machine_with_nothing_wrong(tiny_base: Path) -> None:
    """Every section is there, nothing is wrong, and the exit code is 0."""
    code, said = run("--json", "--base", str(tiny_base))
    found = json.loads(said)
    assert code == 0 and found.pop("faults") == []
    assert list(found) == ["versions", "cpu", "kernels", "caches", "base", "memory", "runs_as"]
    assert found["base"]["is_found"] and found["base"]["num_parameters"] > 0
    assert found["memory"]["free_bytes"] == FREE > found["memory"]["needed_bytes"] > 2**30
    assert not found["kernels"]["are_compiled"] and str(kernel_cache.digest()) in found["kernels"]["folder"]
    assert found["caches"]["bases"]["bytes"] == 0


def test_what_auto_means() -> None:
    """The precision that is told is the one that the engine chooses."""
    assert examine().sections["runs_as"]["precision"] == choose_precision("auto", "cpu")


def test_what_a_person_reads(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --json there is a line for each value, and for each fault what is wrong and what to do; it exits 1."""
    code, said = run("--base", str(tiny_base))
    assert code == 0 and "nothing is wrong" in said and "precision" in said
    monkeypatch.setenv("MANYHATS_MAX_RUNING", "1")
    code, said = run("--base", str(tiny_base))
    assert code == 1 and "wrong: MANYHATS_MAX_RUNING is no setting" in said and "do: unset MANYHATS_MAX_RUNING" in said


def test_an_unknown_variable_and_a_wrong_value(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that no setting has is named, and so is one whose value cannot be meant."""
    monkeypatch.setenv("MANYHATS_MAX_RUNING", "1")
    assert "did you mean MANYHATS_MAX_RUNNING" in only_fault(tiny_base).what
    monkeypatch.delenv("MANYHATS_MAX_RUNING")
    monkeypatch.setenv("MANYHATS_PORT", "x")
    assert "port" in only_fault(tiny_base).what


def _unwritable(*folders: str) -> Callable[[Path], bool]:
    return lambda folder: not any(name in str(folder) for name in folders)


def test_no_write_access(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder that cannot be written is named, with where kernels are kept instead."""
    monkeypatch.setattr(caches, "is_writable", _unwritable(".cache"))
    assert "home/.cache/manyhats/kernels" in only_fault(tiny_base).what
    assert "kept in" in only_fault(tiny_base).what


def test_no_folder_for_compiled_kernels(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no folder can be written at all, that is said."""
    monkeypatch.setattr(caches, "is_writable", lambda _folder: False)
    assert "compiled again at each start" in only_fault(tiny_base).what
    assert examine(str(tiny_base)).sections["kernels"]["folder"] is None


def _with_version(monkeypatch: pytest.MonkeyPatch, package: str, version: str | None) -> None:
    real = room._version
    monkeypatch.setattr(room, "_version", lambda name: version if name == package else real(name))


@pytest.mark.parametrize(
    ("package", "version", "says"),
    [
        ("torch", "2.9.0+cpu", "torch is 2.9.0+cpu, and manyhats needs 2.13.0"),
        ("numba", None, "numba is not installed"),
        ("uvicorn", None, "uvicorn is not installed"),
    ],
)
def test_packages_of_another_version(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, package: str, version: str | None, says: str
) -> None:
    """A package that is missing, or not of the version that is pinned, is named with what to install."""
    _with_version(monkeypatch, package, version)
    fault = only_fault(tiny_base)
    assert fault.what == says and f"pip install '{package}" in fault.do


def test_a_torch_for_gpus_without_one(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build of torch for CUDA on a machine without a GPU is named; with a GPU it is fine."""
    monkeypatch.setattr(room, "_torch_cuda", lambda: "12.8")
    monkeypatch.setattr(room, "NVIDIA", tmp_path / "none")
    assert "build for CUDA 12.8" in only_fault(tiny_base).what
    monkeypatch.setattr(room, "NVIDIA", tmp_path)
    assert not examine(str(tiny_base)).faults


def test_the_build_is_read_from_torch_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA of torch's build is read without importing it."""
    monkeypatch.undo()
    assert room._torch_cuda() is None or room._torch_cuda()
    (tmp_path / "version.py").write_text("__version__ = '2.13.0'\ncuda: Optional[str] = '12.8'\n")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda _name: SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    )
    assert room._torch_cuda() == "12.8"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert room._torch_cuda() is None


def test_too_little_memory(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less memory than a start needs is named with both figures, also where a container's limit is what lacks."""
    cgroup = tmp_path / "cgroup"
    cgroup.mkdir()
    (cgroup / "memory.max").write_text(f"{2**30}\n")
    (cgroup / "memory.current").write_text(f"{2**29}\n")
    monkeypatch.setattr(room, "CGROUP", cgroup)
    assert only_fault(tiny_base).what.startswith("512 MiB of memory are free, and a start needs 1.8 GiB")
    (cgroup / "memory.max").write_text("max\n")
    assert not examine(str(tiny_base)).faults
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    assert only_fault(tiny_base).what.startswith("1 MiB of memory are free")


def test_a_base_that_is_not_here(tmp_path: Path) -> None:
    """A folder that is no base is named; one that is fetched at the first start is no fault."""
    assert "is not here" in only_fault(tmp_path / "nothing").what
    found = examine()
    assert found.faults == [] and found.sections["base"]["at_first_start"] == "it is fetched and converted"


def test_a_base_without_weights(tmp_path: Path) -> None:
    """A base's folder without weights is named."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    assert "has no weights" in only_fault(tmp_path / "base").what


@pytest.mark.parametrize("section", ["_versions", "_cpu", "_kernels", "_caches", "_base", "_memory", "_runs_as"])
def test_whatever_is_broken(tiny_base: Path, monkeypatch: pytest.MonkeyPatch, section: str) -> None:
    """A section that cannot be told is a fault with its error, and the others are told."""

    def broken(*_arguments: Any) -> None:
        raise RuntimeError("it is broken")

    monkeypatch.setattr(room, section, broken)
    report = examine(str(tiny_base))
    (fault,) = [fault for fault in report.faults if "it is broken" in fault.what]
    assert fault.what.startswith(section.strip("_")) and fault.do
    assert sum(map(bool, report.sections.values())) == 6
