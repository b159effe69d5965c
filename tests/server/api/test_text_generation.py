"""LoRAX's and TGI's form: Hugging Face's client and LoRAX's work unchanged; `adapter_id` is a task."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import AsyncInferenceClient, TextGenerationOutput, TextGenerationStreamOutput
from huggingface_hub.errors import HfHubHTTPError, OverloadedError, ValidationError
from pydantic import BaseModel, ConfigDict

from server.core import EngineFailure
from tests.kit.tiny import EOS
from tests.server.world import Site, error_of, open_site, sent

pytestmark = pytest.mark.anyio
# Recorded from LoRAX's client 0.7.0: every parameter, whether it was named or not.
LORAX: dict[str, Any] = {
    "adapter_id": None,
    "adapter_source": None,
    "merged_adapters": None,
    "api_token": None,
    "do_sample": False,
    "max_new_tokens": 20,
    "ignore_eos_token": False,
    "repetition_penalty": None,
    "return_full_text": False,
    "stop": [],
    "seed": None,
    "temperature": None,
    "top_k": None,
    "top_p": None,
    "truncate": None,
    "typical_p": None,
    "best_of": None,
    "watermark": False,
    "details": True,
    "decoder_input_details": False,
    "return_k_alternatives": None,
    "response_format": None,
}


class Read(BaseModel):
    """A part of an answer as LoRAX's client reads it; what it does not know it passes over."""

    model_config = ConfigDict(strict=True)


class ReadToken(Read):
    """A token that the client needs all of."""

    id: int
    text: str
    logprob: float
    special: bool
    skipped: bool


class ReadStreamDetails(Read):
    """The details of a stream."""

    finish_reason: str
    prompt_tokens: int
    generated_tokens: int
    seed: int | None = None


class ReadDetails(ReadStreamDetails):
    """The details of a whole answer."""

    skipped_tokens: int
    prefill: list[dict[str, Any]]
    tokens: list[ReadToken]


class ReadResponse(Read):
    """A whole answer of LoRAX's."""

    generated_text: str
    details: ReadDetails | None = None


class ReadEvent(Read):
    """An event of LoRAX's."""

    token: ReadToken
    generated_text: str | None = None
    details: ReadStreamDetails | None = None


@pytest.fixture
async def client(server: Site) -> AsyncIterator[AsyncInferenceClient]:
    """Hugging Face's client, told no more than the address."""
    async with AsyncInferenceClient(str(server.http.base_url)) as made:
        yield made


async def generated(site: Site, path: str = "/generate", **parameters: Any) -> Any:
    """The answer to a body of the dialect, which must be taken."""
    answer = await site.post(path, {"inputs": "héllo", "parameters": parameters})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def events_of(site: Site, **parameters: Any) -> list[dict[str, Any]]:
    """The events of a stream, which must end without a word."""
    answer = await site.post("/generate_stream", {"inputs": "héllo", "parameters": parameters})
    assert answer.status_code == 200, answer.text
    return [json.loads(data) for _, data in sent(answer.text)]


async def test_the_client_of_hugging_face(client: AsyncInferenceClient, server: Site) -> None:
    """Its whole answer has the text, the end, and every token with the prompt's."""
    assert await client.text_generation("héllo") == "héllo"
    found = await client.text_generation(
        "ab", adapter_id="one", details=True, decoder_input_details=True, max_new_tokens=2, do_sample=True, seed=7
    )
    assert isinstance(found, TextGenerationOutput) and found.details is not None
    details = found.details
    assert (details.finish_reason, details.generated_tokens, details.seed) == ("length", 2, 7)
    assert [(one.text, one.logprob is None) for one in details.prefill] == [("a", True), ("b", False)]
    assert "".join(one.text for one in details.tokens) == found.generated_text
    assert len(server.engine.submitted[-1].adapters) == 1


async def test_the_client_streams(client: AsyncInferenceClient) -> None:
    """Its stream has a token an event, and at last the whole text and the end."""
    texts = [text async for text in await client.text_generation("héllo", stream=True, max_new_tokens=6)]
    assert "".join(texts) == "héllo"
    coming = await client.text_generation("abc", stream=True, details=True, stop=["b"], return_full_text=True)
    events = [event async for event in coming]
    assert all(isinstance(event, TextGenerationStreamOutput) for event in events)
    assert [(event.index, event.token.text, event.token.special) for event in events] == [
        (1, "a", False),
        (2, "b", False),
    ]
    assert events[0].details is None and events[0].generated_text is None and events[1].details is not None
    assert (events[1].generated_text, events[1].details.finish_reason) == ("abcab", "stop_sequence")
    assert (events[1].details.input_length, events[1].details.generated_tokens) == (3, 2)


async def test_errors_of_the_client(
    client: AsyncInferenceClient, server: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises its own errors, with our sentences; a task that is absent is its error of HTTP with 404."""
    with pytest.raises(ValidationError, match=r"typical_p is not served"):
        await client.text_generation("a", typical_p=0.5)
    with pytest.raises(HfHubHTTPError) as absent:
        await client.text_generation("a", adapter_id="none")
    assert absent.value.response is not None and absent.value.response.status_code == 404
    monkeypatch.setattr(server.engine, "failure", EngineFailure("overloaded", "too much"))
    with pytest.raises(OverloadedError, match="too much"):
        await client.text_generation("a", stream=True)


async def test_an_error_in_a_stream(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first event an error is the last one, in the form that these clients read."""
    outputs = site.engine._outputs

    def broken(submit: Any) -> list[Any]:
        made = outputs(submit)
        made[1].failure = EngineFailure("deadline_exceeded", "too late")
        return made

    monkeypatch.setattr(site.engine, "_outputs", broken)
    first, last = await events_of(site)
    assert first["token"]["text"] == "h"
    assert (last["error"], last["error_type"], last["code"]) == ("too late", "generation", "deadline_exceeded")


@pytest.mark.parametrize("adapter", [None, "one", "one@1", "base", "__base_model__"])
async def test_the_client_of_lorax(shared: Site, adapter: str | None) -> None:
    """It asks at `/` for a list of one or a stream, and reads both; without an adapter the base answers."""
    body = {"inputs": "abc", "parameters": LORAX | {"adapter_id": adapter}}
    (found,) = (await shared.post("/", {**body, "stream": False})).json()
    read = ReadResponse.model_validate(found)
    assert read.details is not None and read.details.seed is None
    assert (read.details.finish_reason, read.details.prompt_tokens, read.details.generated_tokens) == (
        "eos_token",
        3,
        4,
    )
    submit = shared.engine.submitted[-1]
    assert len(submit.adapters) == (adapter in ("one", "one@1"))
    assert (submit.sampling.temperature, submit.sampling.max_tokens) == (0.0, 20)
    answer = await shared.post("/", {**body, "stream": True})
    events = [ReadEvent.model_validate_json(data) for _, data in sent(answer.text)]
    assert [event.token for event in events] == read.details.tokens
    assert events[-1].generated_text == read.generated_text
    told = "".join(event.token.text for event in events if not event.token.special)
    assert told == read.generated_text.rstrip("\ufffd")  # of bytes that are no character


async def test_plain_and_details(shared: Site) -> None:
    """Without details there is the text alone, and no log-probability is computed for it."""
    assert await generated(shared) == {"generated_text": "héllo"}
    assert shared.engine.submitted[-1].sampling.logprobs is None
    found = await generated(shared, details=True, top_n_tokens=2, return_k_alternatives=1)
    last = found["details"]["tokens"][-1]
    assert (last["id"], last["special"], found["details"]["finish_reason"]) == (EOS, True, "eos_token")
    assert [len(top) for top in found["details"]["top_tokens"]] == [2] * len(found["details"]["tokens"])
    assert all(len(token["alternative_tokens"]) == 1 for token in found["details"]["tokens"])
    events = await events_of(shared, details=True, top_n_tokens=2, return_k_alternatives=1)
    assert [event["token"] for event in events] == found["details"]["tokens"]
    assert [event["top_tokens"] for event in events] == found["details"]["top_tokens"]


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0}, 0.0),
        ({"temperature": 1.0}, 0.0),
        ({"temperature": 0.5}, 0.5),
        ({"do_sample": False, "temperature": 0.5}, 0.5),
        ({"top_k": 3}, 1.0),
        ({"top_p": 0.5}, 1.0),
        ({"temperature": 0, "top_p": 0.5}, 0.0),
    ],
)
async def test_when_tokens_are_drawn(shared: Site, parameters: dict[str, Any], temperature: float) -> None:
    """Tokens are drawn if `do_sample` or another parameter of drawing asks for it, as these servers do, else not; the
    seed is told of what was drawn."""
    found = await generated(shared, details=True, **parameters)
    sampling = shared.engine.submitted[-1].sampling
    assert sampling.temperature == temperature
    assert found["details"]["seed"] == (sampling.seed if temperature else None)


async def test_every_parameter_reaches_the_engine(shared: Site) -> None:
    """Each parameter that is served is the engine's own, also a seed of 64 bits."""
    await generated(
        shared, top_k=5, top_p=0.9, temperature=0.7, repetition_penalty=1.1, frequency_penalty=0.2, seed=2**64 - 1,
        max_new_tokens=9, ignore_eos_token=True,
    )  # fmt: skip
    sampling = shared.engine.submitted[-1].sampling
    assert (sampling.top_k, sampling.top_p, sampling.temperature, sampling.seed) == (5, 0.9, 0.7, 2**63 - 1)
    assert (sampling.repetition_penalty, sampling.frequency_penalty, sampling.ignore_eos) == (1.1, 0.2, True)
    assert sampling.max_tokens == 9
    await generated(shared)
    assert shared.engine.submitted[-1].sampling.max_tokens == 100


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/generate", {"inputs": ""}, 422, "inputs"),
        ("/generate", {"inputs": ["a"]}, 422, "inputs"),
        ("/generate", {"inputs": "a", "prompt": "b"}, 422, "prompt"),
        ("/generate", {"inputs": "a", "wishes": 1}, 422, "wishes"),
        ("/generate", {"inputs": "a", "parameters": {"wishes": 1}}, 422, "parameters.wishes"),
        ("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 0}}, 422, "parameters.max_new_tokens"),
        ("/generate", {"inputs": "a" * 10**6}, 400, "inputs"),
        ("/generate", {"inputs": "a", "parameters": {"adapter_id": "a/b"}}, 404, "task"),
        ("/generate?task=one", {"inputs": "a", "parameters": {"adapter_id": "two"}}, 422, "parameters.adapter_id"),
        ("/generate?task=one", {"inputs": "a", "parameters": {"adapter_id": "base"}}, 422, "parameters.adapter_id"),
        ("/generate", {"inputs": "a", "stream": True, "parameters": {"decoder_input_details": True}}, 422,
         "parameters.decoder_input_details"),
        ("/", {"prompt": "a"}, 422, "prompt"),
        ("/generate_stream", {}, 422, "inputs"),
        ("/generate_stream", "{", 400, None),
    ],
)  # fmt: skip
async def test_what_is_refused(shared: Site, path: str, body: Any, status: int, param: str | None) -> None:
    """A body of this dialect that cannot be meant is refused by the field, in its form of errors."""
    answer = await shared.post(path, body)
    assert (answer.status_code, error_of(answer)["param"]) == (status, param), answer.text
    assert isinstance(answer.json()["error"], str)


async def test_the_query_may_name_the_task(shared: Site) -> None:
    """A task in the query is asked for, alone or with the same one in the body, and never the base instead."""
    for query, parameters in (("?task=one", {}), ("?task=one", {"adapter_id": "one"}), ("?task=base", {})):
        await generated(shared, f"/generate{query}", **parameters)
        assert len(shared.engine.submitted[-1].adapters) == ("one" in query)


async def test_a_stream_through_the_body(shared: Site) -> None:
    """The body's `stream` is heard on /generate, too, as Hugging Face's client sends it to a whole address."""
    answer = await shared.post("/generate", {"inputs": "ab", "stream": True})
    assert [json.loads(data)["token"]["text"] for _, data in sent(answer.text)][:2] == ["a", "b"]


async def test_keys_are_asked_for(tiny_base: Path, tmp_path: Path) -> None:
    """Without a key each of these routes is 401, in the form of its errors."""
    async with open_site(tiny_base, tmp_path, admin_key="k" * 16) as site:
        for path in ("/", "/generate_stream", "/generate"):
            answer = await site.post(path, {"inputs": "a"})
            assert answer.status_code == 401 and error_of(answer)["code"] == "unauthorized"
