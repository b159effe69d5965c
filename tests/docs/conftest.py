"""What a test that runs blocks of the pages needs: its blocks, and a server with the examples for all of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.docs.pages import ROOT, Block, blocks
from tests.kit.server import Server, serve, tail

EXAMPLES = {config.parent.name for config in (ROOT / "adapters_store/examples").glob("*/adapter_config.json")}
IMPORTED_WITHIN_S = 120.0


@pytest.fixture
def marked(request: pytest.FixtureRequest) -> list[Block]:
    """The blocks of the pages whose comment names this test; it fails if there are none."""
    name = f"{Path(request.path).relative_to(ROOT).as_posix()}::{request.node.originalname}"
    found = [block for block in blocks() if (block.kind, block.said) == ("run by", name)]
    assert found, f"no page names {name}: it runs nothing"
    return found


@pytest.fixture(scope="module")
def examples(real_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the real base with the shipped examples, as `make serve` starts it."""
    tree: dict[str, Any] = {"import": ROOT / "adapters_store/examples"}
    with serve(real_base, tmp_path_factory.mktemp("examples"), **tree) as server:
        _wait_for_imports(server)
        yield server


def _wait_for_imports(server: Server) -> None:
    """Until each example is a task: what a busy machine had no time to check is checked while the server runs."""
    until = time.monotonic() + IMPORTED_WITHIN_S
    while missing := EXAMPLES - {
        task["task"] for task in httpx2.get(f"{server.url}/tasks", timeout=30).json()["tasks"]
    }:
        assert time.monotonic() < until, f"{missing} are no tasks; the log ends: {tail(server.log)}"
        time.sleep(0.5)
