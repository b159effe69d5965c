"""OpenAI's shape: the official client works unchanged, and what is not served is refused by its name."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from server.core import EngineFailure
from server.engine.messages import Output, Submit
from tests.kit.tiny import EOS
from tests.server.world import MAX_TOKENS, Site, error_of, sent, serve_site

pytestmark = pytest.mark.anyio
KEY = "a key of the admin's"
TURNS: list[Any] = [{"role": "user", "content": "hi🎩"}]
MODEL = {"object": "model", "created": 0, "owned_by": "default", "max_model_len": MAX_TOKENS}
RENDERED = "<user>hi🎩\n<assistant>"


@pytest.fixture(scope="module")
async def server(
    anyio_backend: str, tiny_base: Path, zips: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Site]:
    """A server on loopback with an admin key and the task `adapter`."""
    async with serve_site(tiny_base, tmp_path_factory.mktemp("openai"), admin_key=KEY) as site:
        site.http.headers["Authorization"] = f"Bearer {KEY}"
        assert (await site.upload("hat", zips[0])).status_code == 201
        yield site


@pytest.fixture
async def client(server: Site) -> AsyncIterator[AsyncOpenAI]:
    """The official client, over the shared server."""
    async with AsyncOpenAI(base_url=f"{server.http.base_url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


async def test_models(client: AsyncOpenAI, server: Site) -> None:
    """The models are the base and the tasks, with vLLM's fields; one can be asked for, an unknown one is not found."""
    models = [model async for model in client.models.list()]
    assert [(model.id, model.object, model.owned_by) for model in models] == [
        ("base", "model", "default"),
        ("hat", "model", "default"),
    ]
    assert models[1].created > 1.7e9
    assert [model.to_dict() | {"created": 0} for model in models] == [
        {**MODEL, "id": "base", "root": server.state.settings.base, "parent": None},
        {**MODEL, "id": "hat", "root": "hat", "parent": "base"},
    ]
    assert await client.models.retrieve("hat") == models[1]
    assert await client.models.retrieve("base") == models[0]
    with pytest.raises(openai.NotFoundError) as absent:
        await client.models.retrieve("none")
    assert (absent.value.code, absent.value.param) == ("model_not_found", "model")


async def test_completion(client: AsyncOpenAI) -> None:
    """A completion has OpenAI's fields, usage and the request's id."""
    answer = await client.completions.create(model="base", prompt="héllo", max_tokens=50)
    assert (answer.object, answer.model) == ("text_completion", "base")
    (choice,) = answer.choices
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, "héllo", "stop", None)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (6, 7, 13)
    assert answer.id == f"cmpl-{answer._request_id}"


async def test_completion_defaults(client: AsyncOpenAI, server: Site) -> None:
    """The defaults are OpenAI's: 16 tokens, temperature 1."""
    answer = await client.completions.create(model="base", prompt="a" * 40)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("a" * 16, "length")
    sampling = server.engine.submitted[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (1.0, 1.0, 16)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        ([97, 98], ["ab"]),
        ([[97, 98], [99]], ["ab", "c"]),
    ],
)
async def test_completion_prompts(client: AsyncOpenAI, prompt: Any, texts: list[str]) -> None:
    """Every form of a prompt that OpenAI has is taken, with n answers each in order."""
    answer = await client.completions.create(model="base", prompt=prompt, n=2)
    assert [choice.text for choice in answer.choices] == [text for text in texts for _ in range(2)]
    assert [choice.index for choice in answer.choices] == list(range(2 * len(texts)))


async def test_completion_logprobs(client: AsyncOpenAI) -> None:
    """Logprobs have OpenAI's older form; in a stream the offsets go on from chunk to chunk."""
    answer = await client.completions.create(model="base", prompt="abc", max_tokens=3, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["a", "b", "c"]
    assert logprobs.token_logprobs == [-0.25] * 3
    assert logprobs.top_logprobs is not None and logprobs.top_logprobs[0] == {"a": -0.25, "b": -0.5}
    assert logprobs.text_offset == [0, 1, 2]
    offsets: list[int] = []
    async for chunk in await client.completions.create(
        model="base", prompt="abc", max_tokens=3, logprobs=2, stream=True
    ):
        found = chunk.choices[0].logprobs
        offsets += (found and found.text_offset) or []
    assert offsets == [0, 1, 2]


async def test_no_token_of_completion_logprobs_is_lost(
    client: AsyncOpenAI, server: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every alternative has a name of its own, also parts of a character; the chosen token is there, with its value."""
    outputs = server.engine._outputs

    def unlikely(submit: Submit) -> list[Output]:
        made = outputs(submit)
        for output in made:
            output.logprobs[0].chosen = -9.0
            output.logprobs[0].top = [((output.token_ids[0] + at) % 250, -0.1 * at) for at in range(1, 6)]
        return made

    monkeypatch.setattr(server.engine, "_outputs", unlikely)
    answer = await client.completions.create(model="base", prompt="a🎩b", max_tokens=6, logprobs=5)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.top_logprobs is not None
    assert logprobs.tokens == ["a", "bytes:\\xf0", "bytes:\\x9f", "bytes:\\x8e", "bytes:\\xa9", "b"]
    for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True):
        assert len(top) == 6 and top[token] == -9.0
    assert logprobs.text_offset == [0, 1, 1, 1, 1, 2]


async def test_completion_stream(client: AsyncOpenAI) -> None:
    """A stream's chunks join to the plain answer; the last has the reason, and no usage unless asked for."""
    chunks = [chunk async for chunk in await client.completions.create(model="base", prompt="a🎩b", stream=True)]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "a🎩b"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.object == "text_completion" and chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("kind", ["completions", "chat"])
async def test_include_usage(client: AsyncOpenAI, kind: str) -> None:
    """The option include_usage adds a chunk without choices that has the usage; the chunks before it have a null."""
    body: dict[str, Any] = {"model": "base", "stream": True, "stream_options": {"include_usage": True}}
    if kind == "chat":
        chunks: list[Any] = [chunk async for chunk in await client.chat.completions.create(**body, messages=TURNS)]
    else:
        chunks = [chunk async for chunk in await client.completions.create(**body, prompt="ab")]
    *before, last = chunks
    assert all(chunk.usage is None and chunk.choices for chunk in before)
    assert last.choices == [] and last.usage.total_tokens == last.usage.prompt_tokens * 2 + 1


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize(
    ("path", "body"), [("completions", {"prompt": "abc"}), ("chat/completions", {"messages": TURNS})]
)
async def test_continuous_usage(server: Site, path: str, body: dict[str, Any], is_last: bool) -> None:
    """With vLLM's continuous_usage_stats each chunk has what was used so far, up to what the whole answer used."""
    options = {"include_usage": is_last, "continuous_usage_stats": True}
    chunks = await server.events(f"/v1/{path}", model="base", n=2, stream_options=options, **body)
    whole = (await server.post(f"/v1/{path}", {"model": "base", "n": 2, **body})).json()["usage"]
    used = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert used == sorted(used) and 0 < used[0] < used[-1]
    assert all(chunk["usage"]["prompt_tokens"] == whole["prompt_tokens"] for chunk in chunks)
    assert chunks[-1]["usage"] == whole and (chunks[-1]["choices"] == []) == is_last


async def test_chat(client: AsyncOpenAI, server: Site) -> None:
    """A chat completion renders the messages, and has OpenAI's fields; its defaults are OpenAI's."""
    answer = await client.chat.completions.create(model="base", messages=TURNS)
    assert (answer.object, answer.id) == ("chat.completion", f"chatcmpl-{answer._request_id}")
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", RENDERED)
    assert (choice.finish_reason, choice.logprobs, choice.message.refusal) == ("stop", None, None)
    submit = server.engine.submitted[-1]
    assert submit.sampling.temperature == 1.0
    assert submit.sampling.max_tokens == MAX_TOKENS - len(submit.prompt), "the rest of the context"
    assert not submit.adapters


async def test_chat_fields(client: AsyncOpenAI, server: Site) -> None:
    """Sampling fields, the two names of the limit, a stop text alone, content in parts, and the task's adapter."""
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    answer = await client.chat.completions.create(
        model="hat", messages=parts, max_completion_tokens=5, temperature=0, seed=3, stop="zz", user="me", top_p=0.5
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 5
    submit = server.engine.submitted[-1]
    assert bytes(submit.prompt) == b"<user>ab\n<assistant>"
    assert len(submit.adapters) == 1 and (submit.sampling.seed, submit.sampling.top_p) == (3, 0.5)
    limited = await client.chat.completions.create(model="base", messages=TURNS, max_tokens=2)
    assert limited.choices[0].message.content == "<u"
    stopped = await client.chat.completions.create(model="base", messages=TURNS, stop=["hi", "x"])
    assert stopped.choices[0].message.content == "<user>"


async def test_an_answer_goes_back_as_a_turn(client: AsyncOpenAI, server: Site) -> None:
    """A conversation: the message that the client was given is a turn of the next request; `developer` is `system`."""
    turns: list[Any] = [{"role": "developer", "content": "be"}, *TURNS]
    answer = await client.chat.completions.create(model="base", messages=turns, max_tokens=4)
    turns += [answer.choices[0].message, {"role": "user", "content": "x"}]
    await client.chat.completions.create(model="base", messages=turns, max_tokens=4)
    said = bytes(server.engine.submitted[-1].prompt).decode()
    assert said == "<system>be\n<user>hi🎩\n<assistant><sys\n<user>x\n<assistant>"


async def test_chat_stream(client: AsyncOpenAI) -> None:
    """The first delta of each choice has the role; the deltas join to the plain answer."""
    chunks = [c async for c in await client.chat.completions.create(model="base", messages=TURNS, stream=True, n=2)]
    for index in range(2):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in mine) == RENDERED
        assert [choice.delta.role for choice in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert [choice.finish_reason for choice in mine] == [None] * (len(mine) - 1) + ["stop"]
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)


async def test_chat_logprobs(client: AsyncOpenAI) -> None:
    """Chat's logprobs have OpenAI's form; the bytes of all tokens, also parts of a character, are the answer's."""
    body: dict[str, Any] = {"model": "base", "messages": TURNS, "logprobs": True, "top_logprobs": 2}
    answer = await client.chat.completions.create(**body)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    first = logprobs.content[0]
    assert (first.token, first.logprob, first.bytes) == ("<", -0.25, [60])
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("<", -0.25), ("=", -0.5)]
    *shown, end = logprobs.content
    assert bytes(byte for entry in shown for byte in entry.bytes or []) == RENDERED.encode()
    assert end.bytes == [*b"<eos>"]
    streamed = list[object]()
    async for chunk in await client.chat.completions.create(**body, stream=True):
        found = chunk.choices[0].logprobs
        streamed += (found and found.content) or []
    assert streamed == logprobs.content


async def test_errors_have_their_classes(client: AsyncOpenAI, server: Site) -> None:
    """The client raises its own class for each status, with our message, code and field."""
    with pytest.raises(openai.NotFoundError, match="no task none") as absent:
        await client.completions.create(model="none", prompt="a")
    assert (absent.value.code, absent.value.type) == ("model_not_found", "not_found_error")
    assert absent.value.param == "model"
    with pytest.raises(openai.BadRequestError, match=f"context length is {MAX_TOKENS} tokens.*390 tokens") as long:
        await client.completions.create(model="base", prompt="a" * 390)
    assert (long.value.param, long.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(openai.BadRequestError, match="context length") as long:
        await client.chat.completions.create(model="base", messages=[{"role": "user", "content": "a" * 390}])
    assert (long.value.param, long.value.code) == ("messages", "context_length_exceeded")
    with pytest.raises(openai.BadRequestError, match="top_p") as field:
        await client.completions.create(model="base", prompt="a", top_p=2)
    assert field.value.param == "top_p"
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="no").models.list()
    server.engine.failure = EngineFailure("overloaded", "the queue is full")
    try:
        with pytest.raises(openai.InternalServerError, match="queue is full") as overload:
            await client.completions.create(model="base", prompt="a")
    finally:
        server.engine.failure = None
    assert overload.value.status_code == 503
    assert overload.value.response.headers["retry-after"] == str(server.engine.retry_after_s)


async def test_an_error_in_a_stream_is_raised(
    client: AsyncOpenAI, server: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error after the first chunk is raised by the client as an APIError with our message."""
    outputs = server.engine._outputs

    def broken(submit: Submit) -> list[Output]:
        made = outputs(submit)
        made[2].failure = EngineFailure("engine_restarting", "the engine died")
        return made

    monkeypatch.setattr(server.engine, "_outputs", broken)
    texts = []
    with pytest.raises(openai.APIError, match="the engine died"):
        async for chunk in await client.completions.create(model="base", prompt="abcdef", stream=True):
            texts += [chunk.choices[0].text]
    assert texts == ["a", "b"]


UNSERVED: list[tuple[str, dict[str, Any]]] = [
    ("completions", {"top_logprobs": 2}),
    ("completions", {"logprobs": True}),
    ("completions", {"max_completion_tokens": 5}),
    ("completions", {"prompt": ["a"] * 65}),
    ("completions", {"prompt": [[97]] * 65}),
    ("completions", {"prompt": ["a", 5]}),
    ("completions", {"n": 129}),
    ("completions", {"logprobs": 21}),
    ("chat/completions", {"n": 129}),
    ("chat/completions", {"top_k": -2}),
    ("chat/completions", {"logprobs": 1}),
    ("chat/completions", {"top_logprobs": 2}),
    ("chat/completions", {"logprobs": True, "top_logprobs": 21}),
    ("chat/completions", {"prompt": "a"}),
    ("chat/completions", {"max_tokens": 0}),
    ("chat/completions", {"temperature": 3}),
    ("chat/completions", {"stop": ["a"] * 5}),
]


@pytest.mark.parametrize(("route", "field"), UNSERVED)
async def test_what_is_not_served_is_named(server: Site, route: str, field: dict[str, Any]) -> None:
    """A field that a route does not have, or a value out of range, is 400 as OpenAI has it, and named."""
    body = {"model": "base"} | ({"messages": TURNS} if "chat" in route else {"prompt": "a"}) | field
    answer = await server.post(f"/v1/{route}", body)
    *_, name = field
    assert answer.status_code == 400
    assert (error_of(answer)["param"] or "").split(".")[0] == name, answer.text
    assert name in error_of(answer)["message"]


async def test_an_image_is_refused(server: Site) -> None:
    """A part that is no text is 400 and named by its place."""
    part = {"type": "image_url", "image_url": {"url": "data:"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]
    answer = await server.post("/v1/chat/completions", {"model": "base", "messages": messages})
    assert answer.status_code == 400
    assert (error_of(answer)["param"] or "").startswith("messages.0.content.1")


@pytest.mark.parametrize(("route", "needed"), [("completions", "prompt"), ("chat/completions", "messages")])
async def test_a_misspelt_field_is_named(server: Site, route: str, needed: str) -> None:
    """A field under a name that is none is refused by that name, not by the one that is missing for it."""
    answer = await server.post(f"/v1/{route}", {"model": "base", f"{needed}x": TURNS})
    assert (answer.status_code, error_of(answer)["param"]) == (400, f"{needed}x")


async def test_as_many_as_openai_has(client: AsyncOpenAI, server: Site) -> None:
    """A request may have 128 answers and 20 alternatives a token; prompts and answers together have a bound."""
    answer = await client.chat.completions.create(
        model="base", messages=TURNS, n=128, logprobs=True, top_logprobs=20, max_tokens=1
    )
    assert len(answer.choices) == 128 and server.engine.submitted[-1].sampling.logprobs == 20
    with pytest.raises(openai.BadRequestError, match=r"5 prompts with 128 answers.*over 512") as many:
        await client.completions.create(model="base", prompt=["a"] * 5, n=128)
    assert many.value.param == "n"


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
async def test_nulls_are_absent(server: Site, route: str) -> None:
    """A null in an optional field, served or not, is as if it were not there; the required ones are still required."""
    names = ["best_of", "echo", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n", "presence_penalty"]
    names += ["response_format", "seed", "stop", "stream", "stream_options", "suffix", "temperature", "tools", "user"]
    prompt: dict[str, Any] = {"messages": TURNS} if "chat" in route else {"prompt": "a"}
    answer = await server.post(f"/v1/{route}", {"model": "base", **prompt, **dict.fromkeys(names)})
    assert answer.status_code == 200, answer.text
    for required in ("model", *prompt):
        answer = await server.post(f"/v1/{route}", {"model": "base", **prompt, required: None})
        assert (answer.status_code, error_of(answer)["param"]) == (400, required)


async def test_bytes_of_a_stream(server: Site) -> None:
    """A stream is `data:` lines and [DONE], with nothing that OpenAI's would not have."""
    answer = await server.post("/v1/chat/completions", {"model": "base", "messages": TURNS, "stream": True})
    *events, done = sent(answer.text)
    assert done == ("message", "[DONE]")
    for kind, data in events:
        chunk = json.loads(data)
        assert kind == "message" and set(chunk) == {"id", "object", "created", "model", "choices"}
        assert set(chunk["choices"][0]) == {"index", "delta", "finish_reason", "logprobs"}


async def test_the_model_is_a_task_and_never_the_base(server: Site) -> None:
    """A model that is no task is 404, with any name."""
    names = (
        "",
        "BASE",
        "gpt-4",
        "a\tb",
        "x" * 63,
        "x" * 5000,
        "🎩",
        "hat@",
        "@1",
        "hat@0",
        "hat@01",
        "hat@-1",
        "hat@1@1",
    )
    for name in (*names, "hat@9", f"hat@{10**17}", f"hat@{10**30}", "hat@1\n", "hat@x"):
        answer = await server.post("/v1/completions", {"model": name, "prompt": "a"})
        assert answer.status_code == 404 and len(answer.text) < 400, name


async def test_end_of_sequence_is_not_text(server: Site) -> None:
    """The end-of-sequence token is counted and not shown."""
    answer = await server.post("/v1/completions", {"model": "base", "prompt": [97, EOS, 98]})
    assert answer.json()["choices"][0]["text"] == "ab"
