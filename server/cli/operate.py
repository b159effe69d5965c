"""Operate the tasks of a running server over HTTP: `manyhats route`, `rollback`, `pin`, `rm` and `pull`."""

from __future__ import annotations

import io
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated, Any

import typer

from server.api.answers import TaskAnswer
from server.cli.errors import say, sentences
from server.cli.http_client import URL, ApiKey, Json, Server, Url, show_json
from server.cli.tasks import show

NUMBER = re.compile("[1-9][0-9]{0,17}")  # of a version
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
        body = {"versions": _weights(weights), "sticky": "user" if is_sticky else None}
        _tell(Server(url, api_key).ask(TaskAnswer, "PUT", "tasks", task, "route", body=body), json_)


def rollback(task: Task, url: Url = URL, api_key: ApiKey = None, json_: Json = False) -> None:
    """Restore the route that a task had before this one."""
    with sentences("rollback"):
        _tell(Server(url, api_key).ask(TaskAnswer, "POST", "tasks", task, "rollback"), json_)


def pin(
    task: Task,
    url: Url = URL,
    api_key: ApiKey = None,
    is_off: Annotated[bool, typer.Option("--off", help="let it go if room is needed")] = False,
    json_: Json = False,
) -> None:
    """Keep the versions that a task routes to on the device."""
    with sentences("pin"):
        _tell(Server(url, api_key).ask(TaskAnswer, "PUT", "tasks", task, "pin", body={"pinned": not is_off}), json_)


def rm(
    task: TaskVersion,
    url: Url = URL,
    api_key: ApiKey = None,
    is_sure: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    json_: Json = False,
) -> None:
    """Delete a task, or one version of it; what runs finishes."""
    with sentences("rm"):
        name, version = _split(task)
        if not is_sure:
            typer.confirm(f"Delete {task} from {url}?", abort=True, err=True)
        number = () if version is None else ("versions", str(version))
        Server(url, api_key).ask(None, "DELETE", "tasks", name, *number)
        if json_:
            show_json({"task": name, "version": version, "deleted": True})
        else:
            say(f"{task} is deleted")


def pull(
    task: TaskVersion,
    out: Annotated[Path, typer.Option(help="the folder to make")],
    url: Url = URL,
    api_key: ApiKey = None,
    json_: Json = False,
) -> None:
    """Download a version of a task, by default the newest, as a PEFT folder."""
    with sentences("pull"):
        name, version = _split(task)
        if out.exists():
            raise ValueError(f"{out} is there already; name a folder that is not")
        server = Server(url, api_key)
        if version is None:
            version = _newest(server.ask(TaskAnswer, "GET", "tasks", name))
        _unpack(server.download("tasks", name, "versions", str(version), "artifact"), out, server.url)
        if json_:
            show_json({"task": name, "version": version, "out": str(out)})
        else:
            say(f"{name} version {version} is in {out}")


def _unpack(body: bytes, out: Path, url: str) -> None:
    """Unpack a zip next to `out`, and rename it when it is whole. Raises `ValueError` for bytes that are no zip."""
    from adapters_store.format.zip_file import UNSOUND

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent, ignore_cleanup_errors=True) as partial:
        folder = Path(partial) / "whole"
        folder.mkdir()
        try:
            with zipfile.ZipFile(io.BytesIO(body)) as archive:
                archive.extractall(folder)
        except UNSOUND:
            raise ValueError(f"what {url} answered is no whole zip; ask again") from None
        folder.rename(out)


def _tell(task: dict[str, Any], is_json: bool) -> None:
    """Print a task as it is now."""
    if is_json:
        show_json(task)
    else:
        show([task])


def _weights(words: list[str]) -> dict[str, float]:
    """Read `VERSION[=WEIGHT]` of each version. Raises `ValueError` with a sentence."""
    found: dict[str, float] = {}
    for word in words:
        version, _, weight = word.partition("=")
        try:
            share = float(weight or 1)
        except ValueError:
            share = 0.0
        if not NUMBER.fullmatch(version) or not 0 < share < float("inf"):
            raise ValueError(f"{word} is no VERSION=WEIGHT, such as 3=95")
        if version in found:
            raise ValueError(f"version {version} stands twice; give each version one weight")
        found[version] = share
    return found


def _split(task: str) -> tuple[str, int | None]:
    """Read `TASK[@VERSION]`. Raises `ValueError` with a sentence: what cannot be a version is never the whole task."""
    name, at, version = task.partition("@")
    if not name:
        raise ValueError(f"'{task}' names no task; name one, such as banking77 or banking77@2")
    if at and not NUMBER.fullmatch(version):
        raise ValueError(f"{task} names no version; write {name}@2 for one, or {name} for the task")
    return name, int(version) if at else None


def _newest(task: dict[str, Any]) -> int:
    if not task["versions"]:
        raise ValueError(f"{task['task']} has no version that could be downloaded")
    return int(max(version["version"] for version in task["versions"]))
