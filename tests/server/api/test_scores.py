"""Scores of given text: their form on every route, where a prompt ends, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kit.tiny import VOCAB_SIZE
from tests.server.world import MAX_TOKENS, Site, error_of

pytestmark = pytest.mark.anyio
SCORE: dict[str, Any] = {"prompt": "ab", "continuations": ["c"]}


@pytest.mark.parametrize("prompt", ["aé", [97, 195, 169], ["aé", "x"], [[97, 195, 169], [120]]])
@pytest.mark.parametrize("max_tokens", [0, 3])
async def test_an_echo_has_the_prompt_before_the_answer(shared: Site, prompt: Any, max_tokens: int) -> None:
    """Every form of a prompt is told before its answer, with the first token null and places in the whole text."""
    body = {"model": "base", "prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": max_tokens}
    answer = (await shared.post("/v1/completions", body)).json()
    first = answer["choices"][0]
    assert (first["text"], first["finish_reason"]) == ("aé" + "aé" * bool(max_tokens), "length")
    logprobs = first["logprobs"]
    assert logprobs["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9"] * (2 if max_tokens else 1)
    assert logprobs["token_logprobs"] == [None, *[-0.25] * (2 + max_tokens)]
    assert logprobs["top_logprobs"][0] is None and logprobs["top_logprobs"][2] == {"bytes:\\xa9": -0.25}
    assert logprobs["text_offset"] == [0, 1, 1, 2, 3, 3][: 3 + max_tokens]
    if len(answer["choices"]) == 2:
        assert answer["choices"][1]["text"].startswith("x")
    assert bool(answer["usage"]["completion_tokens"]) == bool(max_tokens)


async def test_an_echo_streams_first(shared: Site) -> None:
    """A stream's first event has the prompt, whole, and its places go on in the next; without scores it is text."""
    body = {"model": "base", "prompt": "abc", "echo": True, "max_tokens": 2, "logprobs": 0, "n": 2}
    events = await shared.events("/v1/completions", **body)
    for index in range(2):
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert [choice["text"] for choice in mine] == ["abca", "b"]
        assert [choice["logprobs"]["text_offset"] for choice in mine] == [[0, 1, 2, 3], [4]]
    plain = (await shared.post("/v1/completions", {**body, "logprobs": None, "max_tokens": 0, "n": 1})).json()
    assert (plain["choices"][0]["text"], plain["choices"][0]["logprobs"]) == ("abc", None)


async def test_a_generation_tells_its_prompt(shared: Site) -> None:
    """`prompt_logprobs` of POST /generate are of each prompt, null for its first token; in a stream they come first."""
    answer = await shared.ask(prompt=["ab", "c"], prompt_logprobs=1, max_tokens=1)
    first, second = (choice["prompt_logprobs"] for choice in answer["choices"])
    b = {"token": "b", "token_id": 98, "logprob": -0.25, "bytes": [98]}
    assert (first, second) == ([None, {**b, "top": [b]}], [None])
    assert "logprobs" not in answer["choices"][0]
    only = await shared.ask(prompt="ab", prompt_logprobs=0, max_tokens=0)
    assert (only["choices"][0]["text"], only["choices"][0]["finish_reason"]) == ("", "length")
    assert (only["usage"]["prompt_tokens"], only["usage"]["completion_tokens"]) == (2, 0)
    events = await shared.events(prompt="ab", prompt_logprobs=1, max_tokens=2)
    assert [event.get("prompt_logprobs") for event in events] == [first, None]
    full = await shared.ask(prompt="a" * MAX_TOKENS, prompt_logprobs=0, max_tokens=0)
    assert len(full["choices"][0]["prompt_logprobs"]) == MAX_TOKENS


async def test_continuations_are_tokenised_behind_the_prompt(shared: Site) -> None:
    """Texts are one text with their prompt, token ids follow it; the engine scores what is the continuation's own."""
    bodies: list[dict[str, Any]] = [
        {"prompt": "ab ", "continuations": ["é", [99, 100]], "logprobs": True},
        {"prompt_token_ids": [97, 98, 32], "continuations": [[195, 169], [99, 100]], "logprobs": True},
    ]
    for body in bodies:
        answer = (await shared.post("/score?task=base", body)).json()
        score = {"logprob": -0.5, "num_tokens": 2, "is_greedy": True, "token_logprobs": [-0.25, -0.25]}
        assert answer["scores"] == [score, score]
        assert answer["usage"]["prompt_tokens"] == 10
        submitted = shared.engine.submitted[-2:]
        assert [one.prompt for one in submitted] == [[97, 98, 32, 195, 169], [97, 98, 32, 99, 100]]
        assert {(one.sampling.scored_from, one.sampling.max_tokens) for one in submitted} == {(3, 0)}
    short = (await shared.post("/score?task=base", SCORE)).json()
    assert short["scores"] == [{"logprob": -0.25, "num_tokens": 1, "is_greedy": True}]
    composed = {**SCORE, "adapters": [{"task": "one", "weight": 0.5}]}
    assert (await shared.post("/score", composed)).status_code == 200
    assert [adapter.weight for adapter in shared.engine.submitted[-1].adapters] == [0.5]


REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    ("/score?task=base", {**SCORE, "max_tokens": 1}, 422, "max_tokens"),
    ("/score?task=base", {**SCORE, "stream": True}, 422, "stream"),
    ("/score?task=base", {**SCORE, "logprobs": 1}, 422, "logprobs"),
    ("/score?task=base", {**SCORE, "prompt_token_ids": [1]}, 400, "prompt"),
    ("/score?task=base", {"continuations": ["a"]}, 400, "prompt"),
    ("/score?task=base", {"prompt": "a", "continuations": []}, 422, "continuations"),
    ("/score?task=base", {"prompt": "a", "continuations": [""]}, 422, "continuations.0"),
    ("/score?task=base", {"prompt": "", "continuations": ["a"]}, 400, "continuations.0"),
    ("/score?task=base", {"prompt_token_ids": [97], "continuations": [[98], "a"]}, 400, "continuations.1"),
    ("/score?task=base", {"prompt_token_ids": [97], "continuations": [[VOCAB_SIZE]]}, 422, "continuations"),
    ("/score?task=base", {"prompt": "a", "continuations": ["b" * MAX_TOKENS]}, 400, "continuations"),
    ("/score?task=base", {"prompt": "a", "continuations": ["b"] * 257}, 422, "continuations"),
    ("/score?task=none", SCORE, 404, "task"),
    ("/score", SCORE, 400, "task"),
    ("/generate?task=base", {"prompt": "a", "max_tokens": 0}, 422, "max_tokens"),
    ("/generate?task=base", {"prompt": "a", "prompt_logprobs": 21}, 422, "prompt_logprobs"),
    ("/generate?task=base", {"prompt": "a", "echo": True}, 422, "echo"),
    ("/v1/completions", {"model": "base", "prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    ("/v1/completions", {"model": "base", "prompt": "a", "echo": 1}, 400, "echo"),
    (
        "/v1/chat/completions",
        {"model": "base", "messages": [{"role": "user", "content": "a"}], "echo": True},
        400,
        "echo",
    ),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), REFUSED)
async def test_what_cannot_be_scored_is_named(
    shared: Site, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    """A body that asks for no score, or for none that there is, is refused by the field's name."""
    answer = await shared.post(path, body)
    assert (answer.status_code, error_of(answer)["param"]) == (status, param), answer.text
