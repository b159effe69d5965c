"""An artifact's manifest: its lead is no part of answers, its sampling stands for what a request does not name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from adapters_store.base.identity import base_identity
from adapters_store.format.folder import MANIFEST
from tests.kit.adapters import zip_folder
from tests.kit.tiny import CHAT_TEMPLATE
from tests.server.world import Site, error_of, open_site

pytestmark = pytest.mark.anyio
TURNS = [{"role": "user", "content": "x"}]
FORMAT = {"user": {"before": "Q: ", "after": "\nA:"}, "assistant": {"after": "\n"}, "lead": " \n"}
ROUTES = ("/generate?task={}", "/v1/chat/completions")


async def upload(site: Site, base: Path, folder: Path, into: Path, task: str, **entries: Any) -> None:
    """Upload a copy of a folder whose manifest has entries."""
    shutil.copytree(folder, into)
    identity = {"name": "tiny", "identity": base_identity(base).identity, "weights": "b" * 64}
    (into / MANIFEST).write_text(json.dumps({"format_version": 1, "method": "lora", "base": identity, **entries}))
    assert (await site.upload(task, zip_folder(into))).status_code == 201


async def said(site: Site, route: str, task: str, answer: str, **body: Any) -> str:
    """The text of an answer that the engine writes so, plain and as a stream alike."""
    site.engine._answer = lambda _submit: [*answer.encode()]
    body = {**body, **({"model": task} if "v1" in route else {})}
    found = (await site.post(route.format(task), body)).json()["choices"][0]
    events = await site.events(route.format(task), **body)
    parts = [event["choices"][0]["delta"]["content"] if "chat" in route else event["text"] for event in events]
    whole: str = found["message"]["content"] if "chat" in route else found["text"]
    assert "".join(parts) == whole
    return whole


@pytest.mark.parametrize("route", ROUTES)
async def test_the_lead_is_no_part_of_an_answer(
    site: Site, tiny_base: Path, loras: list[Path], tmp_path: Path, route: str
) -> None:
    """An answer to turns is without the lead that it begins with, if whole; the turns that come back have it again."""
    await upload(site, tiny_base, loras[0], tmp_path / "with", "mine", prompt_format=FORMAT)
    for written, shown in ((" \nyes", "yes"), ("yes \n", "yes \n"), (" yes", " yes"), (" ", " "), (" \n \nb", " \nb")):
        assert await said(site, route, "mine", written, messages=TURNS) == shown
    assert await said(site, route, "mine", " \nab stop", messages=TURNS, stop=["stop"]) == "ab "
    await said(site, route, "mine", "a", messages=[*TURNS, {"role": "assistant", "content": "yes"}, *TURNS])
    assert bytes(site.engine.submitted[-1].prompt) == b"Q: x\nA: \nyes\nQ: x\nA:"
    assert await said(site, "/generate?task={}", "mine", " \nyes", prompt="x") == " \nyes"


async def test_the_lead_of_a_chat_template(tiny_base: Path, tmp_path: Path) -> None:
    """White space that the base's template writes before an answer is taken off, if it writes any."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    spaced = CHAT_TEMPLATE.replace("'>' + message['content']", "'> ' + message['content']")
    (base / "chat_template.jinja").write_text(spaced)
    async with open_site(base, tmp_path / "data") as site:
        assert await said(site, ROUTES[1], "base", " yes", messages=TURNS) == "yes"
    async with open_site(tiny_base, tmp_path / "plain") as site:
        assert await said(site, ROUTES[1], "base", " yes", messages=TURNS) == " yes"


DEFAULTS = {"temperature": 0.25, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.5}
PENALTIES = {"presence_penalty": 0.5, "frequency_penalty": -0.5, "stop_token_ids": [5]}


@pytest.mark.parametrize("route", [*ROUTES, "/v1/completions"])
async def test_sampling_that_is_not_named_is_the_adapters(
    site: Site, tiny_base: Path, loras: list[Path], tmp_path: Path, route: str
) -> None:
    """Each sampling field has the request's value, else the manifest's, else the route's; the base has no manifest."""
    everything = {**DEFAULTS, **PENALTIES}
    await upload(site, tiny_base, loras[0], tmp_path / "with", "mine", generation=everything)
    content: dict[str, Any] = {"prompt": "x"} if "completions" in route and "chat" not in route else {"messages": TURNS}

    async def sampling(task: str, **named: Any) -> dict[str, Any]:
        body = {**content, **named, **({"model": task} if "v1" in route else {})}
        assert (await site.post(route.format(task), body)).status_code == 200
        found = site.engine.submitted[-1].sampling
        return {name: getattr(found, name) for name in everything}

    expected = {**everything, "stop_token_ids": (5,)}
    assert await sampling("mine") == expected
    for name, value in {"temperature": 0.5, "top_p": 1.0, "top_k": 0, "stop_token_ids": [6]}.items():
        given = tuple(value) if isinstance(value, list) else value
        assert await sampling("mine", **{name: value}) == {**expected, name: given}
    assert (await sampling("base"))["temperature"] == (1.0 if "v1" in route else 0.0)


async def test_adapters_that_disagree_are_named(site: Site, tiny_base: Path, loras: list[Path], tmp_path: Path) -> None:
    """Several adapters with different defaults of a field need one that is named; equal ones do not."""
    for number, temperature in enumerate((0.0, 1e-9, 0.5)):
        folder = tmp_path / str(number)
        await upload(site, tiny_base, loras[number], folder, f"t{number}", generation={"temperature": temperature})
    body: dict[str, Any] = {"prompt": "x", "adapters": [{"task": "t0"}, {"task": "t2"}]}
    refused = await site.post("/generate", body)
    assert (refused.status_code, error_of(refused)["param"]) == (422, "temperature")
    assert (await site.post("/generate", {**body, "temperature": 1})).status_code == 200
    await site.ask("t1", prompt="x")
    assert site.engine.submitted[-1].sampling.temperature == 0.0
