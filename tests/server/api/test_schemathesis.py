"""schemathesis asks every route what it makes of the OpenAPI document, with the admin key and with a tenant's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import Status, events, from_schema

from adapters_store.registry import SCOPES
from tests.server.world import Site, serve_site

pytestmark = pytest.mark.anyio
ADMIN_KEY = "k" * 16
# Of each parameter and field the values at its bounds: a thousand requests for the fields of generations alone, which
# test_bodies has; fuzzing asks those routes, too.
COVERAGE = {
    "phases": {"coverage": {"enabled": True, "unexpected-methods": ["options"]}},
    "operations": [
        {"include-path-regex": "^/(|generate.*|v1/.*completions|v1/responses|.*/limits)$", "enabled": False}
    ],
}
FUZZING = {"phases": {"fuzzing": {"enabled": True}}, "operations": []}
SETTINGS: dict[str, Any] = {
    "seed": 1,
    "generation": {"max-examples": 3, "no-shrink": True, "database": "none", "deterministic": True},
    "continue-on-failure": True,
    "warnings": False,
    # JSON Schema cannot say that 1.0 is no integer, that a prompt and its answer must fit the context together, or
    # that `task` and `adapters` exclude each other.
    "checks": {"positive_data_acceptance": {"enabled": False}},
}


def violations(document: dict[str, Any], url: str, key: str, settings: dict[str, Any]) -> tuple[int, list[str]]:
    """The number of requests that schemathesis sends with a key, and all that it objects to."""
    phases = {name: {"enabled": False} for name in ("examples", "coverage", "fuzzing", "stateful")}
    sent = {"base-url": url, "headers": {"Authorization": f"Bearer {key}"}}
    config = SchemathesisConfig.from_dict({**SETTINGS, **settings, **sent, "phases": phases | settings["phases"]})
    schema = schemathesis.openapi.from_dict(document, config=config)
    num_sent, found = 0, list[str]()
    for event in from_schema(schema).execute():
        if isinstance(event, events.NonFatalError | events.FatalError):
            found.append(str(event))
        if isinstance(event, events.ScenarioFinished):
            num_sent += len(event.recorder.interactions)
            found += _objections(event)
    return num_sent, found


def _objections(event: events.ScenarioFinished) -> Iterator[str]:
    for case_id, checks in event.recorder.checks.items():
        request = event.recorder.interactions[case_id].request
        for check in checks:
            if check.status is Status.FAILURE:
                said = check.failure_info and check.failure_info.failure
                yield f"{request.method} {request.uri} {request.body!r}: {check.name}: {said}"


@pytest.mark.parametrize(
    ("is_admin", "settings", "least"), [(True, COVERAGE, 500), (True, FUZZING, 80), (False, FUZZING, 80)]
)
async def test_no_violations(
    tiny_base: Path, tmp_path: Path, zips: list[bytes], is_admin: bool, settings: dict[str, Any], least: int
) -> None:
    """Whatever is made of the document, and whatever breaks it, is answered with a status, a type, headers and a body
    that it says, and nothing of it is a fault of the server."""
    async with serve_site(tiny_base, tmp_path / "data", admin_key=ADMIN_KEY) as site:
        key = ADMIN_KEY if is_admin else await _tenant_key(site)
        site.http.headers["Authorization"] = f"Bearer {key}"
        assert (await site.upload("one", zips[0])).status_code == 201
        document = (await site.http.get("/openapi.json")).json()
        num_sent, found = await asyncio.to_thread(violations, document, str(site.http.base_url), key, settings)
    assert num_sent > least and not found, "\n".join([str(num_sent), *found[:5]])


async def _tenant_key(site: Site) -> str:
    """A key of a tenant of its own, with all scopes."""
    admin = {"Authorization": f"Bearer {ADMIN_KEY}"}
    await site.http.post("/tenants", json={"name": "acme"}, headers=admin)
    answer = await site.http.post("/tenants/acme/keys", json={"scopes": list(SCOPES)}, headers=admin)
    key: str = answer.json()["key"]
    return key
