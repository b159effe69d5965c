"""Operate the tasks of a running server over HTTP: `manyhats route`, `rollback`, `pin`, `rm` and `pull`."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from server.cli.errors import sentences
from server.cli.http_client import URL, ApiKey, Json, Url, ask, download, show_json
from server.cli.tasks import show

Task = Annotated[str, typer.Argument(help="its name")]
TaskVersion = Annotated[str, typer.Argument(metavar="TASK[@VERSION]", help="a task, or one version of it")]


def route(
    task: Task,
    weights: Annotated[list[str], typer.Argument(metavar="VERSION[=WEIGHT] …", help="such as 3, or 3=95 4=5")],
    url: Url = URL,
    api_key: ApiKey = None,
    is_sticky: Annotated[bool, typer.Option("--sticky", help="a user gets the same version each time")] = False,
    json_: Json = False,
) -> None:
    """Share the requests of a task out among its versions, from the next request on."""
    with sentences("route"):
        body = {"versions": dict(map(_weight, weights)), "sticky": "user" if is_sticky else None}
        _tell(ask(url, api_key, "PUT", f"/tasks/{task}/route", body), json_)


def rollback(task: Task, url: Url = URL, api_key: ApiKey = None, json_: Json = False) -> None:
    """Restore the route that a task had before this one."""
    with sentences("rollback"):
        _tell(ask(url, api_key, "POST", f"/tasks/{task}/rollback"), json_)


def pin(
    task: Task,
    url: Url = URL,
    api_key: ApiKey = None,
    is_off: Annotated[bool, typer.Option("--off", help="let it go if room is needed")] = False,
    json_: Json = False,
) -> None:
    """Keep the versions that a task routes to on the device."""
    with sentences("pin"):
        _tell(ask(url, api_key, "PUT", f"/tasks/{task}/pin", {"pinned": not is_off}), json_)


def rm(
    task: TaskVersion,
    url: Url = URL,
    api_key: ApiKey = None,
    is_sure: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> None:
    """Delete a task, or one version of it; what runs finishes."""
    name, version = _split(task)
    if not is_sure:
        typer.confirm(f"Delete {task} from {url}?", abort=True)
    with sentences("rm"):
        ask(url, api_key, "DELETE", f"/tasks/{name}" if version is None else f"/tasks/{name}/versions/{version}")
        Console(stderr=True).print(f"{task} is deleted", highlight=False, markup=False)


def pull(
    task: TaskVersion,
    out: Annotated[Path, typer.Option(help="the folder to make")],
    url: Url = URL,
    api_key: ApiKey = None,
) -> None:
    """Download a version of a task, by default the newest, as a PEFT folder."""
    name, version = _split(task)
    with sentences("pull"):
        if out.exists():
            raise ValueError(f"{out} is there already; name a folder that is not")
        if version is None:
            version = _newest(ask(url, api_key, "GET", f"/tasks/{name}"))
        body = download(url, api_key, f"/tasks/{name}/versions/{version}/artifact")
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            archive.extractall(out)
        Console(stderr=True).print(f"{name} version {version} is in {out}", highlight=False, markup=False)


def _tell(task: dict[str, Any], is_json: bool) -> None:
    """Print a task as it is now."""
    if is_json:
        show_json(task)
    else:
        show([task])


def _weight(text: str) -> tuple[str, float]:
    """Read `VERSION[=WEIGHT]`. Raises `ValueError` with a sentence."""
    version, _, weight = text.partition("=")
    try:
        return str(int(version)), float(weight or 1)
    except ValueError:
        raise ValueError(f"{text} is no VERSION=WEIGHT, such as 3=95") from None


def _split(task: str) -> tuple[str, str | None]:
    name, _, version = task.partition("@")
    return name, version or None


def _newest(task: dict[str, Any]) -> str:
    if not task["versions"]:
        raise ValueError(f"{task['task']} has no version that could be downloaded")
    return str(max(version["version"] for version in task["versions"]))
