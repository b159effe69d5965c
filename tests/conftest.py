"""Fixtures that many rooms share: the tiny base, made once a session, and the real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.tiny import make_tiny_base


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llama with the byte tokenizer. Do not write into it."""
    return make_tiny_base(tmp_path_factory.mktemp("bases") / "tiny-llama")


@pytest.fixture(scope="session")
def real_base() -> Path:
    """SmolLM2-135M-Instruct, converted; from the user's cache, where `make test` puts it."""
    from adapters_store.bases import resolve_base

    return resolve_base("smollm2-135m")
