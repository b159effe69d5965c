"""`manyhats keys`: a tenant's keys on a running server, over HTTP, with the admin key or a tenant's of scope admin."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adapters_store.tenants import DEFAULT_TENANT, SCOPES
from server.settings import PREFIX

TIMEOUT_S = 30.0
ADMIN_KEY = f"{PREFIX}ADMIN_KEY"

app = typer.Typer(no_args_is_help=True, help="Make, list, rotate and revoke the keys of a tenant.")

KeyId = Annotated[str, typer.Argument(help="mh_…, as `manyhats keys list` shows it")]
Tenant = Annotated[str, typer.Option(help="whose keys")]
Url = Annotated[str, typer.Option(help="of the server")]
AdminKey = Annotated[
    str, typer.Option(envvar=ADMIN_KEY, prompt="admin key", hide_input=True, help="asked for, if not given")
]
URL = "http://127.0.0.1:8000"


@app.command()
def create(
    admin_key: AdminKey,
    tenant: Tenant = DEFAULT_TENANT,
    scope: Annotated[list[str] | None, typer.Option(help=f"{', '.join(SCOPES)}; may be given several times")] = None,
    note: Annotated[str, typer.Option(help="what it is for")] = "",
    url: Url = URL,
) -> None:
    """Make a key. It is shown once."""
    with _sentences("create"):
        body = {"scopes": scope or [SCOPES[0]], "note": note}
        _show_secret(ask(url, admin_key, "POST", f"/tenants/{tenant}/keys", body))


@app.command("list")
def list_(admin_key: AdminKey, tenant: Tenant = DEFAULT_TENANT, url: Url = URL) -> None:
    """Show a tenant's keys, without their secrets."""
    with _sentences("list"):
        Console().print(table(ask(url, admin_key, "GET", f"/tenants/{tenant}/keys")["keys"]))


@app.command()
def rotate(key_id: KeyId, admin_key: AdminKey, tenant: Tenant = DEFAULT_TENANT, url: Url = URL) -> None:
    """Give a key another secret, shown once; with the old one it is no key any more."""
    with _sentences("rotate"):
        _show_secret(ask(url, admin_key, "POST", f"/tenants/{tenant}/keys/{key_id}/rotate"))


@app.command()
def revoke(key_id: KeyId, admin_key: AdminKey, tenant: Tenant = DEFAULT_TENANT, url: Url = URL) -> None:
    """Make a key none, within a second; what runs with it finishes."""
    with _sentences("revoke"):
        ask(url, admin_key, "DELETE", f"/tenants/{tenant}/keys/{key_id}")
        Console(stderr=True).print(f"{key_id} is revoked", highlight=False)


def ask(url: str, key: str, verb: str, path: str, body: object = None) -> dict[str, Any]:
    """What the server says. Raises `ValueError` with its own sentence where it refuses, or `httpx.HTTPError`."""
    headers = [(b"Authorization", f"Bearer {key}".encode())]
    answer = httpx.request(verb, f"{url.rstrip('/')}{path}", json=body, headers=headers, timeout=TIMEOUT_S)
    try:
        said: dict[str, Any] = answer.json() if answer.content else {}
    except ValueError:
        raise ValueError(f"{url} answered {answer.status_code}, and not as manyhats does") from None
    if not answer.is_success:
        raise ValueError(f"{answer.status_code}: {said['error']['message']}")
    return said


def table(found: list[dict[str, Any]]) -> Table:
    """A line a key."""
    shown = Table("key", "scopes", "note", "made", highlight=False)
    for key in found:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(key["created"]))
        shown.add_row(key["id"], ", ".join(key["scopes"]), escape(key["note"]), made)
    return shown


def _show_secret(made: dict[str, Any]) -> None:
    """The key alone on standard output, for scripts; the rest beside it."""
    said = f"{made['id']} of the tenant {made['tenant']}, for {', '.join(made['scopes'])}. It is not shown again:"
    Console(stderr=True).print(said, highlight=False, soft_wrap=True)
    Console().print(made["key"], highlight=False, soft_wrap=True)


@contextmanager
def _sentences(command: str) -> Iterator[None]:
    """What goes wrong is a sentence, and the exit code is 1."""
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        reason = f"[bold red]manyhats keys {command}:[/] {escape(str(error))}"
        Console(stderr=True).print(reason, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
