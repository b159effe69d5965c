"""The load generator against a server that answers from a script."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from tests.benchmarks.dialects import IncompleteAnswerError
from tests.benchmarks.load import ask
from tests.benchmarks.results import Timing
from tests.benchmarks.workload import Prompted


def sse(*events: object) -> bytes:
    return b"".join(
        b"data: " + (e.encode() if isinstance(e, str) else json.dumps(e).encode()) + b"\n\n" for e in events
    )


def answer(status: int, body: bytes) -> tuple[Timing, httpx.Request]:
    """Ask a server that answers `body`; the timing, and the request that the server saw."""
    seen: list[httpx.Request] = []

    def serve(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(status, content=body)

    async def run() -> Timing:
        async with httpx.AsyncClient(base_url="http://server", transport=httpx.MockTransport(serve)) as client:
            return await ask(client, Prompted(3, [7, 8], 2), "bench-3", 0.0)

    return asyncio.run(run()), seen[0]


LAST = {"choices": [{"text": "b", "finish_reason": "length"}], "usage": {"completion_tokens": 2}}


def test_a_whole_answer_is_timed() -> None:
    """A complete stream gives the first piece's time and the gaps; the request asks for exactly its tokens."""
    timing, request = answer(200, sse({"text": "a", "token_ids": [5, 6]}, LAST, "[DONE]"))
    assert (timing.num_prompt, timing.num_tokens, len(timing.gaps), timing.sizes) == (2, 2, 1, [2, 0])
    assert timing.first is not None
    assert timing.started <= timing.first <= timing.ended
    assert request.url.params["task"] == "bench-3"
    body = json.loads(request.content)
    assert (body["prompt_token_ids"], body["max_tokens"], body["ignore_eos"]) == ([7, 8], 2, True)


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
