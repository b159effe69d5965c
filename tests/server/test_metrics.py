"""Metrics: the engine's state, and tasks by their names, of which no request can make more."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client import Histogram
from prometheus_client.parser import text_string_to_metric_families

from server.core import EngineFailure, ForwardReport, FusedCount
from server.engine.fake import FakeEngineClient
from server.engine.messages import Stats
from server.metrics import LABELS, MAX_TASKS, MAX_VERSIONS, Metrics
from tests.server.world import Site, open_site, ready_of, until


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
    labels = [metrics.label("a", f"t{number}") for number in range(MAX_TASKS + 50)]
    assert labels[:MAX_TASKS] == [("a", f"t{number}") for number in range(MAX_TASKS)]
    assert set(labels[MAX_TASKS:]) == {("a", "_other")}
    assert metrics.label("a", "t0") == ("a", "t0")


@pytest.mark.anyio
async def test_what_a_request_counts(anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes]) -> None:
    """A request counts once, with its tokens and times, under its task and status; usage the same."""
    async with open_site(tiny_base, tmp_path) as site:
        await site.upload("hat", zips[0])
        await site.ask("hat", prompt="abcd", max_tokens=3)
        await site.ask("hat", prompt="abcd", max_tokens=3, n=2)
        found = parsed((await site.http.get("/metrics")).text)
    task = (("task", "hat"), ("tenant", "default"))
    assert found["manyhats_requests_total"] == {(("status", "200"), *task): 2.0}
    assert found["manyhats_prompt_tokens_total"][task] == 8
    assert found["manyhats_completion_tokens_total"][task] == 9
    names = ["request_seconds", "time_to_first_token_seconds", "queue_seconds", "adapter_wait_seconds"]
    assert all(found[f"manyhats_{name}_count"][task] == 2 for name in names)
    assert found["manyhats_inter_token_seconds_count"][task] == 3 * 2
    assert found["manyhats_time_to_first_token_seconds_sum"][task] == pytest.approx(0.004)


@pytest.mark.anyio
async def test_what_fails_is_counted_and_not_billed(anyio_backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """A request that the engine refuses counts under its status; its tokens are nobody's."""
    async with open_site(tiny_base, tmp_path) as site:
        site.engine.failure = EngineFailure("overloaded", "the queue is full")
        assert (await site.post("/generate?task=base", {"prompt": "abcd"})).status_code == 503
        found = parsed((await site.http.get("/metrics")).text)
        assert found["manyhats_requests_total"] == {(("status", "503"), ("task", "base"), ("tenant", "default")): 1.0}
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
        labels = metrics.version_label("a", "a", number)
        metrics.version_requests.labels(*labels, "200").inc()
        metrics.version_ttft.labels(*labels).observe(0.1)
    seen = metrics.render().decode()
    assert seen.count("manyhats_version_requests_total{") == MAX_VERSIONS
    assert seen.count("manyhats_version_time_to_first_token_seconds_count{") == MAX_VERSIONS
    assert 'version="10"' not in seen and 'version="11"' in seen


def test_every_series_of_a_task_names_its_tenant() -> None:
    """Two tenants may have tasks of one name: no metric has the label `task` without `tenant`."""
    metrics = Metrics(Stats, lambda: None)
    labels = [set(names) for _, names in metrics._metrics]
    assert sum("task" in names for names in labels) > 10
    assert all("tenant" in names for names in labels if "task" in names)
    assert all("task" in names for names in labels if "version" in names)


def fill(metrics: Metrics, tenant: str, task: str, number: int) -> None:
    """Write a sample into every series of a version, its task and its tenant."""
    values = dict(zip(LABELS, metrics.version_label(tenant, task, number), strict=True))
    for metric, names in metrics._metrics:
        if "tenant" in names:
            labelled = metric.labels(**{name: values.get(name, "x") for name in names})
            labelled.observe(1) if isinstance(labelled, Histogram) else labelled.inc()


@pytest.mark.parametrize("key", [("a",), ("a", "t"), ("a", "t", 1)])
def test_what_is_deleted_gives_its_series_back(key: tuple[Any, ...]) -> None:
    """A tenant, task or version that is deleted has no series, all others keep theirs, and its place is free again."""
    metrics, gone = Metrics(Stats, lambda: None), Metrics(Stats, lambda: None)
    versions = [(tenant, task, number) for tenant in "ab" for task in "tu" for number in (1, 2)]
    for version in versions:
        fill(metrics, *version)
        if version[: len(key)] != key:
            fill(gone, *version)
    metrics.forget(*key)
    left = {sample for sample in samples(metrics) if not set(sample).isdisjoint({("version", "1"), ("version", "2")})}
    assert left == {sample for sample in samples(gone) if sample in left} and left
    assert not any(set(key_labels(key)) <= set(sample) for sample in samples(metrics))
    fill(metrics, "a", "t", 1)
    assert any(set(key_labels(key)) <= set(sample) for sample in samples(metrics))


def key_labels(key: tuple[Any, ...]) -> list[tuple[str, str]]:
    """The labels that a key stands for."""
    return [(name, str(value)) for name, value in zip(LABELS, key, strict=False)]


def samples(metrics: Metrics) -> set[tuple[tuple[str, str], ...]]:
    """The labels of all samples."""
    return {labels for found in parsed(metrics.render().decode()).values() for labels in found}


def test_tasks_that_come_and_go_stay_named() -> None:
    """However many tasks and tenants were deleted, a new one has a name of its own, and nothing is left of the old."""
    metrics = Metrics(Stats, lambda: None)
    empty = samples(metrics)
    for number in range(2 * MAX_TASKS):
        assert metrics.label(f"n{number}", "t") == (f"n{number}", "t")
        fill(metrics, f"n{number}", "t", 1)
        metrics.forget(f"n{number}", "t", 1)
        metrics.forget(f"n{number}", "t")
        metrics.forget(f"n{number}")
    assert samples(metrics) == empty


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/tasks/hat", "/tasks/hat/versions/1"])
async def test_a_request_that_runs_makes_no_series_of_what_is_gone(
    anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes], path: str
) -> None:
    """The series of a deleted task or version go with the last request of it: the end of that one brings none back."""
    async with open_site(tiny_base, tmp_path) as site:
        await site.upload("hat", zips[0])
        await site.ask("hat", prompt="a")
        site.engine.delay_s = 0.05
        events = asyncio.create_task(site.events("/generate?task=hat", prompt="ab", max_tokens=50))
        await until(lambda: site.state.retention._num_users)
        assert (await site.http.delete(path)).status_code == 204
        await events
        text = (await site.http.get("/metrics")).text
        assert ('task="hat"' in text) is path.endswith("1") and 'version="1"' not in text
        assert not site.state.retention.memories._deleted


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
        assert not any(name.startswith("manyhats_forward") for name in parsed((await site.http.get("/metrics")).text))
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
        assert not any(name.startswith("manyhats_forward") for name in parsed((await site.http.get("/metrics")).text))
