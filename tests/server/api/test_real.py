"""End to end: the front over the real engine in a process of its own, on a tiny base."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from safetensors.torch import load_file, save_file

from adapters_store.format.folder import CONFIG, MANIFEST, WEIGHTS, read_folder
from adapters_store.format.manifest import BaseRef, Manifest
from server.engine.client import require_ready
from server.uploads.parity import TOLERANCES
from tests.kit.adapters import make_lora, zip_folder
from tests.kit.parity import parity_of
from tests.server.world import Site, error_of, serve_real, until

pytestmark = pytest.mark.anyio
BLOCK_SIZE = 32  # the setting's default


@pytest.fixture(scope="module")
async def real(
    anyio_backend: str, tiny_base: Path, loras: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Site]:
    """A server with the tasks t0, t1 and t2 over a real engine."""
    async with serve_real(tiny_base, tmp_path_factory.mktemp("real")) as site:
        for number, folder in enumerate(loras):
            assert (await site.upload(f"t{number}", zip_folder(folder))).status_code == 201
        yield site


async def tokens(site: Site, task: str, prompt: str = "Once upon", **body: Any) -> list[int]:
    """The tokens of an answer."""
    found = await site.ask(task, prompt=prompt, **{"max_tokens": 12, "ignore_eos": True, **body})
    ids: list[int] = found["choices"][0]["token_ids"]
    return ids


def idle(site: Site) -> bool:
    """Whether the engine has nothing to do and nothing is pinned."""
    stats = site.state.client.stats
    return (stats.num_running, stats.num_waiting, stats.num_pins) == (0, 0, 0)


async def test_answers_fit_their_form(real: Site) -> None:
    """Answers in a form are JSON that fits, of base and tasks, all of `n`, plain and streamed, the same each time."""
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, "two", None]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    body: dict[str, Any] = {
        "prompt": "Once upon",
        "response_format": {"type": "json_schema", "schema": schema},
        "n": 3,
        "temperature": 2.0,
        "seed": 5,
        "logprobs": 1,
    }
    for task in ("base", "t0"):
        first, second = await real.ask(task, **body), await real.ask(task, **body)
        texts = [choice["text"] for choice in first["choices"]]
        assert first["choices"] == second["choices"] and {json.loads(text)["a"] for text in texts} <= {1, "two", None}
        assert {choice["finish_reason"] for choice in first["choices"]} == {"stop"}
        events = await real.events(f"/generate?task={task}", **body)
        assert ["".join(event["text"] for event in events if event["index"] == index) for index in range(3)] == texts
    assert await tokens(real, "base") == await tokens(real, "base")


async def test_hats_alone_and_together(real: Site) -> None:
    """Base and tasks answer differently, the same each time, alone and among each other, greedy and seeded.

    A task's residency is a slot once it has answered.
    """
    tasks = ["base", "t0", "t1", "t2"]
    bodies: list[dict[str, Any]] = [{}, {"temperature": 0.8, "seed": 11}]
    for body in bodies:
        alone = {task: await tokens(real, task, **body) for task in tasks}
        assert len({tuple(ids) for ids in alone.values()}) == 4
        together = await asyncio.gather(*(tokens(real, task, **body) for task in tasks * 3))
        assert together == [alone[task] for task in tasks * 3]
    versions = [task["versions"][0] for task in (await real.http.get("/tasks")).json()["tasks"][1:]]
    assert [version["residency"] for version in versions] == ["slot"] * 3


async def test_stream_equals_plain(real: Site) -> None:
    """Bytes of all kinds: stream and plain are equal, with stop texts out of the answer and with none."""
    for number in range(12):
        body: dict[str, Any] = {"prompt": f"prompt {number} 🎩", "max_tokens": 40, "temperature": 1.5, "seed": number}
        plain = (await real.ask("t0", **body))["choices"][0]
        if len(plain["text"]) > 8 and number % 2:
            body["stop"] = [plain["text"][5:7]]
            stopped = (await real.ask("t0", **body))["choices"][0]
            assert stopped["text"] == plain["text"][: plain["text"].index(body["stop"][0])]
            plain = stopped
        events = await real.events("/generate?task=t0", **body)
        assert "".join(event["text"] for event in events) == plain["text"]
        assert [token for event in events for token in event["token_ids"]] == plain["token_ids"]


async def test_several_hats(real: Site, loras: list[Path]) -> None:
    """Weights count: an adapter of weight 0 is the base, one alone its task, and two equal ones at a half are one."""
    await real.upload("t0-again", zip_folder(loras[0]))
    prompt = {"prompt": "Once upon", "max_tokens": 12, "ignore_eos": True}

    async def worn(*adapters: tuple[str, float]) -> list[int]:
        listed = [{"task": task, "weight": weight} for task, weight in adapters]
        answer = await real.post("/generate", {**prompt, "adapters": listed})
        assert answer.status_code == 200, answer.text
        ids: list[int] = answer.json()["choices"][0]["token_ids"]
        return ids

    base, alone = await tokens(real, "base"), await tokens(real, "t0")
    assert await worn(("t0", 0.0)) == base
    assert await worn(("t0", 1.0)) == alone
    assert await worn(("t0", 1.0), ("t1", 0.0)) == alone
    assert await worn(("t0", 0.5), ("t0-again", 0.5)) == alone
    assert await worn(("t0", 1.0), ("t1", 1.0)) not in (base, alone)
    await real.http.delete("/tasks/t0-again")


async def test_beginnings_that_were_asked_before_are_told(real: Site) -> None:
    """A plain prompt, chat turns, token ids and OpenAI's completions, of the base and of a task, find what was asked
    before of the same adapter but for their last token; `usage` and the metrics say how many tokens that were."""
    before, counted = await counters(real), 0
    for task in ("base", "t0"):
        text = "".join(f"{number} and so on, " for number in range(20))[: 2 * BLOCK_SIZE + 5]
        asked: list[dict[str, Any]] = [{"prompt": text}, {"messages": [{"role": "user", "content": text}]}]
        asked.append({"prompt_token_ids": [*text.encode()][::-1]})
        for body in asked:
            first, second = [(await real.ask(task, max_tokens=1, **body))["usage"] for _ in range(2)]
            assert first["cached_tokens"] < 5, (task, body)  # a first letter or so may be alike
            assert second["cached_tokens"] == second["prompt_tokens"] - 1, (task, body)
            counted += first["cached_tokens"] + second["cached_tokens"]
        answer = await real.post("/v1/completions", {"model": task, "prompt": text, "max_tokens": 1})
        assert answer.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": len(text) - 1}
        several = await real.ask(task, prompt=[text, text[::-1], text[:BLOCK_SIZE]], max_tokens=1)
        assert several["usage"]["cached_tokens"] == 2 * (len(text) - 1) + BLOCK_SIZE - 1
        counted += 3 * (len(text) - 1) + BLOCK_SIZE - 1
    grown = {name: value - before[name] for name, value in (await counters(real)).items()}
    assert grown["manyhats_cached_prompt_tokens_total"] == counted
    await until(lambda: real.state.client.stats.cache_hit_tokens_total >= counted)
    grown = {name: value - before[name] for name, value in (await counters(real)).items()}
    assert grown["manyhats_engine_cache_hit_tokens_total"] == counted
    assert grown["manyhats_engine_cache_query_tokens_total"] == grown["manyhats_prompt_tokens_total"] > counted


async def counters(site: Site) -> dict[str, float]:
    """The counters of tokens of prompts, summed over tasks."""
    names = ("prompt_tokens", "cached_prompt_tokens", "engine_cache_hit_tokens", "engine_cache_query_tokens")
    sums = {f"manyhats_{name}_total": 0.0 for name in names}
    for line in (await site.http.get("/metrics")).text.splitlines():
        name, value = line.rsplit(" ", 1)
        if name.partition("{")[0] in sums:
            sums[name.partition("{")[0]] += float(value)
    return sums


async def test_without_the_prefix_cache_nothing_is_shared(tiny_base: Path, tmp_path: Path) -> None:
    """An equal prompt is computed anew if the cache is off, and answered alike."""
    async with serve_real(tiny_base, tmp_path, prefix_cache=False) as site:
        answers = [await site.ask(prompt="abc" * BLOCK_SIZE, max_tokens=8) for _ in range(2)]
        assert [answer["usage"]["cached_tokens"] for answer in answers] == [0, 0]
        assert answers[0]["choices"] == answers[1]["choices"]


EXTREMES: list[dict[str, Any]] = [
    {"temperature": 1e-45},
    {"temperature": 1e-3},
    {"temperature": 100},
    {"temperature": 1, "top_k": 2**31 - 1},
    {"temperature": 1, "top_p": 5e-324},
    {"temperature": 1, "min_p": 1},
    {"temperature": 1e-3, "repetition_penalty": 0.01},
    {"temperature": 1, "repetition_penalty": 10},
    {"temperature": 1, "presence_penalty": 2, "frequency_penalty": -2, "logit_bias": {"258": 100, "0": -100}},
    {"temperature": 1, "logit_bias": {str(token): -100 for token in range(259)}},
    {"temperature": 1, "seed": -(2**63)},
    {"logprobs": 5, "temperature": 1, "top_k": 1},
]


async def test_extreme_sampling_hurts_nobody(real: Site) -> None:
    """Every value of a sampling field that is taken is answered, and the neighbours' tokens are what they were."""
    before = await tokens(real, "t1")
    starts = real.process.num_starts
    for body in EXTREMES:
        got, neighbour = await asyncio.gather(tokens(real, "t0", max_tokens=5, **body), tokens(real, "t1"))
        assert len(got) == 5 and neighbour == before, body
    assert real.process.num_starts == starts


async def test_logprobs_are_numbers(real: Site) -> None:
    """Log-probabilities are finite, the top is in order, and the greedy token is the first of it."""
    choice = (await real.ask("t0", prompt="a", logprobs=5, max_tokens=6))["choices"][0]
    assert len(choice["logprobs"]) == len(choice["token_ids"])
    for entry in choice["logprobs"]:
        values = [top["logprob"] for top in entry["top"]]
        assert values == sorted(values, reverse=True) and -100 < values[-1] <= values[0] <= 0
        assert entry["top"][0]["token_id"] == entry["token_id"]


async def test_deadline(real: Site) -> None:
    """A request that is late is 504, and frees everything."""
    answer = await real.post(
        "/generate?task=t0", {"prompt": "a", "max_tokens": 590, "ignore_eos": True, "timeout_s": 0.02}
    )
    assert (answer.status_code, error_of(answer)["code"]) == (504, "deadline_exceeded")
    await until(lambda: idle(real))


async def test_overload(real: Site) -> None:
    """Requests beyond those that run and wait are refused at once with 503 and Retry-After; the others are answered."""
    body = {"prompt": "a", "max_tokens": 590, "ignore_eos": True}
    answers = await asyncio.gather(*(real.post("/generate?task=t0", body) for _ in range(60)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 0 < len(refused) < 60
    assert {(answer.status_code, error_of(answer)["code"]) for answer in refused} == {(503, "overloaded")}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert (
        len({answer.text.split('"token_ids"')[1].split("]")[0] for answer in answers if answer.status_code == 200}) == 1
    )
    await until(lambda: idle(real))


async def test_whoever_leaves_frees_the_engine(real: Site) -> None:
    """A client that hangs up, plain or stream, frees what its sequences held."""
    body = {"prompt": "a" * 50, "max_tokens": 500, "ignore_eos": True, "n": 3}
    asking = asyncio.create_task(real.post("/generate?task=t0", body))
    await until(lambda: real.state.client.stats.num_running == 3)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await until(lambda: idle(real))
    async with real.http.stream("POST", "/generate?task=t1", json={**body, "stream": True}) as answer:
        async for _ in answer.aiter_lines():
            break
    await until(lambda: idle(real))


async def test_deleted_while_it_runs(real: Site, tiny_base: Path, tmp_path: Path) -> None:
    """A stream goes on after its task was deleted, and its tokens are what they would have been."""
    body = zip_folder(make_lora(tmp_path / "gone", tiny_base, 77, r=3))
    await real.upload("gone", body)
    asked = {"prompt": "Once upon", "max_tokens": 150, "ignore_eos": True}
    before = (await real.ask("gone", **asked))["choices"][0]["text"]
    running = asyncio.create_task(real.events("/generate?task=gone", **asked))
    await until(lambda: real.state.client.stats.num_running)
    assert (await real.http.delete("/tasks/gone")).status_code == 204
    assert (await real.post("/generate?task=gone", {"prompt": "a"})).status_code == 404
    assert "".join(event["text"] for event in await running) == before
    await until(lambda: len(real.state.stores.blobs.digests()) == 3)
    assert (await real.upload("gone", body)).json()["version"] == 2
    assert (await real.ask("gone", **asked))["choices"][0]["text"] == before
    await real.http.delete("/tasks/gone")


async def test_an_adapter_whose_numbers_overflow(real: Site, loras: list[Path], tmp_path: Path) -> None:
    """An adapter that makes logits that are no numbers is refused at the door, by its name; nobody notices."""
    before = await tokens(real, "t1")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / CONFIG).write_bytes((loras[0] / CONFIG).read_bytes())
    save_file({name: tensor * 1e30 for name, tensor in load_file(loras[0] / WEIGHTS).items()}, bad / WEIGHTS)
    stored = real.stored()
    wrong, right = await asyncio.gather(real.upload("bad", zip_folder(bad)), tokens(real, "t1"))
    assert (wrong.status_code, error_of(wrong)["code"]) == (422, "probe_failed")
    assert read_folder(bad).digest[:12] in error_of(wrong)["message"]
    assert right == before and real.stored() == stored
    assert read_folder(bad).digest not in await real.state.client.residency()


@pytest.mark.parametrize("strength", [1.0, 1.05])
async def test_parity_decides(real: Site, tiny_base: Path, tmp_path: Path, strength: float) -> None:
    """An adapter that answers as for its trainer is taken, with the figure; 5% more of it is refused with it."""
    folder = make_lora(tmp_path / "hat", tiny_base, 91, r=2)
    parity = parity_of(tiny_base, folder, [[*b"a"], [*b"what is it?"], [*range(60)]])
    base = BaseRef("tiny", require_ready(real.state.client).spec.identity, "b" * 64)
    manifest = msgspec.json.encode(Manifest(1, "lora", base, parity=parity))
    save_file({n: t * strength for n, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    (folder / MANIFEST).write_bytes(manifest)
    answer = await real.upload(f"parity-{strength * 100:.0f}", zip_folder(folder))
    if strength == 1.0:
        assert answer.status_code == 201, answer.text
        check = answer.json()["checks"][-1]
        assert (check["name"], check["ok"], check["limit"]) == ("parity", True, TOLERANCES["fp32"])
        assert 0 <= check["figure"] < TOLERANCES["fp32"] / 4
    else:
        assert (answer.status_code, error_of(answer)["code"]) == (422, "parity_failed")
        assert f"{TOLERANCES['fp32']:g} is allowed at fp32" in error_of(answer)["message"]


async def test_an_artifact_that_was_damaged(real: Site, tiny_base: Path, tmp_path: Path) -> None:
    """An artifact whose bytes changed on the disk is never served: 503, and the server stays well."""
    before = await tokens(real, "t2")
    uploaded = await real.upload("hurt", zip_folder(make_lora(tmp_path / "hurt", tiny_base, 78, r=3)))
    path = real.state.stores.blobs.path(uploaded.json()["digest"]) / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    real.state.client.discard(uploaded.json()["digest"])  # the door's probe left it in a slot
    answer = await real.post("/generate?task=hurt", {"prompt": "a"})
    assert (answer.status_code, error_of(answer)["code"]) == (503, "artifact_corrupt")
    assert await tokens(real, "t2") == before
    await real.http.delete("/tasks/hurt")


async def test_metrics_of_a_real_engine(real: Site) -> None:
    """The engine's counters move, and its process's memory is there."""
    await tokens(real, "t0")
    await until(lambda: idle(real))
    lines = dict(line.rsplit(" ", 1) for line in (await real.http.get("/metrics")).text.splitlines() if line[0] != "#")
    assert float(lines["manyhats_engine_tokens_total"]) > 0 and float(lines["manyhats_engine_loads_total"]) >= 3
    assert float(lines['manyhats_resident_bytes{process="engine"}']) > 1e7
    assert float(lines["manyhats_engine_num_pins"]) == 0


async def test_the_engine_is_killed(real: Site) -> None:
    """Answers that run when the engine dies, plain and streamed, greedy, sampled and in a form, end as they do alone.

    Meanwhile `ready` is 503, and new requests are told when to come back. Nothing that was stored is lost.
    """
    body: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True, "logprobs": 1}
    form = {"type": "regex", "regex": "(abcd|efgh|ijkl){50}"}
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9, "top_p": 0.8, "seed": 3},
        {"temperature": 1.2, "frequency_penalty": 1.5, "seed": 4},
        {"temperature": 2.0, "seed": 5, "ignore_eos": False, "response_format": form},
    ]
    bodies = [(task, body | kind) for task in ("base", "t0") for kind in kinds]
    alone = [(await real.ask(task, prompt="a", **asked))["choices"][0] for task, asked in bodies]
    plain = [asyncio.create_task(real.ask(task, prompt="a", **asked)) for task, asked in bodies]
    streams = [
        asyncio.create_task(real.events(f"/generate?task={task}", prompt="a", **asked)) for task, asked in bodies
    ]
    before = real.state.client.stats.tokens_total
    await until(lambda: real.state.client.stats.tokens_total > before + 200)
    pid = real.process.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: real.state.client.ready is None)
    assert (await real.http.get("/health/ready")).status_code == 503
    assert (await real.http.get("/health/live")).status_code == 200
    refused = await real.post("/generate?task=t0", {"prompt": "a"})
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    assert [(await answer)["choices"][0] for answer in plain] == alone
    for events, whole in zip([await stream for stream in streams], alone, strict=True):
        assert "".join(event["text"] for event in events) == whole["text"]
        assert [token for event in events for token in event["token_ids"]] == whole["token_ids"]
    assert real.process.pid != pid
    assert 1 <= real.state.client.stats.resumed_requests_total <= 16
