"""`manyhats tasks`: what a running server serves, version by version, so that a canary can be judged. Over HTTP."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adapters_store.escapes import printable
from server.api.answers import BaseTaskAnswer, TaskAnswer, TasksAnswer
from server.cli.errors import say, sentences
from server.cli.http_client import URL, ApiKey, Json, Server, Url, show_json

MAX_WIDTH = 1000
COLUMNS = ("task", "version", "route", "method", "where", "MiB", "requests", "tokens", "of the last", "failed")
TIMES = ("TTFT ms p50", "p95", "all ms p50", "p95")


def tasks(
    task: Annotated[str | None, typer.Argument(help="one task; all, if not given")] = None,
    url: Url = URL,
    api_key: ApiKey = None,
    json_: Json = False,
) -> None:
    """Show tasks: their versions, the share of requests that each gets, its residency, and its last requests."""
    with sentences("tasks"):
        server = Server(url, api_key)
        found = _all(server) if task is None else [server.ask(TaskAnswer | BaseTaskAnswer, "GET", "tasks", task)]
        if json_:
            show_json({"tasks": found} if task is None else found[0])
        else:
            show(found)
        for name in _unrouted(found):
            warning = (
                f"warning: {name} routes to no version: its requests are refused until it is routed or uploaded again"
            )
            say(warning, style="yellow")


def show(found: list[dict[str, Any]]) -> None:
    """Print the table of tasks, as wide as it needs to be: a line too long beats columns cut short."""
    shown = table(found)
    whole = Console(width=MAX_WIDTH).measure(shown).maximum
    Console(width=max(Console().width, whole)).print(shown)


def _unrouted(found: list[dict[str, Any]]) -> list[str]:
    """The tasks that have versions, none of which gets requests."""
    return [task["task"] for task in found if task["versions"] and not task["route"]["versions"]]


def _all(server: Server) -> list[dict[str, Any]]:
    """Fetch all tasks, page by page. Raises `ValueError` if the pages do not go on by name."""
    page = server.ask(TasksAnswer, "GET", "tasks")
    found: list[dict[str, Any]] = page["tasks"]
    while (after := page["next"]) is not None:
        page = server.ask(TasksAnswer, "GET", "tasks", query={"after": after})
        found += page["tasks"]
        if page["next"] is not None and page["next"] <= after:
            raise ValueError(f"{server.url} answers pages of tasks that do not go on")
    return found


def table(found: list[dict[str, Any]]) -> Table:
    """The table of tasks: a line a version, the newest of a task first."""
    shown = Table(highlight=False)
    for name in (*COLUMNS, *TIMES):
        shown.add_column(name, justify="left" if name in ("task", "route", "method", "where") else "right")
    for task in found:
        rows = [_row(task, version) for version in reversed(task["versions"])] or [[task["task"], "", "100%"]]
        for row in rows:
            add_row(shown, *row)
        shown.add_section()
    return shown


def add_row(shown: Table, *cells: str) -> None:
    """Add a line to a table of what a server says."""
    shown.add_row(*(escape(printable(cell)) for cell in cells))


def _row(task: dict[str, Any], version: dict[str, Any]) -> list[str]:
    use, recent = version["use"], version["recent"]
    times = [recent[name] for name in ("ttft_ms", "latency_ms")]
    return [
        task["task"] + (" (pinned)" if task.get("pinned") else ""),
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
    """The share of a task's requests that a version gets, as the table shows it."""
    weights = route["versions"]
    if str(number) not in weights:
        return "-"
    sticky = f", by {route['sticky']}" if route["sticky"] and len(weights) > 1 else ""
    return f"{100 * weights[str(number)] / sum(weights.values()):.3g}%{sticky}"
