"""vLLM's names of metrics: what a gateway reads of a server to choose among several."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path

import pytest

from server.engine.fake import FakeEngineClient
from server.engine.messages import Stats
from server.metrics import Metrics
from tests.server.test_metrics import parsed
from tests.server.world import open_site, ready_of, until

MODEL = (("model_name", "base"),)


def adapters_of(metrics: Metrics) -> dict[str, str]:
    """The labels of the only series of `vllm:lora_requests_info`."""
    ((labels, value),) = parsed(metrics.render().decode())["vllm:lora_requests_info"].items()
    assert value > 1.7e9  # the newest of several series is the one that is meant
    return dict(labels)


def test_the_queue_and_the_cache() -> None:
    """Gauges are the engine's own; without a cache nothing of it is in use."""
    stats = Stats(num_running=3, num_waiting=2, num_blocks=8, num_blocks_used=2)
    found = parsed(Metrics(lambda: stats, lambda: None).render().decode())
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    assert [found[f"vllm:{name}"][MODEL] for name in names] == [3, 2, 0.25]
    assert parsed(Metrics(Stats, lambda: None).render().decode())["vllm:kv_cache_usage_perc"][MODEL] == 0


def test_adapters_wait_until_they_run() -> None:
    """An adapter is listed once, as waiting or running or both, while a request of it is there."""
    metrics, begun = Metrics(Stats, lambda: None, max_running=7), False
    assert adapters_of(metrics) == {"running_lora_adapters": "", "waiting_lora_adapters": "", "max_lora": "7"}
    with ExitStack() as stack:
        stack.enter_context(metrics.vllm.in_flight(["b", "a"], lambda: begun))
        stack.enter_context(metrics.vllm.in_flight(["a"], lambda: False))
        stack.enter_context(metrics.vllm.in_flight([], lambda: True))
        assert adapters_of(metrics)["waiting_lora_adapters"] == "a,b"
        begun = True
        found = adapters_of(metrics)
        assert (found["running_lora_adapters"], found["waiting_lora_adapters"]) == ("a,b", "a")
    assert adapters_of(metrics)["running_lora_adapters"] == ""


@pytest.mark.anyio
async def test_a_request_is_seen(anyio_backend: str, tiny_base: Path, tmp_path: Path, zips: list[bytes]) -> None:
    """A request's adapter runs until it ends, at any end; its times are in the histograms."""
    engine = FakeEngineClient(ready_of(tiny_base), delay_s=0.001)
    async with open_site(tiny_base, tmp_path, engine) as site:
        await site.upload("hat", zips[0])
        metrics = site.state.metrics
        running = asyncio.create_task(site.ask("hat", prompt="a" * 8, max_tokens=350, ignore_eos=True))
        await until(lambda: adapters_of(metrics)["running_lora_adapters"] == "hat")
        running.cancel()
        await until(lambda: adapters_of(metrics)["running_lora_adapters"] == "")
        await site.ask(prompt="abcd", max_tokens=3)
        found = parsed(metrics.render().decode())
    assert found["vllm:time_to_first_token_seconds_count"][MODEL] == 1
    assert found["vllm:time_per_output_token_seconds_count"][MODEL] >= 2
