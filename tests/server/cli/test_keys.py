"""`manyhats keys`: keys of a real server from the command line."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from server.cli import main
from server.cli.keys import app
from tests.server.world import Site, serve_site

pytestmark = pytest.mark.anyio
KEY = "the admin's own key"


@pytest.fixture
async def server(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> AsyncIterator[Site]:
    """A server on loopback with an admin key and the tenant `acme`."""
    async with serve_site(tiny_base, tmp_path, admin_key=KEY) as site:
        await asyncio.to_thread(site.state.stores.tenants.add, "acme")
        yield site


async def keys(site: Site, *words: str, admin_key: str = KEY) -> Result:
    """Run the command beside the server."""
    command = [words[0], "--url", str(site.http.base_url), "--tenant", "acme", *words[1:]]
    environment = {"MANYHATS_API_KEY": admin_key, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return await asyncio.to_thread(CliRunner().invoke, app, command, env=environment)


async def works(site: Site, key: str) -> bool:
    return (await site.http.get("/tasks", headers={"Authorization": f"Bearer {key}"})).status_code == 200


async def test_the_life_of_a_key(server: Site) -> None:
    """A key is made and shown alone on standard output, listed without its secret, rotated, and revoked."""
    made = await keys(server, "create", "--scope", "deploy", "--scope", "generate", "--note", "ci [x]")
    first = made.stdout.strip()
    assert made.exit_code == 0 and await works(server, first), made.output
    key_id, secret = first.split(".")
    listed = await keys(server, "list")
    (as_json,) = json.loads((await keys(server, "list", "--json")).stdout)["keys"]
    assert (as_json["id"], as_json["note"]) == (key_id, "ci [x]")
    assert key_id in listed.stdout and "deploy, generate" in listed.stdout and "ci [x]" in listed.stdout
    assert secret not in listed.stdout
    second = (await keys(server, "rotate", key_id)).stdout.strip()
    assert second != first and await works(server, second) and not await works(server, first)
    second = json.loads((await keys(server, "rotate", key_id, "--json")).stdout)["key"]
    assert await works(server, second)
    assert (await keys(server, "revoke", key_id)).exit_code == 0
    assert not await works(server, second)
    assert key_id not in (await keys(server, "list")).stdout


async def test_what_goes_wrong_is_a_sentence(server: Site) -> None:
    """A refusal, or no server, is one sentence and the code 1; the admin key is not in it."""
    for shown, said in (
        (await keys(server, "revoke", "mh_none"), "404: the tenant acme has no key mh_none"),
        (await keys(server, "list", admin_key="wrong " + KEY), "401: send the key"),
        (await keys(server, "create", "--scope", "root"), "422: scopes"),
        (await keys(server, "list", "--url", "http://127.0.0.1:9"), "manyhats keys list:"),
    ):
        assert shown.exit_code == 1 and said in shown.stderr, shown.output
        assert KEY not in shown.output


def test_it_is_a_command_of_manyhats(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The package lists the command, and `manyhats keys` has its subcommands."""
    monkeypatch.setattr(sys, "argv", ["manyhats", "keys", "--help"])
    with pytest.raises(SystemExit):
        main.main()
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("create", "list", "rotate", "revoke"))
