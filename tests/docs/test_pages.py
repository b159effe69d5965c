"""The pages can be read: short, linked, their tables whole, and what they name is there."""

from __future__ import annotations

import ast
import builtins
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters_store.methods import METHODS as SERVED
from server.cli.http_client import KEY_VARIABLE
from server.engine.messages import Stats
from server.metrics import Metrics
from server.settings import PREFIX, Settings, variable
from tests.docs.pages import ROOT, TEXTS, anchors, blocks, code_words, links, prose
from training.methods import METHODS as TRAINED

MAX_README_BYTES = 8192
MAX_ROW = 200  # characters of a table's row, and of a line: what one still reads at a glance
PAGES_OF_NOW = [page for page in TEXTS if page != "CHANGELOG.md"]  # that one names what was
FOLDERS = "tests|adapters_store|server|training|docs|deploy"
PYTHON = [block for block in blocks() if block.language == "python"]


def test_readme_is_short() -> None:
    """README is at most 8 KB: all else is a page below docs/."""
    assert len(TEXTS["README.md"].encode()) <= MAX_README_BYTES


def test_every_page_is_reached_from_readme() -> None:
    """Each page is linked from README, or from a page that is."""
    reached, new = set[str](), {"README.md"}
    while new:
        reached |= new
        new = {target for page in new for target in _targets(page)} & TEXTS.keys() - reached
    assert reached == TEXTS.keys(), TEXTS.keys() - reached


def _targets(page: str) -> Iterator[str]:
    for link in links(page):
        if not link.startswith(("http", "#")):
            path = (ROOT / page).parent / link.partition("#")[0]
            yield path.resolve().relative_to(ROOT.resolve()).as_posix()


@pytest.mark.parametrize("page", TEXTS)
def test_links_resolve(page: str) -> None:
    """Every link to a file is to one that exists, and every link to a heading to one that the page has."""
    for link in links(page):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / name).resolve() if name else (ROOT / page).resolve()
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(target.relative_to(ROOT.resolve()).as_posix()), f"{page}: {link}"


@pytest.mark.parametrize("page", TEXTS)
def test_tables_are_whole_and_lines_short(page: str) -> None:
    """Every row of a table has as many cells as its head, and no line is longer than one reads at a glance."""
    width = 0
    for number, line in enumerate(prose(page).splitlines(), start=1):
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert not cells or cells == (width or cells), f"{page}, row {line[:60]}"
        assert len(line) <= MAX_ROW or PREFIX in line, f"{page} line {number} has {len(line)} characters"
        width = cells


def test_every_block_names_its_language() -> None:
    """A block of code without a language is not checked by anything, so there is none."""
    known = {"sh", "python", "yaml", "text"}
    assert not [block.place for block in blocks() if block.language not in known]


# Names


def test_the_paths_exist() -> None:
    """Every path of this repository that a page names is there."""
    named = [
        (page, path.rstrip("/"))
        for page in PAGES_OF_NOW
        for path in re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./-]*[\w/]", TEXTS[page])
    ]
    assert len(named) > 50
    missing = [f"{page}: {path}" for page, path in named if not any(ROOT.glob(path)) and "NAME" not in path]
    assert not missing, missing


def _definitions(file: Path) -> set[str]:
    """Names that a module defines: functions, classes, and methods as `Class.method`."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{one.name}" for one in node.body if hasattr(one, "name")}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_the_functions_exist() -> None:
    """Every function or class that stands in brackets behind a path, as in `a.py` (`f`), is defined there."""
    pattern = re.compile(r"`([\w/]+(?:\.py|/))`\s+\(((?:`[\w.]+`(?:,\s)?)+)\)")
    found = [(page, *match) for page in PAGES_OF_NOW for match in pattern.findall(prose(page))]
    assert len(found) > 15
    missing = []
    for page, path, names in found:
        files = [ROOT / path] if path.endswith(".py") else [*(ROOT / path).glob("*.py")]
        defined = set().union(*(_definitions(file) for file in files if file.exists()))
        missing += [f"{page}: {path} {name}" for name in re.findall(r"`([\w.]+)`", names) if name not in defined]
    assert not missing, missing


def test_the_metrics_exist() -> None:
    """Every metric that a page names is one that the server exports."""
    families = Metrics(Stats, lambda: None).registry.collect()
    exported = {family.name + suffix for family in families for suffix in ("", "_total", "_bucket")}
    named = {word for page in PAGES_OF_NOW for word in re.findall(r"\bmanyhats_[a-z_]+", TEXTS[page])}
    assert len(named) > 3 and named <= exported, named - exported


def test_the_variables_exist() -> None:
    """Every variable MANYHATS_… that a page names is a setting's, or a key's for the commands."""
    known = {variable(name) for name in Settings.model_fields} | {KEY_VARIABLE}
    named = {word for page in PAGES_OF_NOW for word in re.findall(rf"\b{PREFIX}[A-Z_]+", TEXTS[page])}
    assert len(named) > 10 and named <= known, named - known


def test_every_method_is_on_the_page_of_methods() -> None:
    """The page of methods has each `peft_type` that is served and each `--method` that can be trained, and no other."""
    words = {word for words in code_words("docs/methods.md") for word in re.split(r"[ ,]+", words)}
    assert SERVED.keys() | TRAINED.keys() <= words, (SERVED.keys() | TRAINED.keys()) - words
    table = prose("docs/methods.md").partition("# Methods")[2].partition("## Formats")[0]
    types = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", table))
    assert types == set(SERVED), types ^ set(SERVED)


def test_a_word_has_one_line_in_the_glossary() -> None:
    """No word stands twice in the glossary."""
    words = re.findall(r"^\| ([\w ]+) \|", prose("docs/glossary.md"), flags=re.MULTILINE)
    words = [word for word in words if word != "word"]
    assert len(words) > 40 and len(words) == len(set(words))


# Python


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.place)
def test_python_blocks_compile_and_their_names_exist(block: Any) -> None:
    """A block of Python compiles, what it imports is there, and it uses no name that it does not define."""
    tree = ast.parse(block.text)
    compile(tree, block.place, "exec")
    known = set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names), f"{block.place}: {node.module}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            known |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            known.add(node.name)
        if isinstance(node, ast.arg):
            known.add(node.arg)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            known.add(node.id)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    assert used <= known, f"{block.place}: {used - known}"
