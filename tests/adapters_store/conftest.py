"""Tiny bases of every type, each made once a session, and the spec of the llama."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters_store.base.spec import BaseSpec
from tests.kit.forge import spec_of
from tests.kit.tiny import make_tiny_base


@pytest.fixture(scope="session")
def tiny_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the tiny random base of a model type. Do not write into it."""
    return functools.cache(lambda kind: make_tiny_base(tmp_path_factory.mktemp("bases") / kind, kind))


@pytest.fixture(scope="module")
def spec(tiny_base: Path) -> BaseSpec:
    """The spec of the tiny llama."""
    return spec_of(tiny_base)
