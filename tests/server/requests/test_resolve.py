"""Virtual tokens take room, and adapters compose only if that means something."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from server.engine.client import require_ready
from server.engine.fake import FakeEngineClient
from server.engine.messages import Output, Submit
from tests.kit.adapters import zip_folder
from tests.kit.families.prompts import make_prefix_tuning, make_prompt_tuning
from tests.server.world import MAX_TOKENS, Site, error_of, open_site, ready_of

pytestmark = pytest.mark.anyio

SOFT, SOFTER, KV, KV_TOO = 3, 20, 20, 37  # virtual tokens of the tasks


class Counting(FakeEngineClient):
    """An engine that counts the virtual tokens of a sequence, as the real one does."""

    def _output(self, submit: Submit, token: int) -> Output:
        output = super()._output(submit, token)
        output.virtual_tokens = sum(adapter.num_virtual for adapter in submit.adapters)
        return output


@pytest.fixture(scope="module")
async def adapters(
    anyio_backend: str, tiny_base: Path, loras: list[Path], tmp_path_factory: Any
) -> AsyncIterator[Site]:
    """A server with two LoRA, two soft prompts and two prefixes of keys and values."""
    root: Path = tmp_path_factory.mktemp("hats")
    folders = {
        "lora": loras[0],
        "lora-too": loras[1],
        "soft": make_prompt_tuning(root / "soft", tiny_base, 0),
        "softer": make_prompt_tuning(root / "softer", tiny_base, 1),
        "kv": make_prefix_tuning(root / "kv", tiny_base, 1),
        "kv-too": make_prefix_tuning(root / "kv-too", tiny_base, 2),
    }
    async with open_site(tiny_base, root / "data", Counting(ready_of(tiny_base))) as site:
        for task, folder in folders.items():
            assert (await site.upload(task, zip_folder(folder))).status_code == 201
        yield site


def resolved(*adapters: tuple[str, float] | str) -> dict[str, Any]:
    """The body of a request that uses these adapters, of weight 1 if not said."""
    listed = [
        {"task": adapter} if isinstance(adapter, str) else {"task": adapter[0], "weight": adapter[1]}
        for adapter in adapters
    ]
    return {"prompt": "ab", "max_tokens": 2, "adapters": listed}


async def test_what_a_prefix_takes_is_shown(adapters: Site) -> None:
    """A task's versions show what each takes: of its files, of the device in fp32, and of a sequence."""
    shown = {task["task"]: task["versions"] for task in (await adapters.http.get("/tasks")).json()["tasks"]}
    assert [shown[task][0]["virtual_tokens"] for task in ("soft", "kv-too", "lora")] == [SOFT, KV_TOO, 0]
    (soft,) = (await adapters.http.get("/tasks/soft")).json()["versions"]
    assert (soft["method"], soft["num_parameters"], soft["slot_bytes"]) == ("prompt_tuning", SOFT * 64, SOFT * 64 * 4)
    assert soft["bytes"] > soft["slot_bytes"] and soft["residency"] == "disk"
    assert shown["kv"][0]["slot_bytes"] == KV * 2 * 2 * 32 * 4


async def test_the_hat_brings_its_virtual_tokens(adapters: Site) -> None:
    """The engine is told the virtual tokens of each adapter, and the answer counts them once a prompt."""
    answer = await adapters.ask("soft", prompt=["ab", "c"], max_tokens=2, n=2)
    (adapter,) = adapters.engine.submitted[-1].adapters
    assert (adapter.weight, adapter.num_virtual) == (1.0, SOFT)
    assert answer["usage"]["virtual_tokens"] == 2 * SOFT and answer["usage"]["prompt_tokens"] == 3
    assert (await adapters.ask("lora", prompt="ab"))["usage"]["virtual_tokens"] == 0


COMPOSED: dict[str, list[tuple[str, float] | str]] = {
    "updates of any weight": [("lora", -2.5), ("lora-too", 0.0)],
    "a soft prompt and an update": ["soft", ("lora", 0.3)],
    "an update and keys": [("lora", 7.0), "kv"],
    "soft prompts": ["softer", "soft"],
    "keys and keys": ["kv", "kv-too"],
    "keys, then a soft prompt": ["kv", ("lora", 0.5), "soft"],
}


@pytest.mark.parametrize("listed", COMPOSED.values(), ids=COMPOSED)
async def test_what_composes(adapters: Site, listed: list[tuple[str, float] | str]) -> None:
    """Updates compose with any weight, whole prefixes one after another; the engine gets all adapters in order."""
    answer = await adapters.post("/generate", resolved(*listed))
    assert answer.status_code == 200, answer.text
    expected = [adapter if isinstance(adapter, tuple) else (adapter, 1.0) for adapter in listed]
    assert [(adapter["task"], adapter["weight"]) for adapter in answer.json()["adapters"]] == expected
    virtual = {"soft": SOFT, "softer": SOFTER, "kv": KV, "kv-too": KV_TOO}
    numbers = [virtual.get(task, 0) for task, _ in expected]
    assert [adapter.num_virtual for adapter in adapters.engine.submitted[-1].adapters] == numbers
    assert answer.json()["usage"]["virtual_tokens"] == sum(numbers)


REFUSED: dict[str, tuple[list[tuple[str, float] | str], str]] = {
    "half a soft prompt": ([("soft", 0.5)], "soft puts 3 virtual tokens .* give it the weight 1, not 0.5"),
    "no soft prompt": (["lora", ("softer", 0.0)], "softer puts 20 virtual tokens .* not 0$"),
    "keys twice as much": ([("kv", 2.0), "lora"], "kv puts 20 virtual tokens .* not 2$"),
    "keys less themselves": ([("kv", -1.0)], "kv puts 20 virtual tokens .* not -1$"),
    "keys behind a soft prompt": (["soft", "kv"], r"kv \(prefix_tuning\) .* list it before the task soft"),
    "keys far behind one": (["kv-too", "softer", "lora", "kv"], r"kv \(prefix_tuning\) .* before the task softer"),
    "a task twice": ([("lora", 0.5), "soft", ("lora", 0.5)], "the task lora is listed twice"),
    "a prefix twice": (["kv", "kv"], "the task kv is listed twice"),
    "the base": (["base", "lora"], "the base is always worn"),
}


@pytest.mark.parametrize(("listed", "reason"), REFUSED.values(), ids=REFUSED)
async def test_what_does_not_compose(adapters: Site, listed: list[tuple[str, float] | str], reason: str) -> None:
    """A prefix cannot be weighed, given keys cannot see what is before, a task is listed once: 422 that says so."""
    before = len(adapters.engine.submitted)
    answer = await adapters.post("/generate", resolved(*listed))
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (422, "invalid_field", "adapters")
    assert re.search(reason, error["message"]), error["message"]
    assert len(adapters.engine.submitted) == before


async def test_virtual_tokens_take_room(adapters: Site) -> None:
    """Prompt, virtual tokens and max_tokens must fit together: what fits exactly is served, one more is 400."""
    fits = {"prompt": "a" * (MAX_TOKENS - SOFT - 5), "max_tokens": 5}
    assert (await adapters.ask("soft", **fits))["usage"]["virtual_tokens"] == SOFT
    answer = await adapters.post("/generate?task=soft", {**fits, "max_tokens": 6})
    error = error_of(answer)
    assert (answer.status_code, error["param"]) == (400, "prompt")
    for number in (MAX_TOKENS - SOFT - 5, SOFT, 6, MAX_TOKENS):
        assert f" {number}" in error["message"]
    assert (await adapters.ask("lora", **{**fits, "max_tokens": 6}))["usage"]["virtual_tokens"] == 0


async def test_two_prefixes_take_room_together(adapters: Site) -> None:
    """The virtual tokens of all adapters are counted."""
    body = resolved("kv", "softer") | {"prompt": "a" * (MAX_TOKENS - KV - SOFTER - 5)}
    assert (await adapters.post("/generate", {**body, "max_tokens": 5})).status_code == 200
    answer = await adapters.post("/generate", {**body, "max_tokens": 6})
    assert answer.status_code == 400 and f"{KV + SOFTER} virtual tokens" in error_of(answer)["message"]


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
async def test_virtual_tokens_take_room_in_openais_shape(adapters: Site, route: str) -> None:
    """Virtual tokens take room in OpenAI's shape, too."""
    text = "a" * (MAX_TOKENS - SOFT)
    asked = {"prompt": text} if route == "completions" else {"messages": [{"role": "user", "content": text}]}
    answer = await adapters.post(f"/v1/{route}", {"model": "soft", "max_tokens": 1, **asked})
    assert answer.status_code == 400 and f"{SOFT} virtual tokens" in error_of(answer)["message"]


async def test_a_chat_takes_the_rest_of_the_context(adapters: Site) -> None:
    """A chat without max_tokens has the tokens that prompt and virtual tokens leave."""
    asked = {"model": "softer", "messages": [{"role": "user", "content": "hi"}]}
    assert (await adapters.post("/v1/chat/completions", asked)).status_code == 200
    submit = adapters.engine.submitted[-1]
    assert submit.sampling.max_tokens == MAX_TOKENS - SOFTER - len(submit.prompt)


async def test_a_prefix_that_leaves_no_room_is_refused(adapters: Site, tiny_base: Path, tmp_path: Path) -> None:
    """An adapter whose virtual tokens leave no room for a prompt and an answer is 413 when it comes."""
    body, ready = zip_folder(make_prompt_tuning(tmp_path / "hat", tiny_base, 2)), require_ready(adapters.state.client)
    ready.max_sequence_tokens = 38
    try:
        answer = await adapters.upload("long", body)
        ready.max_sequence_tokens = 39
        assert (await adapters.upload("long", body)).status_code == 201
    finally:
        ready.max_sequence_tokens = MAX_TOKENS
        await adapters.http.delete("/tasks/long")
    assert (answer.status_code, error_of(answer)["code"]) == (413, "artifact_too_large")
    assert "37 virtual tokens" in error_of(answer)["message"] and "38 tokens" in error_of(answer)["message"]
