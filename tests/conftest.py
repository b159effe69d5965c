"""Fixtures that many rooms share: the tiny base, made once a session, and the real one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.kit.tiny import make_tiny_base

# Longest first.
LONG_FILES = (
    "tests/golden/test_golden.py",
    "tests/training/compare/test_compare.py",
    "tests/docs/test_run.py",
    "tests/benchmarks/test_bench.py",
    "tests/server/api/test_stores.py",
    "tests/server/test_kill.py",
    "tests/server/api/test_churn.py",
    "tests/server/test_kills.py",
    "tests/training/test_train.py",
)
# What these run, the tests of the rooms run too: coverage, which slows Python by half, has nothing to add.
UNTRACED = (
    "tests/golden/",
    "tests/laws/",
    "tests/benchmarks/",
    "tests/house/",
    "tests/docs/",
    "tests/clients/",
    "tests/kit/",
    "tests/server/api/test_schemathesis.py",
    "tests/server/api/test_churn.py",
    "tests/server/api/test_openai_fields.py",
    "tests/server/test_typed.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long the tests of adapters that come and go take; the laws ask for 60."""
    parser.addoption("--churn-seconds", type=float, default=4.0, help="of each test that churns (4; the laws: 60)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin files of minutes first, so that no process ends long after the others; trace where lines are told apart."""
    begun_first = {file: place for place, file in enumerate(LONG_FILES)}
    items.sort(key=lambda item: begun_first.get(item.location[0], len(LONG_FILES)))
    for item in items:
        if item.location[0].startswith(UNTRACED):
            item.add_marker("no_cover")


@pytest.fixture
def churn_seconds(request: pytest.FixtureRequest) -> float:
    """Seconds of churn."""
    seconds: float = request.config.getoption("--churn-seconds")
    return seconds


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llama with the byte tokenizer. Do not write into it."""
    return make_tiny_base(tmp_path_factory.mktemp("bases") / "tiny-llama")


@pytest.fixture(scope="session")
def real_base() -> Path:
    """SmolLM2-135M-Instruct, converted; from the user's cache, where `make test` puts it."""
    from adapters_store.base.resolve import resolve_base

    return resolve_base("smollm2-135m")


@pytest.fixture(scope="session")
def biased_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random qwen2, whose biases give every family something to change. Do not write into it."""
    return make_tiny_base(tmp_path_factory.mktemp("bases") / "tiny-qwen2", "qwen2")


@pytest.fixture(scope="session")
def artifact(biased_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """An artifact of a family and a seed for the biased base, made once a session. Do not write into it."""
    from tests.kit.families import FAMILIES, FAMILIES_OF_BIASED

    folder, makers = tmp_path_factory.mktemp("families"), {**FAMILIES, **FAMILIES_OF_BIASED}
    return cache(lambda family, seed: makers[family](folder / f"{family}-{seed}", biased_base, seed))
