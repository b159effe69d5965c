"""The whole tree of commands, found by the entry points: quick help, completion, and one way to give a key."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import typer

from server.cli.main import main
from server.settings import Settings

MANYHATS = Path(sys.executable).parent / "manyhats"
NAMES = sorted(entry.name for entry in entry_points(group="manyhats.commands"))
# What help may import: Typer, what it checks values with, and what rich has beside it; `serve` makes flags of settings.
RICH = {"rich", "pygments", "markdown_it", "mdurl", "attr"}
PYDANTIC = {"pydantic", "pydantic_core", "annotated_types", "typing_inspection", "typing_extensions"}
ALLOWED = (
    {"__main__", "server", "training", "adapters_store", "typer", "shellingham", "annotated_doc"} | RICH | PYDANTIC
)
OF_SETTINGS = {"pydantic_settings", "dotenv", "msgspec"}
HELP = """
import contextlib, io, json, sys
from server.cli.main import main

imported = {}
for words in json.loads(sys.argv[1]):
    before, out = set(sys.modules), io.StringIO()
    sys.argv = ["manyhats", *words, "--help"]
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main()
    assert "Usage: manyhats" in out.getvalue(), words
    new = {*sys.modules} - (before if imported else set())
    of_python = ("_sysconfigdata", "__editable__", "_distutils_hack")  # of its start, by how we were installed
    tops = {name.partition(".")[0] for name in new if not name.startswith(of_python)}
    imported[" ".join(words)] = sorted(tops - sys.stdlib_module_names)
print(json.dumps(imported))
"""


@cache
def tree() -> dict[str, Any]:
    """Every command by its words."""
    return dict(_below(_root(), ()))


def _root() -> Any:
    from server.cli import main as module

    return typer.main.get_command(typer.Typer(cls=module.Commands, callback=module._options))


def _below(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    yield " ".join(words), command
    if hasattr(command, "list_commands"):
        context = typer.Context(command)
        for name in command.list_commands(context):
            yield from _below(command.get_command(context, name), (*words, name))


def params(command: Any) -> list[Any]:
    """The options and arguments of a command."""
    found: list[Any] = command.get_params(typer.Context(command))
    return found


def test_help_imports_nothing_heavy() -> None:
    """The help of no command imports a package but Typer's and ours; that of `serve` has the settings besides."""
    words = [said.split() for said in tree() if said not in ("serve", "bench")]
    command = [sys.executable, "-c", HELP, json.dumps([*words, ["serve"]])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for said, packages in json.loads(done.stdout).items():
        wrong = set(packages) - ALLOWED - (OF_SETTINGS if said == "serve" else set())
        assert not wrong, f"`manyhats {said} --help` imports {wrong}"


def test_every_command_is_found() -> None:
    """The tree has each entry point, and each subcommand of a group."""
    assert {said.split()[0] for said in tree() if said} == set(NAMES)
    assert "keys list" in tree() and len(tree()) > len(NAMES)


def test_there_is_one_way_to_give_a_key() -> None:
    """Every command that asks a server takes `--api-key`, else MANYHATS_API_KEY, and no other option takes a key."""
    for said, command in tree().items():
        options = {flag: option for option in params(command) for flag in option.opts}
        keys = {flag for flag, option in options.items() if option.envvar or flag.endswith("-key")}
        assert keys == ({"--api-key"} if {"--url", "--push"} & options.keys() else set()), said
        assert all(options[flag].envvar in ("MANYHATS_API_KEY", ["MANYHATS_API_KEY"]) for flag in keys), said
        assert all(option.opts == ["--api-key"] for flag, option in options.items() if flag in keys), said


def test_what_a_server_answers_can_be_had_as_json() -> None:
    """Every command that asks a server has `--json`."""
    options = {said: {flag for option in params(command) for flag in option.opts} for said, command in tree().items()}
    wanted = {said for said, flags in options.items() if "--url" in flags}
    assert {said for said, flags in options.items() if "--json" in flags} == {"doctor", *wanted}


def ask(what: str, line: str = "") -> str:
    """What the command tells a shell."""
    environment = {"_MANYHATS_COMPLETE": what, "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    return subprocess.run([MANYHATS], env=os.environ | environment, capture_output=True, text=True, check=False).stdout


def test_a_shell_can_complete() -> None:
    """A shell that asks is offered commands, and flags of commands, those of the settings too."""
    assert ask("complete_bash", "manyhats ke").split() == ["keys"]
    assert ask("complete_bash", "manyhats keys cr").split() == ["create"]
    settings = sorted(f"--{name.replace('_', '-')}" for name in Settings.model_fields if name.startswith("ho"))
    assert sorted(ask("complete_bash", "manyhats serve --ho").split()) == settings


def test_a_shell_gets_the_script_that_completes() -> None:
    """There is the script of a shell, and an option that prints it and one that installs it."""
    assert "_MANYHATS_COMPLETE=complete_bash" in ask("source_bash")
    assert {"--show-completion", "--install-completion"} <= {flag for option in params(_root()) for flag in option.opts}


def test_a_word_that_is_no_command_finds_the_one_that_is_meant(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command that is mistyped ends with code 2 and the name of the one that is near."""
    monkeypatch.setattr(sys, "argv", ["manyhats", "tsks"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and "'tasks'" in capsys.readouterr().err
