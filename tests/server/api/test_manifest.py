"""An artifact's manifest: its lead is no part of answers, its sampling stands for what a request does not name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLTokenizer

from adapters_store.base.identity import base_identity
from adapters_store.form import compile_grammar
from adapters_store.format.folder import MANIFEST
from server.core import FormSpec
from server.engine.grammar import grammar_of
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


LABELS = {"labels": ["yes", "no", " no"]}
SCHEMA = {"schema": {"type": "object"}}
FREE: list[dict[str, Any]] = [{"response_format": None}, {"response_format": {"type": "text"}}]


@pytest.mark.parametrize("route", [*ROUTES, "/v1/completions"])
async def test_answers_have_the_adapters_form(
    site: Site, tiny_base: Path, loras: list[Path], tmp_path: Path, route: str
) -> None:
    """An answer has the form that the request names, else the manifest's unless free text is asked for; base none."""
    content: dict[str, Any] = {"messages": TURNS} if route in ROUTES else {"prompt": "x"}
    for number, form in enumerate((LABELS, SCHEMA)):
        await upload(site, tiny_base, loras[number], tmp_path / str(number), f"t{number}", form=form)

    async def form_of(task: str, **named: Any) -> str | None:
        body = {**content, **named, **({"model": task} if "v1" in route else {})}
        answer = await site.post(route.format(task), body)
        assert answer.status_code == 200, answer.text
        return site.engine.submitted[-1].form

    assert await form_of("t0") == grammar_of(FormSpec("choice", LABELS["labels"], ""))
    assert await form_of("t1") == grammar_of(FormSpec("json_schema", SCHEMA["schema"], ""))
    named = {"type": "regex", "regex": "a"}
    assert await form_of("t0", response_format=named) == grammar_of(FormSpec("regex", "a", ""))
    for free in FREE:
        assert await form_of("t0", **free) is None
    assert await form_of("base") is None


async def test_several_adapters_have_a_form_that_all_carry(
    site: Site, tiny_base: Path, loras: list[Path], tmp_path: Path
) -> None:
    """Several adapters answer in a form if each of them carries it, and in free text otherwise."""
    for number, form in enumerate((LABELS, LABELS, SCHEMA)):
        await upload(site, tiny_base, loras[number], tmp_path / str(number), f"t{number}", form=form)
    for names, has_form in ((("t0", "t1"), True), (("t0", "t2"), False)):
        body = {"prompt": "x", "adapters": [{"task": name} for name in names]}
        assert (await site.post("/generate", body)).status_code == 200
        assert (site.engine.submitted[-1].form is not None) == has_form


async def test_the_lead_may_stand_before_a_form(site: Site, tiny_base: Path, loras: list[Path], tmp_path: Path) -> None:
    """The adapter's lead is allowed before its form, and is no part of the answer, be it to turns or to a prompt."""
    form = {"labels": ["yes", "no"]}
    await upload(site, tiny_base, loras[0], tmp_path / "with", "mine", prompt_format=FORMAT, form=form)
    for content in ({"messages": TURNS}, {"prompt": "Q: x\nA:"}):
        assert await said(site, ROUTES[0], "mine", " \nyes", **content) == "yes"
        matcher = compile_grammar(LLTokenizer("byte"), site.engine.submitted[-1].form or "")
        for text, fits in ((b" \nyes", True), (b"no", True), (b" yes", False)):
            copy = matcher.deep_copy()
            assert (copy.try_consume_tokens([*text]) == len(text) and copy.is_accepting()) == fits
    named = {"type": "regex", "regex": "yes"}
    assert await said(site, ROUTES[0], "mine", "yes", messages=TURNS, response_format=named) == "yes"
    assert site.engine.submitted[-1].form == grammar_of(FormSpec("regex", "yes", ""))


async def test_what_needs_no_form_has_none(site: Site, tiny_base: Path, loras: list[Path], tmp_path: Path) -> None:
    """Texts that are only scored are so by an adapter with a form, too; `ignore_eos` is refused, by its own name."""
    await upload(site, tiny_base, loras[0], tmp_path / "with", "mine", form=LABELS)
    scored = await site.post("/score?task=mine", {"prompt": "a", "continuations": ["b"]})
    echoed = await site.post("/v1/completions", {"model": "mine", "prompt": "a", "echo": True, "max_tokens": 0})
    assert (scored.status_code, echoed.status_code) == (200, 200), (scored.text, echoed.text)
    assert all(submit.form is None for submit in site.engine.submitted[-2:])
    refused = await site.post("/generate?task=mine", {"prompt": "x", "ignore_eos": True})
    assert (refused.status_code, error_of(refused)["param"]) == (400, "ignore_eos")
    assert (await site.post("/generate?task=mine", {"prompt": "x", "ignore_eos": True, **FREE[0]})).status_code == 200


async def test_a_form_that_cannot_be_served_is_refused_at_the_door(
    site: Site, tiny_base: Path, loras: list[Path], tmp_path: Path
) -> None:
    """An upload whose form has a keyword that is not served is 422 by its pointer, and nothing is kept."""
    folder = tmp_path / "with"
    shutil.copytree(loras[0], folder)
    identity = {"name": "tiny", "identity": base_identity(tiny_base).identity, "weights": "b" * 64}
    form = {"schema": {"properties": {"a": {"uniqueItems": True}}}}
    manifest = {"format_version": 1, "method": "lora", "base": identity, "form": form}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    refused = await site.upload("bad", zip_folder(folder))
    assert (refused.status_code, error_of(refused)["param"]) == (422, "form.schema#/properties/a/uniqueItems")


@pytest.mark.parametrize(
    ("path", "body", "free"),
    [
        ("/v1/responses", {"model": "mine", "input": "x"}, {"text": {"format": {"type": "text"}}}),
        (
            "/generate",
            {"inputs": "x", "parameters": {"adapter_id": "mine"}},
            {"parameters": {"adapter_id": "mine", "response_format": {"type": "text"}}},
        ),
    ],
)
async def test_every_dialect_has_the_adapters_form(
    site: Site,
    tiny_base: Path,
    loras: list[Path],
    tmp_path: Path,
    path: str,
    body: dict[str, Any],
    free: dict[str, Any],
) -> None:
    """Other dialects' answers have the adapter's form, too, unless they ask for free text in their own words."""
    await upload(site, tiny_base, loras[0], tmp_path / "with", "mine", form=LABELS)
    for fields, has_form in ((body, True), ({**body, **free}, False)):
        answer = await site.post(path, fields)
        assert answer.status_code == 200, answer.text
        assert (site.engine.submitted[-1].form is not None) == has_form


async def test_labels_of_a_form_are_told_behind_the_lead(
    site: Site, tiny_base: Path, loras: list[Path], tmp_path: Path
) -> None:
    """`label_probs` are of the task's own labels, which stand behind its lead; a request's free text has none."""
    form = {"labels": ["yes", "no"]}
    await upload(site, tiny_base, loras[0], tmp_path / "of", "mine", prompt_format=FORMAT, form=form)
    for content, prompt in (({"messages": TURNS}, b"Q: x\nA:"), ({"prompt": "x"}, b"x")):
        body: dict[str, Any] = {**content, "label_probs": True, "max_tokens": 0}
        answer = await site.ask("mine", **body)
        assert answer["choices"][0]["label_probs"].keys() == {"yes", "no"}
        told = [bytes(submit.prompt) for submit in site.engine.submitted[-2:]]
        assert told == [prompt + b" \nyes", prompt + b" \nno"]
        for free in FREE:
            assert (await site.post("/generate?task=mine", body | free)).status_code == 400
