"""The batches of the families, on a server that only counts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import families, soft_prompts
from tests.benchmarks.families import Batches, cut_prompts, num_batches
from tests.benchmarks.peers import Setup
from tests.benchmarks.results import Timing
from tests.benchmarks.shares import Families
from tests.benchmarks.workload import Prompted

MIB = 2**20


class CountingServer:
    """Takes every upload, each of `slot_bytes`, and notes which tasks are asked together."""

    url = "http://counting"

    def __init__(self, slot_bytes: int) -> None:
        self.slot_bytes, self.asked = slot_bytes, list[tuple[list[str], list[Prompted]]]()

    def upload(self, task: str, body: bytes) -> dict[str, Any]:
        assert body
        return {"virtual_tokens": 5 if "prompt" in task else 0, "slot_bytes": self.slot_bytes}

    def ask_all(self, _url: str, requests: list[Prompted], _num: int, task_of: Any, _done: Any) -> Any:
        self.asked.append(([task_of(request.adapter) for request in requests], requests))
        return 2.0, [Timing(1, 3, 0.0, 2.0, 0.5, [0.5, 0.5], [1, 1, 1]) for _ in requests]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[CountingServer]:
    """In place of a real one, of adapters of 300 MiB."""
    counting = CountingServer(300 * MIB)
    monkeypatch.setattr(families, "ask_all", counting.ask_all)
    monkeypatch.setattr(soft_prompts, "ask_all", counting.ask_all)
    yield counting


def batches(server: Any, base: Path, scratch: Path, num: int) -> Batches:
    prompts = cut_prompts(list(range(1000)), num)
    return Batches(server, Setup(base, [], scratch, 1, "auto", scratch), prompts, Families(num, 32, 64))


def test_the_base_is_asked_around_every_few_methods(server: Any, tiny_base: Path, tmp_path: Path) -> None:
    """Each round of a group begins with the base, the last is followed by it, and the mixed batch is a method."""
    one = batches(server, tiny_base, tmp_path, 2)
    methods = ["lora", "ia3", "bottleneck-pfeiffer"]
    measured = list(one.run(methods, 2))
    assert measured == ["base", *methods] * 2 + ["base", "mixed"] * 2 + ["base"]
    assert len(measured) == num_batches(len(methods), 2)
    assert [decode.method for decode in one.into.decodes] == measured
    assert list(one.into.shares()) == [*methods, "mixed"]


def test_each_request_wears_its_own_adapter(server: Any, tiny_base: Path, tmp_path: Path) -> None:
    """As many adapters as requests, all with different prompts, and their virtual tokens are told to be checked."""
    one = batches(server, tiny_base, tmp_path, 3)
    one.dress("prompt-tuning")
    tasks, requests = server.asked[-1]
    assert tasks == ["prompt-tuning-0", "prompt-tuning-1", "prompt-tuning-2"]
    assert [request.num_virtual for request in requests] == [5, 5, 5]
    assert len({tuple(request.prompt) for request in requests}) == 3
    assert one.into.worn["prompt-tuning"].num_different == 3


def test_adapters_that_do_not_fit_together_are_worn_by_turns(server: Any, tiny_base: Path, tmp_path: Path) -> None:
    """No more adapters are uploaded than the slots hold, and the table says how many they are."""
    one = batches(server, tiny_base, tmp_path, 5)
    one.dress("lora")
    assert server.asked[-1][0] == ["lora-0", "lora-1", "lora-2", "lora-0", "lora-1"]
    assert (one.into.worn["lora"].num_different, one.into.worn["lora"].slot_bytes) == (3, 300 * MIB)
    assert not (tmp_path / "lora").exists()


def test_a_soft_prompt_is_asked_by_turns_and_never_twice(server: Any, tiny_base: Path, tmp_path: Path) -> None:
    """Each prompt comes once with the hat and once without, who is first by turns; warm-up is not counted."""
    setup = Setup(tiny_base, [], tmp_path, 1, "auto", tmp_path)
    waits = list(soft_prompts.run(server, setup, list(range(8000)), 4))
    assert [(wait.method, wait.num_prompt) for wait in waits] == [
        (method, num) for num in soft_prompts.NUM_PROMPTS for method in ("prompt-tuning", "prefix-tuning")
    ]
    assert len(waits) == soft_prompts.NUM_WAITS
    assert all(wait.without_ms == wait.with_ms == [500.0] * 4 for wait in waits)
    pairs = list(zip(server.asked[::2], server.asked[1::2], strict=True))
    prompts = [(first[1][0].prompt, second[1][0].prompt) for first, second in pairs]
    assert all(first == second for first, second in prompts)
    assert len({tuple(prompt) for prompt, _ in prompts}) == len(pairs)
    assert {tasks[0] for (tasks, _), _ in pairs} == {"base", "prompt-tuning", "prefix-tuning"}
    assert {request.num_virtual for tasks, (request,) in server.asked if tasks != ["base"]} == {100}
