"""Around every route: one form of errors, one line in the log, and no words of the user's in it."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os

import pytest

from server.logs import formatter
from tests.server.world import Site, error_of

pytestmark = pytest.mark.anyio


async def document(site: Site) -> dict[str, dict[str, object]]:
    paths: dict[str, dict[str, object]] = (await site.http.get("/openapi.json")).json()["paths"]
    return paths


async def test_nothing_there(shared: Site) -> None:
    """A path that is no route is 404 in the error form."""
    for path in ("/none", "/tasks//", "/v1", "/v1/", "/%00", "/redoc", "/" + "x" * 3000):
        for verb in ("GET", "POST", "DELETE"):
            answer = await shared.http.request(verb, path)
            error = error_of(answer)
            assert (answer.status_code, error["code"]) == (404, "not_found")
            assert len(error["message"]) < 300


async def test_wrong_verb(shared: Site) -> None:
    """Another verb on a route is 405 in the error form, with all verbs that the path has, in whatever routes."""
    verbs = {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
    for path, has in (await document(shared)).items():
        for verb in verbs - {name.upper() for name in has}:
            answer = await shared.http.request(verb, path.replace("{number}", "1"))
            if answer.status_code == 404:  # the longer path has another route with this verb
                continue
            assert (answer.status_code, error_of(answer)["code"]) == (405, "method_not_allowed"), (verb, path)
            assert {name.upper() for name in has} == {*answer.headers["allow"].split(", ")} - {"HEAD"}, path


async def test_our_bug(site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """An unexpected exception on any route is 500 in the error form, with the id; the log has the reason, once."""

    def broken(*_args: object) -> None:
        raise KeyError("secret")

    for name in ("tasks", "task_names", "task", "resolve", "usage", "delete_task", "delete_version"):
        monkeypatch.setattr(site.state.stores.registry, name, broken)
    asked = [("GET", "/tasks"), ("GET", "/tasks/a"), ("DELETE", "/tasks/a"), ("DELETE", "/tasks/a/versions/1")]
    asked += [("GET", "/v1/models"), ("GET", "/tasks/a/versions/1/artifact"), ("POST", "/generate?task=a")]
    for verb, path in asked:
        caplog.clear()
        answer = await site.http.request(verb, path, content=b'{"prompt": "a"}')
        error = error_of(answer)
        assert (answer.status_code, error["code"], error["type"]) == (500, "internal", "server_error"), path
        assert "secret" not in answer.text
        reasons = [record for record in caplog.records if record.exc_info]
        assert len(reasons) == 1 and vars(reasons[0])["request_id"] == error["request_id"]


async def test_a_disk_that_fails(
    site: Site, zips: list[bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that is full or fails is 507 on every route, and what was to be deleted is still there.

    Another fault of the system is our bug: 500.
    """
    await site.upload("a", zips[0])
    asked = [("DELETE", "/tasks/a"), ("DELETE", "/tasks/a/versions/1"), ("GET", "/tasks/a/versions/1/artifact")]
    for code, status in ((errno.ENOSPC, 507), (errno.EIO, 507), (errno.EMFILE, 500)):

        def broken(*_args: object, code: int = code) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            for thing, name in (
                (site.state.stores.registry, "delete_task"),
                (site.state.stores.registry, "delete_version"),
            ):
                patch.setattr(thing, name, broken)
            patch.setattr(site.state.stores.blobs, "outline", broken)
            for verb, path in asked:
                answer = await site.http.request(verb, path)
                assert answer.status_code == status, path
                assert error_of(answer)["code"] == ("storage_failed" if status == 507 else "internal")
                assert (os.strerror(code) in answer.text) == (status == 507)
    assert (await site.ask("a", prompt="x"))["adapter"]["version"] == 1


async def test_health(site: Site) -> None:
    """Live is 200; ready is 200 with what is served."""
    assert (await site.http.get("/health/live")).json() == {"status": "live"}
    ready = (await site.http.get("/health/ready")).json()
    assert ready == {"status": "ready", "base": "tiny", "precision": "fp32", "load_seconds": 0.0, "imports_pending": 0}


async def test_the_log_line(site: Site, zips: list[bytes], caplog: pytest.LogCaptureFixture) -> None:
    """Each request is one line with its id, task, status, seconds and tokens, stream or plain."""
    await site.upload("hat", zips[0])
    caplog.set_level(logging.INFO)
    for stream in (False, True):
        caplog.clear()
        headers = {"X-Request-Id": "my-id"}
        body = {"prompt": "four", "max_tokens": 3, "stream": stream}
        await site.http.post("/generate?task=hat", json=body, headers=headers)
        (record,) = (record for record in caplog.records if record.name == "server.api.middleware")
        line = json.loads(formatter().format(record))
        assert line["message"] == "request"
        said = {
            "request_id": "my-id",
            "method": "POST",
            "path": "/generate",
            "status": 200,
            "task": "hat",
            "error": None,
        }
        assert {name: line[name] for name in said} == said
        counts = {name: line[name] for name in ("prompt_tokens", "completion_tokens", "cached_tokens")}
        assert counts == {"prompt_tokens": 4, "completion_tokens": 3, "cached_tokens": 0}
        assert 0 <= line["seconds"] < 5


async def test_the_log_has_no_words(site: Site, zips: list[bytes], caplog: pytest.LogCaptureFixture) -> None:
    """The log has no prompt, answer, stop text or key, whether a request succeeds, is refused or fails."""
    caplog.set_level(logging.DEBUG)
    await site.upload("hat", zips[0])
    words = "XYZZY"
    bodies: list[object] = [
        {"prompt": words},
        {"prompt": words, "stream": True},
        {"messages": [{"role": "user", "content": words}], "stop": [words]},
        {"prompt": words, "unknown": words},
        {"prompt": [words, 5]},
        {"prompt": words * 200},
        '{"prompt": "' + words,
    ]
    for task in ("base", "hat", "none"):
        for body in bodies:
            await site.post(f"/generate?task={task}", body)
    for path in ("/v1/completions", "/v1/chat/completions"):
        await site.post(path, {"model": "base", "prompt": words, "messages": [{"role": "user", "content": words}]})
    site.engine.die()
    await site.post("/generate?task=base", {"prompt": words})
    await site.http.get("/tasks", headers={"Authorization": f"Bearer {words}"})
    lines = [formatter().format(record) for record in caplog.records]
    assert len(lines) > 20
    assert not [line for line in lines if words in line or words.encode().hex() in line]


async def test_an_error_is_in_the_line(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """A refused request's line has the error's code."""
    caplog.set_level(logging.INFO)
    await site.post("/generate?task=none", {"prompt": "a"})
    (record,) = (record for record in caplog.records if record.name == "server.api.middleware")
    assert (vars(record)["status"], vars(record)["error"]) == (404, "not_found")


async def test_probes_are_not_logged(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """Health and metrics, which are asked for every second, are not logged."""
    caplog.set_level(logging.INFO)
    for path in ("/health/live", "/health/ready", "/metrics"):
        assert (await site.http.get(path)).status_code == 200
    assert not [record for record in caplog.records if record.name == "server.api.middleware"]


async def test_many_at_once(site: Site) -> None:
    """Many requests at once are each answered, with the text of their own prompt."""
    site.engine.delay_s = 0.001
    answers = await asyncio.gather(*(site.ask(prompt=f"prompt {number}") for number in range(100)))
    assert [answer["choices"][0]["text"] for answer in answers] == [f"prompt {number}" for number in range(100)]
