"""Streams: the same text as the plain answer, errors in their place, and an end if client or engine leaves first."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from server.api.sse import EventStream, EventStyle
from server.core import EngineFailure
from server.engine.fake import FakeEngineClient
from server.engine.messages import Output, Submit
from tests.server.world import ZIP, Site, error_of, ready_of, sent, serve_site, until

pytestmark = pytest.mark.anyio
WORDS = [
    "hat",
    "🎩",
    "👩‍🚀",
    "é",
    "e\u0301",
    "नमस्ते",
    "\u2028",
    "\u0085",
    "日本",
    "\t",
    "'\"",
    "\\",
    "data: x",
    "a\nb",
    "🇩🇪",
    "\ufffd",
]


def prompts(count: int) -> list[tuple[str, list[str]]]:
    """(prompt, stop texts); half of the stop texts are cut out of the prompt, so that they cross its tokens."""
    draw, found = random.Random(7), []
    for _ in range(count):
        text = " ".join(draw.choices(WORDS, k=draw.randint(1, 9)))
        begins = [draw.randrange(len(text)) for _ in range(draw.randint(0, 2))]
        stop = [text[at : at + draw.randint(1, 4)] for at in begins] + draw.choices(["never", "hats", "🎩é"], k=1)
        found.append((text, [one for one in stop if one]))
    return found


async def test_stream_equals_plain(shared: Site) -> None:
    """Over 200 prompts with emoji, combining characters and stop texts across tokens: stream and plain are byte-equal.

    So are the token ids and log-probabilities, the end's reason and the usage.
    """
    num_stopped = 0
    for prompt, stop in prompts(200):
        body: dict[str, Any] = {"prompt": prompt, "stop": stop, "logprobs": 1}
        plain, events = await shared.ask(**body), await shared.events(**body)
        (choice,) = plain["choices"]
        assert "".join(event["text"] for event in events).encode() == choice["text"].encode()
        assert [token for event in events for token in event["token_ids"]] == choice["token_ids"]
        assert [entry for event in events for entry in event["logprobs"]] == choice["logprobs"]
        assert events[-1]["finish_reason"] == choice["finish_reason"]
        assert events[-1]["usage"] == plain["usage"]
        assert all(one not in choice["text"] for one in stop)
        num_stopped += choice["text"] != prompt
    assert 50 < num_stopped < 180


async def test_each_event(shared: Site) -> None:
    """Each step with text is one event with the head and its index; only the last has usage and timing."""
    events = await shared.events(prompt="a🎩")
    assert [event["text"] for event in events] == ["a", "🎩", ""]
    for event in events[:-1]:
        assert set(event) == {"id", "task", "adapter", "index", "text", "token_ids", "finish_reason"}
        assert event["finish_reason"] is None
    assert set(events[-1]) == {*events[0], "usage", "timing"}
    assert events[1]["token_ids"] == [*"🎩".encode()]


async def test_choices_in_one_stream(shared: Site) -> None:
    """Several choices share a stream; each is whole, and the very last event alone has the usage."""
    events = await shared.events(prompt=["ab", "cde", "f"], n=2)
    texts = ["".join(event["text"] for event in events if event["index"] == index) for index in range(6)]
    assert texts == ["ab", "ab", "cde", "cde", "f", "f"]
    assert sum(event["finish_reason"] is not None for event in events) == 6
    assert [at for at, event in enumerate(events) if "usage" in event] == [len(events) - 1]
    assert events[-1]["usage"]["completion_tokens"] == 2 * (3 + 4 + 2)


async def test_a_slow_reader_misses_nothing(shared: Site) -> None:
    """Tokens that come faster than they are read are all delivered, however many choices end meanwhile."""
    got, body = [], json.dumps({"prompt": ["abcdef", "x"], "stream": True}).encode()
    requests: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        return requests.pop() if requests else await asyncio.Future()

    async def send(message: Any) -> None:
        await asyncio.sleep(0.01)
        got.append(message.get("body", b""))

    scope = {"type": "http", "method": "POST", "path": "/generate", "query_string": b"task=base", "headers": []}
    await shared.app(scope, receive, send)
    *events, done = sent(b"".join(got).decode())
    assert done[1] == "[DONE]"
    texts = ["".join(json.loads(d)["text"] for _, d in events if json.loads(d)["index"] == at) for at in (0, 1)]
    assert texts == ["abcdef", "x"]


async def test_lines_of_clients_that_split_text(shared: Site) -> None:
    """Clients that split lines at U+0085 or U+2028 read every event whole."""
    prompt = "a\u0085b\u2028c\u2029d\x1ce"
    answer = await shared.post("/generate?task=base", {"prompt": prompt, "stream": True})
    lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: {")]
    assert "".join(json.loads(line)["text"] for line in lines) == prompt
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"


FAILURES = [
    ("deadline_exceeded", 504),
    ("overloaded", 503),
    ("engine_restarting", 503),
    ("adapter_failed", 503),
    ("adapter_too_large", 422),
    ("nonfinite_logits", 500),
    ("internal", 500),
    ("something_new", 500),
]


@pytest.mark.parametrize(("code", "status"), FAILURES)
@pytest.mark.parametrize("stream", [False, True])
async def test_failure_before_the_first_token(site: Site, code: str, status: int, stream: bool) -> None:
    """A sequence that fails before its first token is an ordinary error answer; 503 says when to come again."""
    site.engine.failure = EngineFailure(code, "the reason")
    answer = await site.post("/generate?task=base", {"prompt": "a", "stream": stream})
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["message"]) == (status, code, "the reason")
    assert ("retry-after" in answer.headers) == (status == 503)


async def test_failure_after_the_first_token(
    site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first byte an error is an event `error` with the error object, and the stream ends without [DONE].

    The request's line in the log has the error's code.
    """
    caplog.set_level(logging.INFO)
    outputs = site.engine._outputs

    def broken(submit: Submit) -> list[Output]:
        made = outputs(submit)
        made[2].failure = EngineFailure("engine_restarting", "the engine died")
        return made

    monkeypatch.setattr(site.engine, "_outputs", broken)
    answer = await site.post("/generate?task=base", {"prompt": "abcdef", "stream": True})
    assert answer.status_code == 200
    *events, (kind, data) = sent(answer.text)
    assert [json.loads(data)["text"] for _, data in events] == ["a", "b"]
    assert kind == "error"
    error = json.loads(data)["error"]
    assert (error["code"], error["type"]) == ("engine_restarting", "server_error")
    assert error["request_id"] == answer.headers["x-request-id"]
    (line,) = (record for record in caplog.records if record.name == "server.api.middleware")
    assert (vars(line)["status"], vars(line)["error"]) == (200, "engine_restarting")


async def test_our_bug_after_the_first_token(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unexpected exception in a stream is an event `error` that tells nothing of our insides."""
    decode = site.state.tokenizer.decode
    calls = iter(range(1000))

    def broken(token_ids: list[int], skip_special: bool = True) -> str:
        if next(calls) > 4:
            raise KeyError("secret")
        return decode(token_ids, skip_special)

    monkeypatch.setattr(site.state.tokenizer, "decode", broken)
    answer = await site.post("/generate?task=base", {"prompt": "abcdef", "stream": True})
    kind, data = sent(answer.text)[-1]
    assert kind == "error" and json.loads(data)["error"]["code"] == "internal"
    assert "secret" not in answer.text


async def test_one_failing_choice_ends_the_request(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request of several choices fails if one of them fails, and the others are aborted."""
    site.engine.delay_s = 0.005
    outputs = site.engine._outputs

    def broken(submit: Submit) -> list[Output]:
        made = outputs(submit)
        if submit.prompt == [*b"bad"]:
            made[1].failure = EngineFailure("nonfinite_logits", "the logits are not finite")
        return made

    monkeypatch.setattr(site.engine, "_outputs", broken)
    answer = await site.post("/generate?task=base", {"prompt": ["bad", "good" * 20, "good" * 20]})
    assert (answer.status_code, error_of(answer)["code"]) == (500, "nonfinite_logits")
    assert len(site.engine.aborted) == 2


async def test_a_stuck_engine_is_a_deadline(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server ends a late request if even the engine does not: 504, and the sequence is aborted."""
    monkeypatch.setattr("server.requests.generation.GRACE_S", 0.05)
    site.engine.delay_s = 60
    answer = await site.post("/generate?task=base", {"prompt": "a", "timeout_s": 0.05})
    assert (answer.status_code, error_of(answer)["code"]) == (504, "deadline_exceeded")
    assert len(site.engine.aborted) == 1


async def test_engine_death_and_revival(site: Site) -> None:
    """Running requests fail with engine_restarting when the engine dies; new ones and `ready` are 503 meanwhile.

    With a new engine all is well again, and nothing that was stored is lost.
    """
    site.engine.delay_s = 0.02
    running = asyncio.create_task(site.post("/generate?task=base", {"prompt": "a" * 50}))
    await until(lambda: site.engine.submitted)
    site.engine.die()
    answer = await running
    assert (answer.status_code, error_of(answer)["code"]) == (503, "engine_restarting")
    assert answer.headers["retry-after"]
    for path in ("/generate?task=base", "/v1/completions"):
        answer = await site.post(path, {"prompt": "a"} | ({"model": "base"} if "v1" in path else {}))
        assert (answer.status_code, error_of(answer)["code"]) == (503, "engine_unavailable")
        assert answer.headers["retry-after"]
    ready = await site.http.get("/health/ready")
    assert ready.status_code == 503 and ready.json()["status"] == "not ready"
    assert (await site.http.get("/health/live")).status_code == 200
    assert (await site.http.get("/tasks")).status_code == 200
    site.engine.revive()
    assert (await site.http.get("/health/ready")).status_code == 200
    assert (await site.ask(prompt="a"))["choices"][0]["text"] == "a"


async def test_engine_that_goes_between(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is gone when the sequence is submitted is 503, not a hang."""

    def die_first(*_args: object) -> None:
        site.engine.die()

    monkeypatch.setattr("server.requests.prepare.check_length", die_first)
    ready = ready_of(Path(site.state.settings.base))
    monkeypatch.setattr("server.requests.prepare.require_ready", lambda _client: ready)
    answer = await site.post("/generate?task=base", {"prompt": "a"})
    assert (answer.status_code, error_of(answer)["code"]) == (503, "engine_unavailable")


async def test_events_are_closed_though_never_sent() -> None:
    """The events are closed even if the client has left before the first byte."""
    closed = asyncio.Event()

    async def events() -> AsyncGenerator[dict[str, int]]:
        try:
            yield {"number": 1}
            yield {"number": 2}
        finally:
            closed.set()

    async def stuck(_message: Any) -> None:
        await asyncio.Future()

    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    stream = await EventStream.begin(events(), "id", EventStyle())
    await stream({"type": "http"}, gone, stuck)
    assert closed.is_set()


HEADS = [
    b"POST /generate?task=base HTTP/1.1\r\nHost: [::1]\r\nContent-Length: 1000\r\n\r\n",
    b"POST /adapters?task=a HTTP/1.1\r\nContent-Type: application/zip\r\nHost: [::1]\r\nContent-Length: 1000\r\n\r\n",
]
Leave = Callable[[Site, dict[str, Any]], Awaitable[None]]


async def leave_plain(site: Site, body: dict[str, Any]) -> None:
    """Ask and hang up once the engine works."""
    asking = asyncio.create_task(site.http.post("/generate?task=base", json=body))
    await until(lambda: site.engine.stats.num_running)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


async def leave_stream(site: Site, body: dict[str, Any]) -> None:
    """Read one event and hang up."""
    async with site.http.stream("POST", "/generate?task=base", json={**body, "stream": True}) as answer:
        async for line in answer.aiter_lines():
            assert line.startswith("data: ")
            break


async def leave_stream_early(site: Site, body: dict[str, Any]) -> None:
    """Hang up before the first event."""
    await leave_plain(site, {**body, "stream": True})


async def test_whoever_leaves_frees_the_engine(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that hangs up ends all its sequences, plain or stream, before the first token or after it.

    That is no error of ours: the log has none.
    """
    engine = FakeEngineClient(ready_of(tiny_base))
    async with serve_site(tiny_base, tmp_path, engine) as site:
        ways: list[tuple[Leave, float]] = [(leave_plain, 0.05), (leave_stream, 0.05), (leave_stream_early, 2.0)]
        for leave, engine.delay_s in ways:
            engine.aborted.clear()
            await leave(site, {"prompt": ["a" * 200, "b" * 200], "n": 2})
            await until(lambda: len(engine.aborted) == 4)
            assert engine.stats.num_running == 0
            assert site.state.retention.is_idle
        engine.delay_s = 0
        assert (await site.ask(prompt="a"))["choices"][0]["text"] == "a"
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_whoever_leaves_in_the_middle_of_a_body(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that hangs up while it sends leaves nothing behind, and is no error of ours."""
    async with serve_site(tiny_base, tmp_path, body_timeout_s=5) as site:
        for head in HEADS:
            _, writer = await asyncio.open_connection("127.0.0.1", site.http.base_url.port)
            writer.write(head + b"PK\x03\x04")
            await writer.drain()
            await asyncio.sleep(0.05)
            writer.close()
        await until(lambda: not site.staged())
        assert site.stored() == set()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_body_that_stops_coming(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """A body that stops coming is 400 after the time that it has, for requests and uploads, and leaves nothing."""

    async with serve_site(tiny_base, tmp_path, body_timeout_s=0.1) as site:
        for head in HEADS:
            reader, writer = await asyncio.open_connection("127.0.0.1", site.http.base_url.port)
            writer.write(head + b"PK\x03\x04")
            answer = await asyncio.wait_for(reader.readuntil(b"}}"), 5)
            writer.close()
            assert answer.startswith(b"HTTP/1.1 400") and b"0.1 s" in answer
        assert site.stored() == set()


async def test_a_body_over_its_cap_is_answered(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """A client that still sends reads 413, not a broken connection."""
    caps: dict[str, Any] = {"max_body_bytes": 1000, "max_upload_bytes": 1000}
    async with serve_site(tiny_base, tmp_path, **caps) as site:
        for path in ("/generate?task=base", "/adapters?task=a"):
            answer = await site.http.post(path, content=b" " * 2**24, headers={"Content-Type": ZIP})
            assert answer.status_code == 413
        assert site.stored() == set()


async def test_keep_alive_after_a_stream(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """Many requests, streams and plain, one after another on one connection, are each answered."""
    async with serve_site(tiny_base, tmp_path) as site:
        limits = httpx2.Limits(max_connections=1)
        async with httpx2.AsyncClient(base_url=site.http.base_url, limits=limits, timeout=10) as http:
            for number in range(10):
                body = {"prompt": "a🎩", "stream": number % 2 == 0}
                assert (await http.post("/generate?task=base", json=body)).status_code == 200
