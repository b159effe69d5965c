"""`manyhats tasks`: the table that a canary is judged by, from a server over HTTP."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer import Typer
from typer.testing import CliRunner

from server.cli.tasks import table, tasks
from server.core import EngineFailure
from server.requests.version_stats import MAX_REQUESTS, MAX_VERSIONS, Recent, RequestOutcome, summary
from tests.server.world import Site, serve_site

KEY = "correct-horse-battery"


def run(*words: str, columns: int = 200) -> tuple[int, str]:
    """The exit code and all that the command says."""
    app = Typer()
    app.command()(tasks)
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": str(columns)})
    return result.exit_code, result.output


def rows(text: str) -> list[list[str]]:
    """The cells of the table's lines."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]


@pytest.mark.anyio
async def test_a_canary_is_shown(anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes]) -> None:
    """Versions stand newest first with their share of requests, place, use, failures and times."""
    async with serve_site(tiny_base, tmp_path, admin_key=KEY) as site:
        site.http.headers["Authorization"] = f"Bearer {KEY}"
        await _a_canary(site, zips)
        url = str(site.http.base_url)
        code, said = await asyncio.to_thread(run, "a", "--url", url, "--api-key", KEY)
        assert code == 0, said
        second, first = rows(said)
        assert second[:5] == ["a (pinned)", "2", "5%, by user", "lora", "slot"]
        assert first[1:3] == ["1", "95%"] or first[1:3] == ["1", "95%, by user"]
        assert (first[8], first[9], second[8], second[9]) == ("3", "0", "1", "1")
        _, narrow = await asyncio.to_thread(lambda: run("a", "--url", url, "--api-key", KEY, columns=80))
        assert [row[:10] for row in rows(narrow)] == [row[:10] for row in (second, first)]
        assert all(cell.isdigit() for cell in first[10:]) and second[10:] == ["-"] * 4
        code, said = await asyncio.to_thread(run, "--url", url, "--api-key", KEY)
        assert code == 0 and [row[0] for row in rows(said)] == ["base", "a (pinned)", "a (pinned)"]
        code, said = await asyncio.to_thread(run, "a", "--json", "--url", url, "--api-key", KEY)
        assert code == 0 and json.loads(said) == (await site.http.get("/tasks/a")).json()
        assert (await site.upload("new", zips[0], activate="false")).status_code == 201
        code, said = await asyncio.to_thread(run, "--url", url, "--api-key", KEY)
        assert code == 0 and "warning: new routes to no version" in said and said.count("warning") == 1
        for words, sentence in (
            (("b", "--api-key", KEY), "404: there is no task b"),
            ((), "401:"),
        ):
            code, said = await asyncio.to_thread(run, "--url", url, *words)
            assert code == 1 and sentence in said
    code, said = run("--url", url)
    assert code == 1 and "refused" in said


async def _a_canary(site: Site, zips: list[bytes]) -> None:
    for body in zips[:2]:
        assert (await site.upload("a", body)).status_code == 201
    await site.http.put("/tasks/a/route", json={"versions": {"1": 95, "2": 5}, "sticky": "user"})
    await site.http.put("/tasks/a/pin", json={"pinned": True})
    for _ in range(3):
        await site.ask("a", prompt="x", version=1)
    site.engine.failure = EngineFailure("adapter_failed", "it is broken")
    assert (await site.post("/generate?task=a", {"prompt": "x", "version": 2})).status_code == 503
    seen = (await site.http.get("/metrics")).text
    assert 'manyhats_version_requests_total{status="200",task="a",tenant="default",version="1"} 3.0' in seen
    assert 'manyhats_version_requests_total{status="503",task="a",tenant="default",version="2"} 1.0' in seen
    assert 'manyhats_version_time_to_first_token_seconds_count{task="a",tenant="default",version="1"} 3.0' in seen


def test_markup_in_answers_is_shown_as_it_is() -> None:
    """Answers of a server are text, never rich's markup."""
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table([{"task": "[red]x[/]", "versions": []}]))
    assert "[red]x[/]" in console.export_text()


def test_recent_outcomes_are_bounded() -> None:
    """The last requests of a version count, and the versions that were used last."""
    recent = Recent()
    for number in range(MAX_REQUESTS + 50):
        recent.add(("t", "a", 1), RequestOutcome("200", float(number), 2.0 * number, 3))
    said = summary(recent.of(("t", "a", 1)))
    assert (said["requests"], said["failed"], said["tokens"]) == (MAX_REQUESTS, 0, 3 * MAX_REQUESTS)
    assert said["ttft_ms"] == {"p50": 149.5, "p95": 239.05}
    recent.add(("t", "a", 2), RequestOutcome("200", 5.0, 6.0))
    assert summary(recent.of(("t", "a", 2)))["latency_ms"] == {"p50": 6.0, "p95": 6.0}
    assert summary(recent.of(("t", "a", 3))) == {
        "requests": 0, "failed": 0, "ttft_ms": None, "latency_ms": None, "tokens": 0,
    }  # fmt: skip
    for number in range(MAX_VERSIONS):
        recent.add(("u", "b", number), RequestOutcome("500"))
    assert summary(recent.of(("t", "a", 1)))["requests"] == 0
    assert summary(recent.of(("u", "b", 0)))["failed"] == 1
