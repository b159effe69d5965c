"""Ends: an answer stops at the base's end tokens, its adapters', the tokenizer's and the request's, and shows none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from adapters_store.base.identity import base_identity
from adapters_store.format.folder import MANIFEST
from tests.kit.adapters import zip_folder
from tests.kit.tiny import EOS, PAD
from tests.server.world import Site, error_of

pytestmark = pytest.mark.anyio
PLAIN = ord("|")  # a token with a text of its own, which ends answers here
ROUTES = ("/generate?task={}", "/v1/completions", "/v1/chat/completions")


@contextmanager
def writing(site: Site, tokens: list[int], ends: list[int]) -> Iterator[None]:
    """Let the engine write these tokens, whatever it is asked, over a base with these end tokens."""
    ready, answer = site.engine._description, site.engine._answer
    before, site.engine._answer = ready.eos_token_ids, lambda _submit: tokens
    ready.eos_token_ids = ends
    try:
        yield
    finally:
        ready.eos_token_ids, site.engine._answer = before, answer


async def asked(site: Site, route: str, task: str = "base", **fields: Any) -> tuple[str, str]:
    """The text and the finish reason of an answer by a route, plain and as a stream alike."""
    content = {"messages": [{"role": "user", "content": "x"}]} if "chat" in route else {"prompt": "x"}
    body = content | ({"model": task} if "v1" in route else {}) | fields
    answer = await site.post(route.format(task), body)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    found = choice["message"]["content"] if "chat" in route else choice["text"]
    events = await site.events(route.format(task), **body)
    parts = [event["choices"][0] if "v1" in route else event for event in events]
    texts = [part["delta"]["content"] if "chat" in route else part["text"] for part in parts]
    assert "".join(texts) == found and parts[-1]["finish_reason"] == choice["finish_reason"]
    return found, choice["finish_reason"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("end", [EOS, PAD, PLAIN])
async def test_an_end_token_ends_and_is_not_shown(shared: Site, route: str, end: int) -> None:
    """Every end of the base and every token of `stop_token_ids` ends an answer and is no text, special or not."""
    with writing(shared, [*b"ab", end, *b"cd"], [end]):
        assert await asked(shared, route) == ("ab", "stop")
    with writing(shared, [*b"ab", end, *b"cd"], [7]):
        assert await asked(shared, route, stop_token_ids=[9, end]) == ("ab", "stop")
        assert await asked(shared, route, stop_token_ids=[end], ignore_eos=True) == ("ab", "stop")


@pytest.mark.parametrize("route", ROUTES)
async def test_a_stop_text_that_is_a_special_token(shared: Site, route: str) -> None:
    """A stop text that is the text of a special token ends an answer at that token, which has no text in it."""
    with writing(shared, [*b"ab", PAD, *b"cd"], [7]):
        assert await asked(shared, route, stop=["<pad>"]) == ("ab", "stop")
        assert await asked(shared, route) == ("abcd", "length")
    with writing(shared, [*b"a<pad>b"], [7]):
        assert await asked(shared, route, stop=["<pad>"]) == ("a", "stop")


@pytest.mark.parametrize("route", ROUTES)
async def test_the_tokenizers_end_ends_too(shared: Site, route: str) -> None:
    """The tokenizer's own end ends an answer although no config names it; `ignore_eos` passes over it."""
    with writing(shared, [*b"ab", EOS, *b"cd"], [7]):
        assert await asked(shared, route) == ("ab", "stop")
        assert await asked(shared, route, ignore_eos=True) == ("abcd", "length")


def with_ends(folder: Path, base: Path, into: Path, ends: list[int]) -> bytes:
    """A zip of a copy of a folder, whose manifest names ends."""
    shutil.copytree(folder, into)
    identity = {"name": "tiny", "identity": base_identity(base).identity, "weights": "b" * 64}
    (into / MANIFEST).write_text(json.dumps({"format_version": 1, "method": "lora", "base": identity, "ends": ends}))
    return zip_folder(into)


@pytest.mark.parametrize("route", ROUTES)
async def test_an_adapter_ends_as_it_was_trained(
    site: Site, tiny_base: Path, loras: list[Path], tmp_path: Path, route: str
) -> None:
    """A task ends at the tokens of its manifest, which the upload's checks name; the base and other tasks do not."""
    answer = await site.upload("mine", with_ends(loras[0], tiny_base, tmp_path / "with", [PLAIN, PAD]))
    assert "124, 258" in next(check["detail"] for check in answer.json()["checks"] if check["name"] == "ends")
    await site.upload("other", zip_folder(loras[1]))
    with writing(site, [*b"ab|cd"], [7]):
        assert await asked(site, route, "mine") == ("ab", "stop")
        assert await asked(site, route, "mine", ignore_eos=True) == ("ab|cd", "length")
        assert await asked(site, route, "other") == await asked(site, route) == ("ab|cd", "length")


async def test_an_end_that_is_no_token_is_refused(
    site: Site, tiny_base: Path, loras: list[Path], tmp_path: Path
) -> None:
    """An artifact that was trained to end with a token that the base does not have is refused, and told why."""
    answer = await site.upload("mine", with_ends(loras[0], tiny_base, tmp_path / "with", [EOS, 259]))
    assert (answer.status_code, error_of(answer)["param"]) == (422, "ends")
    assert "its answers would not end" in error_of(answer)["message"]
