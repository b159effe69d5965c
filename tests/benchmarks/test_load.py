"""The load generator against a server that answers from a script."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NamedTuple

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import RawTestServer

from tests.benchmarks import load
from tests.benchmarks.dialects import Dialect, IncompleteAnswerError, Llama, OpenAI
from tests.benchmarks.load import OURS, ask
from tests.benchmarks.results import Timing
from tests.benchmarks.workload import Prompted


def sse(*events: object) -> bytes:
    return b"".join(
        b"data: " + (e.encode() if isinstance(e, str) else json.dumps(e).encode()) + b"\n\n" for e in events
    )


class Request(NamedTuple):
    """What a server saw."""

    query: dict[str, str]
    body: dict[str, Any]


def answer(status: int, body: bytes, dialect: Dialect = OURS) -> tuple[Timing, Request]:
    """Ask a server that answers `body`; the timing, and the request that the server saw."""
    seen: list[Request] = []

    async def serve(request: web.BaseRequest) -> web.Response:
        seen.append(Request(dict(request.query), await request.json()))
        return web.Response(status=status, body=body)

    async def run() -> Timing:
        async with RawTestServer(serve) as server, ClientSession(server.make_url("/")) as client:
            return await ask(client, Prompted(3, [7, 8], 2), "bench-3", 0.0, dialect)

    return asyncio.run(run()), seen[0]


LAST = {"choices": [{"text": "b", "finish_reason": "length"}], "usage": {"completion_tokens": 2}}


def test_a_whole_answer_is_timed() -> None:
    """A complete stream gives the first piece's time and the gaps; the request asks for exactly its tokens."""
    timing, request = answer(200, sse({"text": "a", "token_ids": [5, 6]}, LAST, "[DONE]"))
    assert (timing.num_prompt, timing.num_tokens, len(timing.gaps), timing.sizes) == (2, 2, 1, [2, 0])
    assert timing.first is not None
    assert timing.started <= timing.first <= timing.ended
    assert request.query["task"] == "bench-3"
    assert {"prompt_token_ids": [7, 8], "max_tokens": 2, "ignore_eos": True}.items() <= request.body.items()


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (200, sse({**LAST, "usage": {"completion_tokens": 1}}, "[DONE]"), "1 of 2 tokens"),
        (200, sse(LAST), "2 of 2 tokens"),  # but cut off before its end
        (200, b"", "None of 2 tokens"),
        (
            200,
            sse({**LAST, "usage": {"completion_tokens": 2, "virtual_tokens": 9}}, "[DONE]"),
            "9 virtual tokens .* of 0",
        ),
        (503, b'{"error": {"code": "overloaded"}}', "503: .*overloaded"),
    ],
)
def test_an_answer_that_is_not_whole_is_an_error(status: int, body: bytes, reason: str) -> None:
    """Short, broken, empty and refused answers raise: no figure is made of them."""
    with pytest.raises(IncompleteAnswerError, match=reason):
        answer(status, body)


LLAMA = {"tokens": [5], "stop": False}
LLAMA_END = {"tokens": [], "stop": True, "tokens_predicted": 2}
VLLM = {"choices": [{"text": "a", "token_ids": [5]}], "usage": None}
VLLM_END = {"choices": [], "usage": {"completion_tokens": 2}}


@pytest.mark.parametrize(
    ("dialect", "events"), [(Llama(5), [LLAMA, LLAMA, LLAMA_END]), (OpenAI(), [VLLM, VLLM, VLLM_END, "[DONE]"])]
)
def test_the_end_of_a_peers_answer_is_no_token(dialect: Dialect, events: list[object]) -> None:
    """Only events with tokens are pieces: the last one would be a gap of nothing."""
    timing, _ = answer(200, sse(*events), dialect)
    assert (timing.sizes, len(timing.gaps)) == ([1, 1], 1)


@pytest.mark.parametrize(
    ("dialect", "events"),
    [
        (Llama(5), [LLAMA, {**LLAMA_END, "tokens_predicted": 1}]),
        (Llama(5), [LLAMA, LLAMA]),
        (Llama(5), [LLAMA_END]),
        (OpenAI(), [VLLM, VLLM_END]),
        (OpenAI(), [VLLM, {**VLLM_END, "usage": {"completion_tokens": 1}}, "[DONE]"]),
        (OpenAI(), [VLLM_END, "[DONE]"]),
    ],
)
def test_a_peers_answer_that_is_not_whole_is_an_error(dialect: Dialect, events: list[object]) -> None:
    """Short, cut off, and without tokens: no figure is made of them."""
    with pytest.raises(IncompleteAnswerError):
        answer(200, sse(*events), dialect)


def test_llama_server_is_told_what_not_to_wear() -> None:
    """Every adapter has its scale in the request: one that has none would be applied."""
    _, request = answer(200, sse(LLAMA, LLAMA_END), Llama(5))
    assert request.body["lora"] == [{"id": one, "scale": float(one == 3)} for one in range(5)]


def test_an_open_loop_does_not_wait_for_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request is sent at its time while the others still run, and its times count from then."""
    all_sent, sent = asyncio.Event(), list[int]()

    async def held(_client: Any, request: Prompted, *_: Any) -> Timing:
        sent.append(request.prompt[0])
        all_sent.set() if len(sent) == 3 else None
        await all_sent.wait()
        return Timing(1, 1, 99.0, 100.0, 99.5)

    monkeypatch.setattr(load, "ask", held)
    requests, arrivals = [Prompted(None, [one], 1) for one in range(3)], [0.02, 0.0, 0.01]
    _, timings = load.ask_on_time("http://server", requests, arrivals, str, lambda: None)
    assert sent == [1, 2, 0]
    assert sorted(timing.started for timing in timings) == sorted(arrivals)
