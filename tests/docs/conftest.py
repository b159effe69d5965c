"""What a test that runs blocks of the pages needs: its blocks, and a server with the examples for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, Block, blocks
from tests.kit.server import Server, serve


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
    tree = {"import": ROOT / "adapters_store/examples"}
    with serve(real_base, tmp_path_factory.mktemp("examples"), **tree) as server:
        yield server
