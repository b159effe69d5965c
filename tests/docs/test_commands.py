"""Every command of the pages is one that there is: targets, subcommands, flags, modules and routes."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import typer

from server.app import create_app
from server.cli.main import command_of
from server.engine.fake import FakeEngineClient
from server.settings import Settings
from tests.docs.pages import ROOT, SHELL, TEXTS, Block, blocks, code_words, shell_blocks

MAKEFILE = (ROOT / "Makefile").read_text()
MIN_REASON_WORDS = 3
OTHERS = {"zip", "docker", "export", "git"}  # programs that are not ours, whose words are not looked at
MAKE = re.compile(r"\bmake ([a-z]+(?:-[a-z]+)*)")


# Markers


@pytest.mark.parametrize("block", shell_blocks(), ids=lambda block: block.place)
def test_every_block_is_run_or_says_why_not(block: Block) -> None:
    """A shell block has a comment above it: the test that runs it, or the reason why none does."""
    assert block.kind in ("run by", "not run"), f"{block.place}: put <!-- run by: … --> or <!-- not run: … --> above it"
    if block.kind == "not run":
        assert len(block.said.split()) >= MIN_REASON_WORDS, block.place


@pytest.mark.parametrize("block", [one for one in blocks() if one.kind == "run by"], ids=lambda block: block.place)
def test_the_test_that_is_named_runs_the_block(block: Block) -> None:
    """The test that a block names exists, and takes its commands from the page (by the fixture `marked`)."""
    path, _, name = block.said.partition("::")
    assert (ROOT / path).is_file(), block.said
    tests = [node for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)]
    (test,) = [node for node in tests if node.name == name]
    assert "marked" in [argument.arg for argument in test.args.args], f"{block.said} runs no block of the pages"


# Commands


def commands(text: str) -> Iterator[list[str]]:
    """Yield the commands of a shell text as words: continued lines joined, comments and variables' values left out."""
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"\$\([^)]*\)", "SECRET", line)
        words: list[str] = []
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&")
        lexer.whitespace_split = True
        for word in [*lexer, ";"]:
            if set(word) <= set("|;&"):
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def spoken() -> Iterator[tuple[str, list[str]]]:
    """Yield every command in the pages: of the blocks, and of prose in backticks."""
    for block in shell_blocks():
        for words in commands(block.text):
            yield block.place, words
    for page in TEXTS:
        for word in code_words(page):
            if re.match(r"(\S*/)?(manyhats|make|python|curl|docker|accelerate) ", word):
                yield page, shlex.split(word.replace("…", "X"))


SPOKEN = [*spoken()]


@cache
def subcommands() -> dict[str, Any]:
    """The commands of `manyhats` as the package's entry points have them, by name."""
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["manyhats.commands"]
    return {name: _command(entry) for name, entry in entries.items()}


def _command(entry: str) -> Any:
    module, _, name = entry.partition(":")
    command = getattr(importlib.import_module(module), name)
    return typer.main.get_command(command) if isinstance(command, typer.Typer) else command_of(command)


def _flags(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)]


def check_manyhats(words: list[str]) -> None:
    """Assert that a subcommand and all its flags exist."""
    assert words[0] in subcommands(), f"there is no `manyhats {words[0]}`"
    command = subcommands()[words[0]]
    if hasattr(command, "commands") and words[1:]:
        assert words[1] in command.commands, f"there is no `manyhats {words[0]} {words[1]}`"
        command = command.commands[words[1]]
    if words[0] == "bench":
        known = set(re.findall(r'"(--[a-z-]+)"', (ROOT / "tests/benchmarks/__main__.py").read_text()))
    else:
        known = {
            flag
            for option in command.get_params(typer.Context(command))
            for flag in (*option.opts, *option.secondary_opts)
        }
    unknown = set(_flags(words)) - known - {"--help"}
    assert not unknown, f"`manyhats {words[0]}` has no {unknown}"


def check_make(words: list[str]) -> None:
    """Assert that each target exists, and that it needs nothing which was set up by hand."""
    for target in words:
        if "=" not in target and target != "clean":
            assert re.search(rf"^{target}: \$\(\w+\)/\.[\w-]+", MAKEFILE, re.MULTILINE), f"there is no `make {target}`"


def check_python(words: list[str]) -> None:
    """Assert that a module which is run exists, and files that are its arguments, too."""
    assert words[0] == "-m", words
    assert importlib.util.find_spec(words[1]) is not None, f"there is no module {words[1]}"
    paths = [word.partition("::")[0] for word in words[2:] if word.startswith("tests/")]
    assert all((ROOT / path).exists() for path in paths), paths
    if words[1].startswith("tests.benchmarks"):
        source = importlib.util.find_spec(words[1])
        assert source is not None and source.origin is not None
        text = (
            Path(source.origin).with_name("__main__.py") if source.submodule_search_locations else Path(source.origin)
        )
        assert all(f'"{flag}"' in text.read_text() for flag in _flags(words)), words


def check_curl(words: list[str]) -> None:
    """Assert that the route which is asked exists, with this method."""
    (url,) = [word for word in words if word.startswith("http://")]
    has_body = any(word in ("-d", "--data-binary") for word in words)
    method = words[words.index("-X") + 1] if "-X" in words else "POST" if has_body else "GET"
    assert is_route(method, urlsplit(url).path), f"there is no {method} {url}"


def check_accelerate(words: list[str]) -> None:
    """Assert that the flags of what is launched are those of `manyhats train`."""
    assert words[0] == "launch"
    if "-m" in words:
        launched = words[words.index("-m") + 1 :]
        assert launched[0] == "training"
        check_manyhats(["train", *launched[1:]])


CHECKS = {
    "manyhats": check_manyhats,
    "make": check_make,
    "python": check_python,
    "curl": check_curl,
    "accelerate": check_accelerate,
}


@pytest.mark.parametrize(("place", "words"), SPOKEN, ids=[f"{place} {' '.join(words)[:50]}" for place, words in SPOKEN])
def test_the_command_exists(place: str, words: list[str]) -> None:
    """Targets of make, subcommands and flags of manyhats, modules and routes are those that there are."""
    program = Path(words[0]).name
    assert program in CHECKS.keys() | OTHERS, f"{place}: {program} is not known here"
    if program in CHECKS:
        CHECKS[program](words[1:])


def test_the_commands_that_people_need_are_spoken_of() -> None:
    """The pages have each subcommand of manyhats, and the targets that a newcomer and CI need."""
    said = {Path(words[0]).name: set[str]() for _, words in SPOKEN}
    for _, words in SPOKEN:
        said[Path(words[0]).name].update(words[1:3])
    assert {name for name in subcommands() if name not in said["manyhats"]} == set()
    assert said["make"] >= {"serve", "test", "check", "bench"}


def test_what_ci_and_the_makefile_call_exists() -> None:
    """CI calls targets that there are; the Makefile calls subcommands and flags that there are."""
    targets = MAKE.findall((ROOT / ".ci/run").read_text())
    assert targets
    check_make(targets)
    called = re.findall(r"\$\(BIN\)/manyhats (.*)$", MAKEFILE, re.MULTILINE)
    assert called
    for line in called:
        check_manyhats(line.split())


# Routes


@cache
def routes() -> dict[str, set[str]]:
    """The methods of each path of the application."""
    return {path: {method.upper() for method in methods} for path, methods in document()["paths"].items()}


@cache
def document() -> dict[str, Any]:
    """The API's own description of itself."""
    return create_app(Settings(), ROOT, FakeEngineClient()).openapi()


def is_route(method: str, path: str) -> bool:
    """Whether a path, with names in it, matches a route of the application that takes the method."""
    return any(
        method in methods and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", route), path)
        for route, methods in routes().items()
    )


def told_routes(page: str) -> Iterator[tuple[str, str]]:
    """Yield (method, path) for each `GET /path` in backticks, query strings and options left out."""
    for word in code_words(page):
        match = re.match(r"([A-Z]+) (/[\w/.-]*)", word)
        if match and match[1] in {"GET", "POST", "PUT", "DELETE"}:
            yield match[1], match[2]


@pytest.mark.parametrize("page", TEXTS)
def test_the_routes_in_the_text_exist(page: str) -> None:
    """Every `METHOD /path` that a page names is a route."""
    missing = [(method, path) for method, path in told_routes(page) if not is_route(method, path)]
    assert not missing, missing


def test_every_route_is_on_the_page_of_the_api() -> None:
    """The page of the API has every route of the application with each of its methods."""
    told = [*told_routes("docs/api.md")]
    for route, methods in routes().items():
        pattern = re.sub(r"\{\w+\}", "[^/]+", route)
        said = {method for method, path in told if re.fullmatch(pattern, path)}
        assert methods <= said, f"docs/api.md lacks {methods - said} {route}"


def test_every_field_of_generate_is_on_the_page_of_the_api() -> None:
    """The table of `POST /generate` has exactly the fields that its body may have."""
    bodies = document()["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    body, _of_other_servers = bodies["anyOf"]
    table = TEXTS["docs/api.md"].partition("| field |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    told = {word for row in rows for word in re.findall(r"`(\w+)`", row)}
    assert told == set(body["properties"]), told ^ set(body["properties"])


def test_shell_is_the_only_name_of_a_shell() -> None:
    """Blocks for a shell are fenced as `sh`: under another name they would not be checked."""
    assert not [block.place for block in blocks() if block.language in ("bash", "shell", "console", "")]
    assert any(block.language == SHELL for block in blocks())
