"""A sequence that fails in the engine ends with an error of our form, whatever route asked; others do not notice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from server.engine.engine import INTERNAL
from server.engine.fake import FakeEngineClient
from server.engine.messages import Output, Submit
from tests.server.world import Site, error_of, sent, until

pytestmark = pytest.mark.anyio

MARK = "~"  # what the failing prompts hold, and no other
ROUTES = ("/generate?task=base", "/v1/completions", "/v1/chat/completions")


def body_of(route: str, text: str, **fields: Any) -> dict[str, Any]:
    body = {"max_tokens": 5, **fields}
    if route == "/v1/chat/completions":
        return {"model": "base", "messages": [{"role": "user", "content": text}], **body}
    return {"prompt": text, **({} if route.startswith("/generate") else {"model": "base"}), **body}


@pytest.fixture(params=[0, 2], ids=["at once", "after two tokens"])
def poisoned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine fails what holds the mark, after so many tokens."""
    real, num_right = FakeEngineClient._outputs, request.param

    def outputs(engine: FakeEngineClient, submit: Submit) -> list[Output]:
        right = real(engine, submit)
        if ord(MARK) not in submit.prompt:
            return right
        return [*right[:num_right], Output(submit.sequence_id, failure=INTERNAL)]

    monkeypatch.setattr(FakeEngineClient, "_outputs", outputs)


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    for route in ROUTES:
        for fields in ({}, {"stream": True}, {"n": 3, "seed": 1, "temperature": 1}, {"n": 3, "stream": True}):
            yield route, fields


def told(text: str) -> tuple[str, dict[str, Any]]:
    """The last event of a stream."""
    kind, data = sent(text)[-1]
    return kind, json.loads(data)["error"]


@pytest.mark.parametrize("poisoned", [0], indirect=True)
async def test_scores(site: Site, poisoned: None) -> None:
    """A continuation that fails ends its own request with `internal`; another's scores are as alone."""
    bodies = [{"prompt": "abc", "continuations": ["defg", f"d{mark}fg"]} for mark in ("e", MARK)]
    right = (await site.post("/score?task=base", bodies[0])).json()
    whole, bad = await asyncio.gather(*(site.post("/score?task=base", body) for body in bodies))
    assert (bad.status_code, error_of(bad)["code"]) == (500, "internal")
    assert whole.json()["scores"] == right["scores"]
    await until(lambda: not site.engine.stats.num_running)


async def test_every_route(site: Site, poisoned: None) -> None:
    """Plain, as a stream, one or several answers: 500 `internal`, or the event `error` once a stream has begun."""
    asked = list(cases())
    right = [(await site.post(route, body_of(route, "abcdefg", seed=7))).json() for route in ROUTES]
    beside = [site.post(route, body_of(route, "abcdefg", seed=7)) for route in ROUTES]
    bad = [site.post(route, body_of(route, f"abc{MARK}", **fields)) for route, fields in asked]
    *answers, one, two, three = await asyncio.gather(*bad, *beside)
    for (route, fields), answer in zip(asked, answers, strict=True):
        if answer.status_code == 200:
            kind, error = told(answer.text)
            assert kind == "error" and fields.get("stream"), (route, fields, answer.text)
        else:
            assert answer.status_code == 500, (route, fields, answer.text)
            error = error_of(answer)
        assert error["code"] == "internal" and error["message"], (route, fields, answer.text)
    for before, after in zip(right, (one, two, three), strict=True):
        assert after.json()["choices"] == before["choices"]
    await until(lambda: not site.engine.stats.num_running)
    assert (await site.ask(prompt="abc"))["choices"][0]["text"] == "abc"
