"""vLLM's shape: tokens of texts and turns and back, the version, a ping; as its clients and gateways ask."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.server.api.test_manifest import FORMAT, upload
from tests.server.world import MAX_TOKENS, Site, error_of, open_site

pytestmark = pytest.mark.anyio
TURNS = [{"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "hi🎩"}]}]


async def tokens_of(site: Site, **body: object) -> dict[str, Any]:
    """The answer of POST /tokenize, which must be 200."""
    answer = await site.post("/tokenize", body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize("text", ["", "a", "héllo 🎩", " two  spaces ", "<eos>x"])
async def test_tokens_of_a_prompt(shared: Site, text: str) -> None:
    """A prompt's tokens are those that an answer to it begins from, and go back to its text."""
    found = await tokens_of(shared, model="base", prompt=text)
    assert found == {
        "count": len(found["tokens"]),
        "max_model_len": MAX_TOKENS,
        "tokens": found["tokens"],
        "token_strs": None,
    }
    if text:
        await shared.ask(prompt=text, max_tokens=1)
        assert shared.engine.submitted[-1].prompt == found["tokens"]
    assert (await shared.post("/detokenize", {"tokens": found["tokens"]})).json() == {"prompt": text}


@pytest.mark.parametrize("model", ["base", "one", "one@1"])
async def test_tokens_of_turns(shared: Site, model: str) -> None:
    """Turns are written as for an answer of the model."""
    found = await tokens_of(shared, model=model, messages=TURNS)
    answer = await shared.post("/v1/chat/completions", {"model": model, "messages": TURNS, "max_tokens": 1})
    assert answer.status_code == 200
    assert shared.engine.submitted[-1].prompt == found["tokens"] and found["count"] > 10


async def test_turns_in_the_format_of_a_task(site: Site, tiny_base: Path, loras: list[Path], tmp_path: Path) -> None:
    """Turns for a task that was trained with a format are written in it."""
    await upload(site, tiny_base, loras[0], tmp_path / "with", "mine", prompt_format=FORMAT)
    ids = (await tokens_of(site, model="mine", messages=[{"role": "user", "content": "hi"}]))["tokens"]
    assert (await site.post("/detokenize", {"tokens": ids})).json()["prompt"] == "Q: hi\nA:"


async def test_names_of_tokens(shared: Site) -> None:
    """With `return_token_strs` each token has the name that the vocabulary has."""
    found = await tokens_of(shared, prompt="a b", return_token_strs=True)
    assert found["token_strs"] == [shared.state.tokenizer.token_name(one) for one in found["tokens"]]
    assert len(found["token_strs"]) == found["count"] == 3


@pytest.mark.parametrize("is_text", [True, False])
async def test_special_tokens_are_added_unless_it_is_said(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, is_text: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `add_special_tokens` a prompt has only its own tokens, here and in completions."""
    async with open_site(tiny_base, tmp_path, prompt_control_tokens=is_text) as site:
        asked: list[bool] = []
        encode = site.state.tokenizer.encode

        def note(text: str, has_special: bool = True) -> list[int]:
            asked.append(has_special)
            return encode(text, has_special)

        monkeypatch.setattr(site.state.tokenizer, "encode", note)
        for fields in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}):
            await tokens_of(site, prompt="a", **fields)
            answer = await site.post("/v1/completions", {"model": "base", "prompt": "a", "max_tokens": 1, **fields})
            assert answer.status_code == 200, answer.text
        assert asked == [True, True, True, True, False, False]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": TURNS}, 400, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, 400, "prompt"),
        ("/tokenize", {"model": "none", "prompt": "a"}, 404, "model"),
        ("/tokenize", {"model": "one@7", "prompt": "a"}, 404, "model"),
        ("/tokenize", {"messages": TURNS, "add_special_tokens": True}, 400, "add_special_tokens"),
        ("/tokenize", {"messages": TURNS, "continue_final_message": True}, 400, "continue_final_message"),
        ("/tokenize", {"messages": TURNS, "chat_template": "x"}, 400, "chat_template"),
        ("/tokenize", {"prompt": "a", "wishes": 1}, 400, "wishes"),
        ("/tokenize", {"prompt": "a" * 10**6}, 400, "prompt"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens.0"),
        ("/detokenize", {"tokens": [10**9]}, 400, "tokens"),
        ("/detokenize", {"model": "none", "tokens": [1]}, 404, "model"),
        ("/detokenize", {"tokens": [1], "wishes": 1}, 400, "wishes"),
    ],
)
async def test_what_is_refused(shared: Site, path: str, body: dict[str, Any], status: int, param: str) -> None:
    """A body that cannot be meant is refused by the field, with OpenAI's statuses."""
    answer = await shared.post(path, body)
    assert (answer.status_code, error_of(answer)["param"]) == (status, param), answer.text


async def test_neutral_values_of_vllm(shared: Site) -> None:
    """The fields of vLLM's own client are taken with the values that ask for nothing."""
    fields = {"add_generation_prompt": True, "continue_final_message": False, "add_special_tokens": False}
    plain = await tokens_of(shared, messages=TURNS)
    assert await tokens_of(shared, messages=TURNS, **fields, chat_template=None, tools=[]) == plain


async def test_the_version(shared: Site) -> None:
    """GET /version says which this server is."""
    assert (await shared.http.get("/version")).json() == {"version": version("manyhats")}


@pytest.mark.parametrize("verb", ["GET", "POST"])
async def test_a_ping(site: Site, verb: str) -> None:
    """A ping is answered as /health is: 200 only while new work is taken."""
    assert (await site.http.request(verb, "/ping")).status_code == 200
    site.engine.die()
    answer = await site.http.request(verb, "/ping")
    assert (answer.status_code, answer.json()) == (503, (await site.http.get("/health")).json())
