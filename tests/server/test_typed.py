"""Typed answers of a server fit their schemas, in every format of calls; `typed.py` asks for thousands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.kit.tiny import make_tiny_base
from tests.server.typed import Tally, ask, judge, make_artifacts
from tests.server.world import serve_real

pytestmark = pytest.mark.anyio


async def test_a_few_typed_answers(anyio_backend: str, tmp_path: Path) -> None:
    """JSON fits its schema, and calls those of their functions, for the base and a method of each class."""
    base = make_tiny_base(tmp_path / "base", max_position_embeddings=4096)
    limits = {"kv_cache_bytes": 2**26, "max_running": 16, "max_waiting": 64, "max_sequence_tokens": 4000}
    async with serve_real(base, tmp_path / "data", tool_format="hermes", **limits) as site:
        bodies = make_artifacts(base, tmp_path)
        for task, body in bodies.items():
            assert (await site.upload(task, body)).status_code == 201
        for is_call, num in ((False, 9), (True, 18)):
            tally = await ask(str(site.http.base_url), ["base", *bodies], num, is_call)
            assert not tally.wrong and tally.ended["fits"] > 0.7 * num, tally


@pytest.mark.parametrize(
    ("message", "is_call", "wrong"),
    [
        ({"content": '{"a": 1}'}, False, 0),
        ({"content": '{"a": "x"}'}, False, 1),
        ({"content": "no JSON"}, False, 1),
        ({"content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}, True, 0),
        ({"content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": "x"}'}}]}, True, 1),
        ({"content": None, "tool_calls": [{"function": {"name": "g", "arguments": "{}"}}]}, True, 1),
        ({"content": "f(a=1)"}, True, 1),
    ],
)
def test_what_is_wrong_is_told(message: dict[str, Any], is_call: bool, wrong: int) -> None:
    """An answer that does not fit is counted as wrong."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    choice = {"finish_reason": "tool_calls" if is_call else "stop", "message": message}
    answer = httpx2.Response(200, json={"choices": [choice]}, request=httpx2.Request("POST", "http://a"))
    judge(answer, {"f": schema} if is_call else schema, is_call, tally := Tally())
    assert (len(tally.wrong), tally.ended["fits"]) == (wrong, 1 - wrong)
