"""Clients of others, live: `make test-clients` runs the script of each in the environment that it makes for them.

`make test` does not collect this module, and replays what was recorded of them instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.clients.record import CLIENTS, LIVE, command_of, record, script_of, version_of
from tests.clients.world import record_of

pytestmark = pytest.mark.anyio
KEPT = ("method", "path", "status", "refused")  # of a request: bodies have ids that are drawn


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """Async tests run on asyncio."""
    return "asyncio"


@pytest.mark.parametrize("client", [name for name, client in CLIENTS.items() if client.is_live])
async def test_a_client_runs(client: str, tiny_base: Path, tmp_path: Path) -> None:
    """A client takes every answer, in the version that was recorded, and asks as it was recorded to."""
    if script_of(client).suffix == ".mjs" and not (LIVE / "node" / "node_modules").exists():
        pytest.skip("make test-clients could not install it, since node or npm's registry is not there")
    recorded = record_of(client)
    assert version_of(client) == recorded["version"]
    (tmp_path / "base").symlink_to(tiny_base)  # where scripts find the tokenizer
    requests = await record(command_of(client), tiny_base, tmp_path)
    assert _outlines(requests) == _outlines(recorded["requests"])


def _outlines(requests: list[dict[str, Any]]) -> list[list[str]]:
    """Say what requests were, in an order of their own: some clients ask several things at once."""
    return sorted([str(request.get(name)) for name in KEPT] for request in requests)
