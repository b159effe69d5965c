"""Fixtures that the server's tests share: a server over a fake engine, and adapters to upload."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from openai import AsyncOpenAI

from tests.kit.adapters import make_lora, zip_folder
from tests.server.world import Site, open_site, serve_site


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Async tests run on asyncio."""
    return "asyncio"


@pytest.fixture(scope="session")
def loras(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three small adapters of the tiny base. Do not write into them."""
    folder = tmp_path_factory.mktemp("loras")
    return [make_lora(folder / str(seed), tiny_base, seed, r=2, target_modules=["q_proj"]) for seed in range(3)]


@pytest.fixture(scope="session")
def zips(loras: list[Path]) -> list[bytes]:
    """Bodies of uploads: one an adapter."""
    return [zip_folder(folder) for folder in loras]


@pytest.fixture
async def site(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> AsyncIterator[Site]:
    """A server of the test's own."""
    async with open_site(tiny_base, tmp_path / "data") as made:
        yield made


@pytest.fixture(scope="module")
async def server(
    anyio_backend: str, tiny_base: Path, zips: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Site]:
    """A server on loopback with the task `one`, for all tests of a file."""
    async with serve_site(tiny_base, tmp_path_factory.mktemp("server")) as made:
        assert (await made.upload("one", zips[0])).status_code == 201
        yield made


@pytest.fixture(scope="module")
async def shared(
    anyio_backend: str, tiny_base: Path, zips: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Site]:
    """A server of a module's tests, which must not change it; it has the tasks `one` and `two`."""
    async with open_site(tiny_base, tmp_path_factory.mktemp("shared")) as made:
        for task, body in zip(("one", "two"), zips, strict=False):
            assert (await made.upload(task, body)).status_code == 201
        yield made


@pytest.fixture
async def client(server: Site) -> AsyncIterator[AsyncOpenAI]:
    """OpenAI's own client, over the shared server."""
    async with AsyncOpenAI(base_url=f"{server.http.base_url}/v1", api_key="none", max_retries=0) as made:
        yield made
