"""What the OpenVINO peer asks, on a pipeline that only counts. OpenVINO itself lives in another environment."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.benchmarks.peers.openvino import SCRIPT


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The peer's side, with stand-ins for what is not installed here."""
    for name in ("openvino", "openvino_genai"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    spec = importlib.util.spec_from_file_location("in_openvino", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "tensor", lambda request: request)
    yield module


class CountingPipe:
    """One token for each running request a step; a whole answer for each of a call of `generate`."""

    def __init__(self) -> None:
        self.running: list[tuple[int, list[int]]] = []
        self.most, self.calls = 0, list[list[int]]()

    def add_request(self, _place: int, _prompt: object, config: int) -> Any:
        tokens: list[int] = []
        self.running.append((config, tokens))
        self.most = max(self.most, len(self.running))
        pop = lambda: {0: SimpleNamespace(generated_ids=[tokens.pop()])}  # noqa: E731
        return SimpleNamespace(can_read=lambda: bool(tokens), read=pop)

    def step(self) -> None:
        for _, tokens in self.running:
            tokens.append(7)
        self.running = [(left - 1, tokens) for left, tokens in self.running if left > 1]

    def has_non_finished_requests(self) -> bool:
        return bool(self.running)

    def generate(self, prompts: list[Any], configs: list[int]) -> list[Any]:
        self.calls.append([prompt["adapter"] for prompt in prompts])
        return [SimpleNamespace(m_generation_ids=[[7] * num]) for num in configs]


def model_of(pipe: CountingPipe) -> Any:
    def config(request: dict[str, Any], max_tokens: int | None = None) -> int:
        return max_tokens or int(request["max_tokens"])

    return SimpleNamespace(get=lambda _: pipe, has_room=True, config=config)


def requests(*adapters: int | None) -> list[dict[str, Any]]:
    return [{"adapter": one, "prompt": [1, 2], "max_tokens": 2 + place} for place, one in enumerate(adapters)]


def test_different_adapters_are_asked_in_groups_of_a_window(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never two adapters in a call, never a request of the next window before this one is done; all are answered."""
    monkeypatch.setattr(script, "say", lambda _: None)
    pipe = CountingPipe()
    result = script.run(model_of(pipe), {"requests": requests(3, 1, 3, 1, 2), "concurrency": 4})
    assert pipe.calls[1:] == [[1, 1], [3, 3], [2]]  # the first call warms up
    assert sorted(one["num_tokens"] for one in result["timings"]) == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("adapter", [0, None])
def test_one_adapter_is_a_closed_loop(script: Any, monkeypatch: pytest.MonkeyPatch, adapter: int | None) -> None:
    """As many at once as are said, each timed by the token."""
    monkeypatch.setattr(script, "say", lambda _: None)
    pipe = CountingPipe()
    result = script.run(model_of(pipe), {"requests": requests(*[adapter] * 5), "concurrency": 2})
    assert pipe.most == 2
    assert [(one["num_tokens"], sum(one["sizes"]), len(one["gaps"])) for one in result["timings"]] == [
        (num, num, num - 1) for num in (2, 3, 4, 5, 6)
    ]
