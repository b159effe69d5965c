"""Files and functions stay short enough to be read in one go."""

from __future__ import annotations

import ast
from pathlib import Path
from statistics import median

from tests.house.sources import PACKAGES, Function, files, name_of, nodes

MAX_FILE, MAX_TEST_FILE = 400, 600  # lines
MAX_FUNCTION, MAX_MEDIAN = 45, 8  # lines, those of nested functions counted in
NESTED = "Numba compiles it as one: its parts are closures over the width and type of a vector"
LONG_FUNCTIONS = {  # and why they are not cut
    "server/model/backends/cpu/vector.py:_tile": NESTED,
    "server/model/backends/cpu/vector.py:tile": NESTED,
    "server/model/backends/cpu/attention.py:_attend_tile": "one loop over a tile; a call per block costs its speed",
}


def _num_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def _function_sizes() -> list[tuple[str, int]]:
    found: list[tuple[Path, Function]] = [*nodes(ast.FunctionDef, *PACKAGES), *nodes(ast.AsyncFunctionDef, *PACKAGES)]
    return [(f"{name_of(path)}:{node.name}", _function_size(node)) for path, node in found]


def _function_size(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_no_source_file_is_long() -> None:
    """No file of the three packages has more than 400 lines."""
    long = {name_of(path): size for path in files(*PACKAGES) if (size := _num_lines(path)) > MAX_FILE}
    assert not long, f"split {long}"


def test_no_test_file_is_long() -> None:
    """No file of the tests has more than 600 lines."""
    long = {name_of(path): size for path in files("tests") if (size := _num_lines(path)) > MAX_TEST_FILE}
    assert not long, f"split {long}"


def test_no_function_is_long() -> None:
    """No function has more than 45 lines but those that stand here with a reason, and each of those has more."""
    long = {name: size for name, size in _function_sizes() if size > MAX_FUNCTION}
    assert set(long) == set(LONG_FUNCTIONS), long


def test_most_functions_are_small() -> None:
    """Half of all functions have at most eight lines."""
    assert median(size for _, size in _function_sizes()) <= MAX_MEDIAN
