"""`manyhats keys`: a tenant's keys on a running server, over HTTP, with the admin key or a tenant's of scope admin."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from adapters_store.escapes import printable
from adapters_store.registry import DEFAULT_TENANT, SCOPES
from server.api.tenant_answers import KeysAnswer, NewKeyAnswer
from server.cli.errors import say, sentences
from server.cli.http_client import KEY_VARIABLE, URL, Json, Server, Url, show_json
from server.cli.tasks import add_row

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Make, list, rotate and revoke the keys of a tenant."
)

KeyId = Annotated[str, typer.Argument(help="mh_…, as `manyhats keys list` shows it")]
TenantOption = Annotated[str, typer.Option(help="whose keys")]
AskedKey = Annotated[
    str,
    typer.Option(
        envvar=KEY_VARIABLE,
        prompt="API key",
        hide_input=True,
        help="the admin key, or a tenant's of scope admin; asked for, if not given",
    ),
]


@app.command()
def create(
    api_key: AskedKey,
    tenant: TenantOption = DEFAULT_TENANT,
    scope: Annotated[list[str] | None, typer.Option(help=f"{', '.join(SCOPES)}; may be given several times")] = None,
    note: Annotated[str, typer.Option(help="what it is for")] = "",
    url: Url = URL,
    json_: Json = False,
) -> None:
    """Make a key. It is shown once."""
    with sentences("keys create"):
        body = {"scopes": scope or [SCOPES[0]], "note": note}
        server = Server(url, api_key)
        _show_secret(server.ask(NewKeyAnswer, "POST", "tenants", tenant, "keys", body=body), json_)


@app.command("list")
def list_(api_key: AskedKey, tenant: TenantOption = DEFAULT_TENANT, url: Url = URL, json_: Json = False) -> None:
    """Show a tenant's keys, without their secrets."""
    with sentences("keys list"):
        found = Server(url, api_key).ask(KeysAnswer, "GET", "tenants", tenant, "keys")
        if json_:
            show_json(found)
        else:
            Console().print(table(found["keys"]))


@app.command()
def rotate(
    key_id: KeyId,
    api_key: AskedKey,
    tenant: TenantOption = DEFAULT_TENANT,
    url: Url = URL,
    json_: Json = False,
) -> None:
    """Give a key another secret, shown once; with the old one it is no key any more."""
    with sentences("keys rotate"):
        server = Server(url, api_key)
        _show_secret(server.ask(NewKeyAnswer, "POST", "tenants", tenant, "keys", key_id, "rotate"), json_)


@app.command()
def revoke(
    key_id: KeyId,
    api_key: AskedKey,
    tenant: TenantOption = DEFAULT_TENANT,
    url: Url = URL,
    json_: Json = False,
) -> None:
    """Make a key none, within a second; what runs with it finishes."""
    with sentences("keys revoke"):
        Server(url, api_key).ask(None, "DELETE", "tenants", tenant, "keys", key_id)
        if json_:
            show_json({"id": key_id, "tenant": tenant, "revoked": True})
        else:
            say(f"{key_id} is revoked")


def table(found: list[dict[str, Any]]) -> Table:
    """A line a key."""
    shown = Table("key", "scopes", "note", "made", highlight=False)
    for key in found:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(key["created"]))
        add_row(shown, key["id"], ", ".join(key["scopes"]), key["note"], made)
    return shown


def _show_secret(made: dict[str, Any], is_json: bool) -> None:
    """The key alone on standard output, for scripts, or all of it as JSON; the rest beside it."""
    if is_json:
        show_json(made)
        return
    say(f"{made['id']} of the tenant {made['tenant']}, for {', '.join(made['scopes'])}. It is not shown again:")
    Console().print(printable(made["key"]), markup=False, highlight=False, soft_wrap=True)
