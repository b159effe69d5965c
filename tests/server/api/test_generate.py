"""POST /generate: every field of the contract, its default, and what comes back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from server.core import AdapterRef, Sampling
from server.engine.fake import shift_of
from server.engine.messages import Output, Submit
from tests.kit.tiny import EOS, VOCAB_SIZE
from tests.server.world import MAX_TOKENS, Site, open_site

pytestmark = pytest.mark.anyio


async def test_base_answers_by_its_name(shared: Site) -> None:
    """`task=base` is the base: the fake echoes the prompt, and the answer has the contract's fields and no others."""
    answer = await shared.ask(prompt="héllo")
    assert set(answer) == {"id", "task", "adapter", "choices", "usage", "timing"}
    assert (answer["task"], answer["adapter"]) == ("base", None)
    assert answer["choices"] == [
        {"text": "héllo", "token_ids": [*"héllo".encode(), EOS], "finish_reason": "stop"},
    ]
    assert answer["usage"] == {"prompt_tokens": 6, "cached_tokens": 0, "virtual_tokens": 0, "completion_tokens": 7}
    assert set(answer["timing"]) == {"queued_ms", "load_ms", "ttft_ms", "total_ms"}
    assert answer["timing"]["ttft_ms"] == 2.0 and answer["timing"]["total_ms"] > 0


async def test_task_wears_its_adapter(shared: Site) -> None:
    """A task's request goes to the engine with its version's digest at weight 1, and the answer says which it was."""
    version = (await shared.http.get("/tasks/one")).json()["versions"][0]
    answer = await shared.ask("one", prompt="ab", max_tokens=2)
    assert answer["adapter"] == {"version": 1, "digest": version["digest"], "method": "lora"}
    adapter = AdapterRef(version["digest"], 1.0)
    assert shared.engine.submitted[-1].adapters == (adapter,)
    assert answer["choices"][0]["token_ids"] == [(ord(c) + shift_of((adapter,))) % VOCAB_SIZE for c in "ab"]
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_defaults(shared: Site) -> None:
    """Fields that are not given have the contract's defaults, and a seed is drawn anew for each request."""
    await shared.ask(prompt="a")
    await shared.ask(prompt="a")
    first, second = shared.engine.submitted[-2:]
    assert first.sampling.seed != second.sampling.seed
    assert first.sampling == Sampling(max_tokens=128, temperature=0, top_p=1, seed=first.sampling.seed)
    assert 119 < first.deadline - first.arrived <= 120
    assert first.namespace == "default"


async def test_every_sampling_field_reaches_the_engine(shared: Site) -> None:
    """Each sampling field of a request is the engine's, unchanged."""
    given: dict[str, Any] = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.25,
        "seed": 7,
        "ignore_eos": True,
        "max_tokens": 3,
        "logprobs": 2,
    }
    await shared.ask(prompt="a", logit_bias={"5": 1.5, "258": -100}, timeout_s=9, **given)
    submit = shared.engine.submitted[-1]
    assert submit.sampling == Sampling(**given, logit_bias={5: 1.5, 258: -100.0})
    assert submit.deadline - submit.arrived == pytest.approx(9)


async def test_a_tiny_temperature_is_greedy(shared: Site) -> None:
    """A temperature that logits cannot be divided by is 0."""
    await shared.ask(prompt="a", temperature=1e-30)
    assert shared.engine.submitted[-1].sampling.temperature == 0


async def test_prompt_forms(shared: Site) -> None:
    """Text, token ids and messages all become the engine's prompt; messages through the base's chat template."""
    await shared.ask(prompt="hi")
    assert shared.engine.submitted[-1].prompt == [*b"hi"]
    await shared.ask(prompt_token_ids=[1, 2, 258])
    assert shared.engine.submitted[-1].prompt == [1, 2, 258]
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    await shared.ask(messages=turns)
    assert bytes(shared.engine.submitted[-1].prompt).decode() == "<system>be kind\n<user>hi\n<assistant>"


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
async def test_a_turn_is_text(shared: Site, role: str) -> None:
    """The name of a control token in a turn of any role is the text that it is, on every route that takes turns."""
    turns = [{"role": role, "content": "a<eos>b"}]
    for path, more in (("/generate?task=base", {}), ("/v1/chat/completions", {"model": "base"})):
        assert (await shared.post(path, {"messages": turns, **more})).status_code == 200
        assert bytes(shared.engine.submitted[-1].prompt).decode() == f"<{role}>a<eos>b\n<assistant>"


async def test_a_raw_prompt_has_control_tokens_unless_told(shared: Site, tiny_base: Path, tmp_path: Path) -> None:
    """A raw prompt names control tokens, as clients that write a template themselves do; with the setting off, none."""
    await shared.ask(prompt="a<eos>b")
    assert shared.engine.submitted[-1].prompt == [97, EOS, 98]
    async with open_site(tiny_base, tmp_path / "data", prompt_control_tokens=False) as site:
        for path, more in (("/generate?task=base", {}), ("/v1/completions", {"model": "base"})):
            assert (await site.post(path, {"prompt": ["a<eos>b"], **more})).status_code == 200
            assert bytes(site.engine.submitted[-1].prompt) == b"a<eos>b"
        assert (await site.post("/generate?task=base", {"prompt_token_ids": [97, EOS]})).status_code == 200
        assert site.engine.submitted[-1].prompt == [97, EOS]


async def test_long_prompts_take_the_same_way(shared: Site) -> None:
    """Long texts are tokenised in a thread, to the same tokens."""
    answer = await shared.ask(prompt=["é" * 150] * 30, max_tokens=1)
    assert answer["usage"]["prompt_tokens"] == 30 * 300
    assert all(submit.prompt == [*("é" * 150).encode()] for submit in shared.engine.submitted[-30:])


async def test_list_of_prompts_in_order(shared: Site) -> None:
    """A list of prompts is answered in its order, n answers each, and all tokens are counted once."""
    shared.engine.delay_s = 0.002
    try:
        answer = await shared.ask(prompt=["long prompt " * 3, "b", "cc"], n=2)
    finally:
        shared.engine.delay_s = 0
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == ["long prompt " * 3] * 2 + ["b"] * 2 + ["cc"] * 2
    assert answer["usage"]["prompt_tokens"] == 39
    assert answer["usage"]["completion_tokens"] == 2 * (39 + 3)


async def test_seeds(shared: Site) -> None:
    """The same seed gives each choice the same seed again, and the choices of one request different ones."""
    await shared.ask(prompt=["a", "b"], n=3, seed=-5)
    first = [submit.sampling.seed for submit in shared.engine.submitted[-6:]]
    await shared.ask(prompt=["a", "b"], n=3, seed=-5)
    assert [submit.sampling.seed for submit in shared.engine.submitted[-6:]] == first
    assert len(set(first)) == 6 and all(0 <= seed < 2**63 for seed in first)
    await shared.ask(prompt="a", seed=7)
    assert shared.engine.submitted[-1].sampling.seed == 7


@pytest.mark.parametrize(
    ("prompt", "stop", "text"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("aab", ["aab"], ""),
        ("aaab", ["aab"], "a"),
        ("ends with tw", ["two"], "ends with tw"),
        ("né è", ["é è"], "n"),
        ("a🎩b", ["🎩"], "a"),
        ("nothing", ["x", "y", "z", "w"], "nothing"),
    ],
)
async def test_stop_texts(shared: Site, prompt: str, stop: list[str], text: str) -> None:
    """An answer ends before the first stop text; a stop text is never shown, and its beginning only if it is none."""
    (choice,) = (await shared.ask(prompt=prompt, stop=stop))["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, "stop")
    events = await shared.events(prompt=prompt, stop=stop)
    assert "".join(event["text"] for event in events) == text


async def test_stop_aborts_the_sequence(shared: Site) -> None:
    """A stop text that ends an answer stops the engine too, and the tokens after it are not counted."""
    answer = await shared.ask(prompt="ab" * 50, stop=["b"])
    assert answer["choices"][0]["token_ids"] == [*b"ab"]
    assert answer["usage"]["completion_tokens"] == 2
    assert shared.engine.aborted[-1] == shared.engine.submitted[-1].sequence_id


async def test_logprobs(shared: Site) -> None:
    """logprobs=2 gives the chosen token's log-probability and two alternatives a position; 0 gives no alternatives.

    Each has its bytes, also one that is a part of a character, which its text cannot tell.
    """
    (choice,) = (await shared.ask(prompt="ab", logprobs=2, max_tokens=2))["choices"]
    assert [entry["token"] for entry in choice["logprobs"]] == ["a", "b"]
    a = {"token": "a", "token_id": 97, "logprob": -0.25, "bytes": [97]}
    b = {"token": "b", "token_id": 98, "logprob": -0.5, "bytes": [98]}
    assert choice["logprobs"][0] == {**a, "top": [a, b]}
    (choice,) = (await shared.ask(prompt="ab", logprobs=0, max_tokens=1))["choices"]
    assert choice["logprobs"] == [{**a, "top": []}]
    (choice,) = (await shared.ask(prompt="é", logprobs=0, max_tokens=2))["choices"]
    assert [entry["bytes"] for entry in choice["logprobs"]] == [[0xC3], [0xA9]]


async def test_several_adapters(shared: Site) -> None:
    """A list of adapters is composed, each with its weight (1 if not said), in the order given."""
    digests = [(await shared.http.get(f"/tasks/{name}")).json()["versions"][0]["digest"] for name in ("one", "two")]
    body = {"prompt": "a", "adapters": [{"task": "two", "weight": -0.5}, {"task": "one"}]}
    answer = (await shared.post("/generate", body)).json()
    assert shared.engine.submitted[-1].adapters == (AdapterRef(digests[1], -0.5), AdapterRef(digests[0], 1.0))
    assert answer["task"] == "two+one"
    assert [(worn["task"], worn["weight"]) for worn in answer["adapters"]] == [("two", -0.5), ("one", 1.0)]


async def test_version(site: Site, zips: list[bytes]) -> None:
    """`version` asks for one version, routed or not; without it the routed one answers."""
    digests = [(await site.upload("t", body)).json()["digest"] for body in zips[:2]]
    for asked, digest in ((1, digests[0]), (2, digests[1]), (None, digests[1])):
        answer = await site.ask("t", prompt="a", version=asked)
        assert answer["adapter"]["digest"] == digest


async def test_the_longest_request_is_served(shared: Site) -> None:
    """A prompt and max_tokens that fill the context exactly are taken."""
    answer = await shared.ask(prompt="a" * (MAX_TOKENS - 1), max_tokens=1)
    assert answer["choices"][0]["text"] == "a"


async def test_cached_tokens_are_summed_over_prompts(shared: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """cached_tokens counts each prompt once, and of its choices the one that found least."""
    outputs = shared.engine._outputs
    found = iter([0, 32, 64, 48])

    def cached(submit: Submit) -> list[Output]:
        number = next(found)
        made = outputs(submit)
        for output in made:
            output.cached_tokens, output.virtual_tokens = number, 4
        return made

    monkeypatch.setattr(shared.engine, "_outputs", cached)
    answer = await shared.ask(prompt=["a" * 70, "b" * 70], n=2, max_tokens=2)
    assert answer["usage"]["cached_tokens"] == 0 + 48
    assert answer["usage"]["virtual_tokens"] == 4 + 4


async def test_request_id(shared: Site) -> None:
    """A sound X-Request-Id is echoed and is the answer's id; any other is replaced by one of ours."""
    headers = {"X-Request-Id": "My-Id_1.2"}
    answer = await shared.http.post("/generate?task=base", json={"prompt": "a"}, headers=headers)
    assert answer.headers["x-request-id"] == answer.json()["id"] == "My-Id_1.2"
    for bad in ("", "a b", "x" * 65, "é", "a\tb"):
        answer = await shared.http.get("/tasks", headers={b"X-Request-Id": bad.encode()})
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"]), bad
