"""The wheel holds all that the packages need, and what is installed from it serves and trains away from the clone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import httpx2
import numba
import pytest
from numba.core.caching import UserProvidedCacheLocator

from server.model.backends import cpu
from tests.house.sources import PACKAGES, ROOT
from tests.kit import server as kit

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
KERNELS = Path("server/model/backends/cpu")
ROWS = [{"prompt": word, "completion": feel} for word, feel in (("red", "warm"), ("blue", "cold")) for _ in range(4)]


def _run(*command: object) -> str:
    """Run a command and return its standard output; where it failed, its error output is the test's."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy what a wheel is built from, because a build writes beside its sources."""
    folder = tmp_path_factory.mktemp("sources")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel, without asking an index for anything."""
    out = tmp_path_factory.mktemp("wheel")
    _run(*PIP, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", out, copy)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    _run(*PIP, "install", "--no-deps", "--no-index", "--no-compile", "--target", folder, wheel)
    return folder


@pytest.fixture
def installed(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make processes run the installed copy, from an empty folder and with a home of their own; give its command."""
    monkeypatch.setenv("PYTHONPATH", str(site))  # before the clone, which may be installed as editable
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return site / "bin" / "manyhats"


def _lend_kernels(site: Path, home: Path) -> None:
    """Give the installed copy the kernels that this clone has compiled, since compiling takes a minute or two.

    Numba finds them by the folder of their source and takes them if size and time of that file are as they were.
    """
    for file in (site / KERNELS).glob("*.py"):
        stat = (ROOT / KERNELS / file.name).stat()
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    subpath = UserProvidedCacheLocator.get_suitable_cache_subpath
    compiled = Path(numba.config.CACHE_DIR)
    if (ours := compiled / subpath(cpu.__file__)).is_dir():
        theirs = subpath(str(site / KERNELS / "__init__.py"))
        shutil.copytree(ours, home / ".cache/manyhats/kernels" / compiled.name / theirs)


def test_the_wheel_holds_the_packages(copy: Path, wheel: Path) -> None:
    """Every file of the three packages is in the wheel (types, migrations, neutral text, examples), and no other."""
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [path for package in PACKAGES for path in (copy / package).rglob("*") if path.is_file()]
    assert names == {path.relative_to(copy).as_posix() for path in files if "__pycache__" not in path.parts}
    assert {f"{package}/py.typed" for package in PACKAGES} < names
    for folder in ("registry/migrations/versions", "examples/sentiment", "examples/data"):
        assert any(name.startswith(f"adapters_store/{folder}/") for name in names), folder
    assert any(name.startswith("training/evaluation/neutral/") for name in names)
    assert {f"server/api/docs/page.{kind}" for kind in ("html", "css", "js")} < names


def test_the_installed_copy_is_what_runs(installed: Path, site: Path) -> None:
    """A process of these tests imports the installed packages, not those of the clone."""
    program = f"import {', '.join(PACKAGES)}; print({', '.join(f'{name}.__file__' for name in PACKAGES)})"
    assert _run(sys.executable, "-c", program).split() == [str(site / name / "__init__.py") for name in PACKAGES]


@pytest.mark.timeout(600)  # on a machine without compiled kernels
def test_the_installed_copy_serves(
    installed: Path, site: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The installed command starts with a base, becomes ready and answers a request."""
    monkeypatch.setattr(kit, "MANYHATS", installed)
    _lend_kernels(site, tmp_path)
    with kit.serve(tiny_base, tmp_path / "data", num_threads=1, kv_cache_bytes="16MiB") as server:
        body = {"prompt": "hello", "max_tokens": 4, "ignore_eos": True}
        answer = httpx2.post(f"{server.url}/generate", params={"task": "base"}, json=body, timeout=60)
    assert answer.status_code == httpx2.codes.OK, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 4


def test_the_installed_copy_trains(installed: Path, tiny_base: Path, tmp_path: Path) -> None:
    """The installed command trains an adapter for one step and writes a PEFT folder."""
    data, out = tmp_path / "data.jsonl", tmp_path / "colours"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    _run(installed, "train", "--base", tiny_base, "--data", data, "--eval", data, "--out", out, "--steps", 1)
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert (out / "adapter_model.safetensors").is_file()
