"""What the routes of other servers' dialects call a model says who answers: a task, one version of it, or several."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.server.world import Site, error_of, serve_site

pytestmark = pytest.mark.anyio
ROUTES: dict[str, dict[str, Any]] = {
    "completions": {"prompt": "a", "max_tokens": 2},
    "chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
}


@pytest.fixture(scope="module")
async def server(
    anyio_backend: str, tiny_base: Path, zips: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Site]:
    """A server with two versions of the task `hat`, of which it routes to the first, and the task `other`."""
    async with serve_site(tiny_base, tmp_path_factory.mktemp("models")) as site:
        for task, body, activate in (("hat", zips[0], True), ("hat", zips[1], False), ("other", zips[1], True)):
            assert (await site.upload(task, body, activate=str(activate).lower())).status_code == 201
        yield site


async def digests(server: Site, task: str) -> dict[int, str]:
    """The digest of each version of a task."""
    return {one["version"]: one["digest"] for one in (await server.http.get(f"/tasks/{task}")).json()["versions"]}


async def worn(server: Site, route: str, **fields: object) -> list[tuple[str, float]]:
    """The adapters that the engine is asked for by a request that is answered."""
    answer = await server.post(f"/v1/{route}", {**ROUTES[route], **fields})
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == fields["model"]
    return [(one.digest, one.weight) for one in server.engine.submitted[-1].adapters]


@pytest.mark.parametrize("route", ROUTES)
async def test_a_model_is_a_version(server: Site, route: str) -> None:
    """A task's name is what the task routes to; with @N, or `version`, it is that version."""
    found = await digests(server, "hat")
    assert await worn(server, route, model="hat") == [(found[1], 1.0)]
    assert await worn(server, route, model="hat@1") == [(found[1], 1.0)]
    assert await worn(server, route, model="hat@2") == [(found[2], 1.0)]
    assert await worn(server, route, model="hat", version=2) == [(found[2], 1.0)]


@pytest.mark.parametrize("route", ROUTES)
async def test_several_adapters(server: Site, route: str) -> None:
    """The base with `adapters` is the base with all of them, each with its weight."""
    hat, other = await digests(server, "hat"), await digests(server, "other")
    asked = [{"task": "hat", "weight": 0.5}, {"task": "other"}]
    assert await worn(server, route, model="base", adapters=asked) == [(hat[1], 0.5), (other[1], 1.0)]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "hat@1", "version": 1}, "version"),
        ({"model": "base", "version": 1}, "version"),
        ({"model": "base@1"}, "version"),
        ({"model": "hat", "adapters": [{"task": "other"}]}, "adapters"),
        ({"model": "base", "version": 1, "adapters": [{"task": "other"}]}, "adapters"),
        ({"model": "base", "adapters": [{"task": "other", "wait": 1}]}, "adapters.0.wait"),
        ({"model": "base", "adapters": []}, "adapters"),
        ({"model": "hat", "version": 0}, "version"),
    ],
)
async def test_who_answers_is_said_once(server: Site, route: str, fields: dict[str, Any], param: str) -> None:
    """A body that says who answers in two ways, or in none that is valid, is refused by the field."""
    answer = await server.post(f"/v1/{route}", {**ROUTES[route], **fields})
    assert (answer.status_code, error_of(answer)["param"]) == (400, param), answer.text


async def test_the_client_sends_them(client: AsyncOpenAI, server: Site) -> None:
    """OpenAI's client asks for versions by the model, and for all else by `extra_body`; each version is a model."""
    found = await digests(server, "hat")
    extra = {"adapters": [{"task": "hat"}], "timeout_s": 7}
    await client.completions.create(model="base", prompt="a", max_tokens=2, extra_body=extra)
    submit = server.engine.submitted[-1]
    assert ([one.digest for one in submit.adapters], submit.deadline - submit.arrived) == ([found[1]], 7)
    assert (await client.models.retrieve("hat@2")).id == "hat@2"
    for absent in ("hat@3", "none@1", "base@1"):
        with pytest.raises(openai.NotFoundError) as refused:
            await client.models.retrieve(absent)
        assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
