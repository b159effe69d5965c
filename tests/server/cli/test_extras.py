"""What is installed for serving serves: no module of it needs a package of the extra `train`."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from server.cli.main import main

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {"pyyaml": "yaml"}  # names of packages that are not those of their modules


def names_of(requirements: list[str]) -> set[str]:
    """The names of packages without versions."""
    return {line.split("=")[0].split("~")[0].split("[")[0] for line in requirements}


FOR_TRAINING = {MODULES.get(name, name) for name in names_of(PROJECT["optional-dependencies"]["train"])}


def imports(path: Path) -> Iterator[str]:
    """The first names of all modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).partition(".")[0]


@pytest.mark.parametrize("package", ["server", "adapters_store"])
def test_serving_imports_nothing_of_training(package: str) -> None:
    """No file of the server or the store imports a package that only training has, not even in a function."""
    assert len(FOR_TRAINING) >= 4
    wrong = {path: sorted(FOR_TRAINING.intersection(imports(path))) for path in (ROOT / package).rglob("*.py")}
    assert not {path: found for path, found in wrong.items() if found}


def test_both_sets_are_apart() -> None:
    """No package is in both sets, and tests have both."""
    assert not names_of(PROJECT["dependencies"]) & names_of(PROJECT["optional-dependencies"]["train"])
    assert "manyhats[train]" in PROJECT["optional-dependencies"]["dev"]


def test_serving_starts_without_what_trains() -> None:
    """The application and the engine can be imported where no package of training can."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({sorted(FOR_TRAINING - {'yaml'})!r}))"
    program = f"{blocked}; import server.app, server.cli.main, server.engine.worker, server.model.runner, training.cli"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=200)


@pytest.mark.parametrize("command", ["train", "compare"])
def test_training_without_its_packages(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command that needs what is not installed exits with 1 and the command that installs it."""

    def lacking(name: str) -> str:
        if name in ("peft", "sacrebleu"):
            raise PackageNotFoundError(name)
        return version(name)

    requires = ["torch==2.13.0", "peft==0.21.2; extra == 'train'", 'sacrebleu~=2.6 ; extra == "train"', "rich~=15"]
    monkeypatch.setattr(metadata, "requires", lambda _name: requires)
    monkeypatch.setattr(metadata, "version", lacking)
    monkeypatch.setattr(sys, "argv", ["manyhats", command, "--data", "x.csv"])
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err
    assert end.value.code == 1
    assert f"manyhats {command}: peft==0.21.2, sacrebleu~=2.6 not installed; run: " in said
    assert f"-m pip install -e '{ROOT}[train]'" in said
