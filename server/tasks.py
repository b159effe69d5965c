"""`manyhats tasks`: what a running server serves, version by version, so that a canary can be judged. Over HTTP."""

from __future__ import annotations

from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

TIMEOUT_S = 30.0
COLUMNS = ("task", "version", "route", "method", "where", "MiB", "requests", "tokens", "of the last", "failed")
TIMES = ("TTFT ms p50", "p95", "all ms p50", "p95")

Url = Annotated[str, typer.Option(help="of the server")]
ApiKey = Annotated[str | None, typer.Option(help="a key of the tenant, where the server asks for one")]


def tasks(
    task: Annotated[str | None, typer.Argument(help="one task; all, if not given")] = None,
    url: Url = "http://127.0.0.1:8000",
    api_key: ApiKey = None,
) -> None:
    """Show tasks: their versions, what each gets of the requests, where it is, and how its last requests went."""
    console = Console()
    try:
        found = ask(url, api_key, task)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        reason = f"[bold red]manyhats tasks:[/] {escape(str(error))}"
        Console(stderr=True).print(reason, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    console.print(table(found))


def ask(url: str, api_key: str | None, task: str | None = None) -> list[dict[str, Any]]:
    """The tasks of a server. Raises `ValueError` with its own sentence where it refuses, or `httpx.HTTPError`."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    path = "/tasks" if task is None else f"/tasks/{task}"
    answer = httpx.get(f"{url.rstrip('/')}{path}", headers=headers, timeout=TIMEOUT_S)
    try:
        said = answer.json()
    except ValueError:
        raise ValueError(f"{url} answered {answer.status_code}, and not as manyhats does") from None
    if not answer.is_success:
        raise ValueError(f"{answer.status_code}: {said['error']['message']}")
    found: list[dict[str, Any]] = said["tasks"] if task is None else [said]
    return found


def table(found: list[dict[str, Any]]) -> Table:
    """A line a version, the newest of a task first."""
    shown = Table(highlight=False)
    for name in (*COLUMNS, *TIMES):
        shown.add_column(name, justify="left" if name in ("task", "route", "method", "where") else "right")
    for task in found:
        rows = [_row(task, version) for version in reversed(task["versions"])] or [[task["task"], "", "100%"]]
        for row in rows:
            shown.add_row(*map(escape, row))
        shown.add_section()
    return shown


def _row(task: dict[str, Any], version: dict[str, Any]) -> list[str]:
    use, recent = version["use"], version["recent"]
    times = [recent[name] for name in ("ttft_ms", "latency_ms")]
    return [
        task["task"] + (" (pinned)" if task["pinned"] else ""),
        str(version["version"]),
        _share(task["route"], version["version"]),
        version["method"],
        version["residency"],
        f"{version['bytes'] / 2**20:.1f}",
        f"{use['requests']:,}",
        f"{use['completion_tokens']:,}",
        str(recent["requests"]),
        str(recent["failed"]),
        *(f"{time[part]:,.0f}" if time else "-" for time in times for part in ("p50", "p95")),
    ]


def _share(route: dict[str, Any], number: int) -> str:
    """How much of a task's requests a version gets."""
    weights = route["versions"]
    if str(number) not in weights:
        return "-"
    sticky = f", by {route['sticky']}" if route["sticky"] and len(weights) > 1 else ""
    return f"{100 * weights[str(number)] / sum(weights.values()):.3g}%{sticky}"
