"""Metrics: the engine's state, and tasks by their names, of which no request can make more."""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.core import EngineFailure, ForwardReport, FusedCount
from server.engine.fake import FakeEngineClient
from server.engine.messages import Stats
from server.metrics import MAX_TASKS, MAX_VERSIONS, Metrics
from tests.server.world import Site, open_site, ready_of


def parsed(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """{sample name: {labels: value}}."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def tasks_of(text: str) -> set[str]:
    """The values of the label `task`."""
    return set(re.findall(r'task="([^"]*)"', text))


def test_every_field_of_the_engine() -> None:
    """Every gauge and counter of the engine is there, by its name and kind; and both processes' memory."""
    stats = Stats(num_running=3, steps_total=7, stall_seconds_total=0.5)
    text = Metrics(lambda: stats, os.getpid).render().decode()
    found = parsed(text)
    for name in Stats.__struct_fields__:
        assert found[f"manyhats_engine_{name}"][()] == getattr(stats, name)
        kind = "counter" if name.endswith("_total") else "gauge"
        assert f"# TYPE manyhats_engine_{name} {kind}" in text
    memory = found["manyhats_resident_bytes"]
    assert memory[("process", "front"),] > 1e6 and memory[("process", "engine"),] > 1e6


@pytest.mark.parametrize("pid", [None, 2**22 + 1])
def test_an_engine_that_is_gone(pid: int | None) -> None:
    """The rest of the metrics is there without an engine, also if its process has just died."""
    found = parsed(Metrics(Stats, lambda: pid).render().decode())
    memory = found["manyhats_resident_bytes"]
    assert memory[("process", "front"),] > 1e6
    assert memory.get((("process", "engine"),), 0.0) == 0.0


def test_the_number_of_tasks_is_bounded() -> None:
    """Beyond `MAX_TASKS` names all others share one label; those that have one keep it."""
    metrics = Metrics(Stats, lambda: None)
    labels = [metrics.label(f"t{number}") for number in range(MAX_TASKS + 50)]
    assert labels[:MAX_TASKS] == [f"t{number}" for number in range(MAX_TASKS)]
    assert set(labels[MAX_TASKS:]) == {"_other"}
    assert metrics.label("t0") == "t0"


@pytest.mark.anyio
async def test_what_a_request_counts(anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes]) -> None:
    """A request counts once, with its tokens and times, under its task and status; usage the same."""
    async with open_site(tiny_base, tmp_path) as site:
        await site.upload("hat", zips[0])
        await site.ask("hat", prompt="abcd", max_tokens=3)
        await site.ask("hat", prompt="abcd", max_tokens=3, n=2)
        found = parsed((await site.http.get("/metrics")).text)
    task = ("task", "hat")
    assert found["manyhats_requests_total"] == {(("status", "200"), task): 2.0}
    assert found["manyhats_prompt_tokens_total"][task,] == 8
    assert found["manyhats_completion_tokens_total"][task,] == 9
    names = ["request_seconds", "time_to_first_token_seconds", "queue_seconds", "adapter_wait_seconds"]
    assert all(found[f"manyhats_{name}_count"][task,] == 2 for name in names)
    assert found["manyhats_inter_token_seconds_count"][task,] == 3 * 2
    assert found["manyhats_time_to_first_token_seconds_sum"][task,] == pytest.approx(0.004)


@pytest.mark.anyio
async def test_what_fails_is_counted_and_not_billed(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """A request that the engine refuses counts under its status; its tokens are nobody's."""
    async with open_site(tiny_base, tmp_path) as site:
        site.engine.failure = EngineFailure("overloaded", "the queue is full")
        assert (await site.post("/generate?task=base", {"prompt": "abcd"})).status_code == 503
        found = parsed((await site.http.get("/metrics")).text)
        assert found["manyhats_requests_total"] == {(("status", "503"), ("task", "base")): 1.0}
        assert "manyhats_prompt_tokens_total" not in found
        site.state.usage.flush(site.state.stores.registry)
        assert site.state.stores.registry.usage("default") == []


@pytest.mark.anyio
async def test_every_answer_is_counted(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """Every answer, a refusal before any work too, counts under its route's pattern and its status."""
    async with open_site(tiny_base, tmp_path) as site:
        await site.ask(prompt="a")
        for number in range(3):
            await site.post(f"/generate?task=none{number}", {"prompt": "a"})
            await site.http.get(f"/tasks/none{number}")
            await site.http.get(f"/nothing{number}")
        await site.post("/generate?task=base", "{")
        await site.http.put("/tasks")
        found = parsed((await site.http.get("/metrics")).text)
    assert {tuple(dict(key).values()): count for key, count in found["manyhats_http_responses_total"].items()} == {
        ("/generate", "200"): 1,
        ("/generate", "404"): 3,
        ("/generate", "400"): 1,
        ("/tasks/{task}", "404"): 3,
        ("/tasks", "405"): 1,
        ("none", "404"): 3,
    }


async def ask_for(site: Site, name: str) -> None:
    """Ask for a name by every way that there is."""
    await site.post(f"/generate?task={name}", {"prompt": "a"})
    await site.post("/generate", {"prompt": "a", "adapters": [{"task": name}]})
    await site.post("/v1/completions", {"model": name, "prompt": "a"})
    await site.upload(name, b"nothing")
    await site.http.get(f"/tasks/{name}")


@pytest.mark.anyio
async def test_no_request_makes_a_label(anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes]) -> None:
    """Names that are no task never become labels; mixtures of tasks, however many, share one."""
    async with open_site(tiny_base, tmp_path) as site:
        for task, body in zip("abc", zips, strict=True):
            await site.upload(task, body)
        for number in range(20):
            await ask_for(site, f"unknown{number}")
        for first in "abc":
            for second in "abc".replace(first, ""):
                adapters = [{"task": first}, {"task": second}]
                assert (await site.post("/generate", {"prompt": "x", "adapters": adapters})).status_code == 200
        assert (await site.post("/generate", {"prompt": "x", "adapters": [{"task": "b"}]})).status_code == 200
        assert tasks_of((await site.http.get("/metrics")).text) == {"_several", "b"}


@pytest.mark.anyio
async def test_usage_survives_a_registry_that_fails(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Usage that could not be written is kept, and written with the next; at the end nothing is lost."""

    def broken(*_args: object, **_counts: object) -> None:
        raise OSError("no")

    async with open_site(tiny_base, tmp_path) as site:
        with monkeypatch.context() as patch:
            patch.setattr(site.state.stores.registry, "add_usages", broken)
            await site.ask(prompt="ab")
            assert site.state.stores.registry.usage("default") == []
        await site.ask(prompt="abc")
    async with open_site(tiny_base, tmp_path) as site:
        (usage,) = site.state.stores.registry.usage("default")
        assert (usage.requests, usage.prompt_tokens, usage.completion_tokens) == (2, 5, 7)


def test_series_of_versions_are_bounded() -> None:
    """Versions come without end: the ones that were used last have series, and those of older ones go."""
    metrics = Metrics(Stats, lambda: None)
    for number in range(1, MAX_VERSIONS + 11):
        labels = metrics.version_label("a", number)
        metrics.version_requests.labels(*labels, "200").inc()
        metrics.version_ttft.labels(*labels).observe(0.1)
    seen = metrics.render().decode()
    assert seen.count("manyhats_version_requests_total{") == MAX_VERSIONS
    assert seen.count("manyhats_version_time_to_first_token_seconds_count{") == MAX_VERSIONS
    assert 'version="10"' not in seen and 'version="11"' in seen


FORWARD = ForwardReport(
    backend="cpu",
    precision="fp16",
    num_threads=2,
    num_layers=4,
    attentions=FusedCount(4, 4),
    gated_blocks=FusedCount(1, 4),
    norms=FusedCount(0, 0),
    is_whole_decoder=False,
    is_direct=True,
)


@pytest.mark.anyio
async def test_what_a_base_runs_as(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """What the engine says of the base's forward is in /health/ready and in two gauges, and gone without an engine."""
    engine = FakeEngineClient(msgspec.structs.replace(ready_of(tiny_base), forward=FORWARD))
    async with open_site(tiny_base, tmp_path, engine) as site:
        ready = (await site.http.get("/health/ready")).json()["forward"]
        found = parsed((await site.http.get("/metrics")).text)
        engine.die()
        assert not any("forward" in name for name in parsed((await site.http.get("/metrics")).text))
    assert ready["backend"] == "cpu" and ready["gated_blocks"] == {"fused": 1, "total": 4}
    assert ready["is_direct"] and not ready["is_whole_decoder"] and ready["num_threads"] == 2
    ratios = {dict(labels)["part"]: value for labels, value in found["manyhats_forward_fused_ratio"].items()}
    assert ratios == {"attentions": 1.0, "gated_blocks": 0.25, "whole_decoder": 0.0, "direct_forward": 1.0}
    labels = (("backend", "cpu"), ("precision", "fp16"), ("threads", "2"))
    assert found["manyhats_forward_info"] == {labels: 1.0}


@pytest.mark.anyio
async def test_an_engine_without_a_model_has_no_forward(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """A fake engine says nothing of a forward, and neither do we."""
    async with open_site(tiny_base, tmp_path) as site:
        assert "forward" not in (await site.http.get("/health/ready")).json()
        assert not any("forward" in name for name in parsed((await site.http.get("/metrics")).text))
