"""`manyhats route`, `rollback`, `pin`, `rm` and `pull` against a server over HTTP."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from adapters_store.format.folder import read_folder
from server.cli import operate
from tests.server.world import Site, serve_site

pytestmark = pytest.mark.anyio
KEY = "correct-horse-battery"
app = Typer()
for command in (operate.route, operate.rollback, operate.pin, operate.rm, operate.pull):
    app.command()(command)


async def run(site: Site, *words: str, key: str = KEY, typed: str = "") -> tuple[int, str]:
    """The exit code and all that a command says."""
    environment = {"MANYHATS_API_KEY": key, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    command = [words[0], "--url", str(site.http.base_url), *words[1:]]
    result = await asyncio.to_thread(CliRunner().invoke, app, command, typed, env=environment)
    return result.exit_code, result.output


async def test_a_task_is_operated(anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes]) -> None:
    """A route is shared out and taken back, a task pinned, a version downloaded as it is, and all of it deleted."""
    async with serve_site(tiny_base, tmp_path, admin_key=KEY) as site:
        site.http.headers["Authorization"] = f"Bearer {KEY}"
        digests = [(await site.upload("a", body)).json()["digest"] for body in zips[:2]]
        code, said = await run(site, "route", "a", "1=95", "2=5", "--sticky")
        assert code == 0 and "95%, by user" in said and "5%, by user" in said
        code, said = await run(site, "rollback", "a", "--json")
        assert code == 0 and json.loads(said) == (await site.http.get("/tasks/a")).json()
        for words, is_pinned in ((["pin", "a"], True), (["pin", "a", "--off"], False)):
            code, said = await run(site, *words)
            assert code == 0 and ("(pinned)" in said) == is_pinned
        for name, version in (("a", 1), ("a@1", 0)):
            out = tmp_path / f"out{version}"
            code, said = await run(site, "pull", name, "--out", str(out))
            assert code == 0 and read_folder(out).digest == digests[version], said
        code, said = await run(site, "rm", "a@1", typed="n\n")
        assert code == 1 and len((await site.http.get("/tasks/a")).json()["versions"]) == 2
        code, said = await run(site, "rm", "a@1", typed="y\n")
        assert code == 0 and "a@1 is deleted" in said
        assert [one["version"] for one in (await site.http.get("/tasks/a")).json()["versions"]] == [2]
        assert (await run(site, "rm", "a", "--yes"))[0] == 0
        assert (await site.http.get("/tasks/a")).status_code == 404


async def test_what_goes_wrong_is_a_sentence(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """A refusal, or what cannot be meant, is one sentence and the code 1."""
    async with serve_site(tiny_base, tmp_path, admin_key=KEY) as site:
        for words, sentence in (
            (("route", "b", "1"), "404: there is no task b"),
            (("route", "b", "one"), "one is no VERSION=WEIGHT"),
            (("rollback", "b"), "404: there is no task b"),
            (("pin", "base"), "422: the base cannot be pinned"),
            (("rm", "b@7", "--yes"), "404: there is no task b"),
            (("pull", "b", "--out", str(tmp_path)), "is there already"),
            (("pull", "b", "--out", str(tmp_path / "new")), "404: there is no task b"),
        ):
            code, said = await run(site, *words)
            assert code == 1 and sentence in said, (words, said)
        code, said = await run(site, "pin", "b", key="wrong")
        assert code == 1 and "401" in said
