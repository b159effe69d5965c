"""Run many requests through the real engine, in this process, in one continuous batch."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from adapters_store.format.folder import read_folder
from adapters_store.methods.compile import compile_patch
from server.core import AdapterRef, Row, RunnerConfig, Sampled, Sampling
from server.engine.engine import Engine
from server.engine.messages import EngineConfig, Output, Submit
from server.model.runner import Loaded, PagedRunner, load
from tests.server.engine.spawners import ThreadSpawner


class Request(msgspec.Struct):
    """One greedy request: `adapter` is the name of one, or "base"."""

    adapter: str
    prompt: list[int]
    num_tokens: int


class Got(msgspec.Struct):
    """The engine's answer, and the logits [vocabulary] that its first token was chosen from."""

    tokens: list[int]
    first_logits: Tensor | None = None
    failure: str | None = None


class FirstLogits:
    """A runner that keeps the logits of every sequence's first token, by its hats and prompt."""

    def __init__(self, runner: PagedRunner) -> None:
        self.runner, self.block_size, self.num_blocks = runner, runner.block_size, runner.num_blocks
        self.logits: dict[tuple[Any, ...], Tensor] = {}
        self.most_rows = 0

    def copy(self, source: int, target: int) -> None:
        """As the runner's."""
        self.runner.copy(source, target)

    def run(self, rows: list[Row]) -> list[Sampled | None]:
        """As the runner's."""
        sampled = self.runner.run(rows)
        self.most_rows = max(self.most_rows, len(rows))
        for row, logits in zip((row for row in rows if row.sampling), self.runner.last_logits, strict=False):
            if len(row.history) == row.num_prompt:
                self.logits[row.adapters, tuple(row.history)] = logits.clone()
        return sampled


def load_runner(base: Path, precision: str = "fp32") -> Loaded:
    """The real runner of a base."""
    return load(RunnerConfig(folder=str(base), name="golden", precision=precision, kv_cache_bytes=512 * 2**20))


@contextmanager
def engine_of(loaded: Loaded, runner: FirstLogits, folders: dict[str, Path], **limits: Any) -> Iterator[Engine[Any]]:
    """A real engine whose adapters' digests are their names; `limits` are fields of `EngineConfig`."""
    base = RunnerConfig(folder="", name="golden", max_sequence_tokens=loaded.max_sequence_tokens)
    config = EngineConfig(runner=base, blobs="", **limits)
    with ThreadSpawner(1) as spawner:
        yield Engine(
            runner,
            loaded.adapter_slots,
            lambda name: loaded.adapter_slots.pack(compile_patch(read_folder(folders[name]), loaded.spec)),
            config,
            eos_token_ids=loaded.eos_token_ids,
            spawner=spawner,
            clock=time.monotonic,
        )


def run(loaded: Loaded, folders: dict[str, Path], requests: list[Request], **limits: Any) -> list[Got]:
    """Answer all requests, submitted at once in an order of a fixed seed; the answers are in the given order."""
    runner, virtual = FirstLogits(loaded.runner), _virtual(loaded, folders)
    with engine_of(loaded, runner, folders, **limits) as engine:
        for index in random.Random(0).sample(range(len(requests)), len(requests)):
            engine.submit(_submit(index, requests[index], virtual))
        got = [Got([]) for _ in requests]
        while engine.has_work:
            step = engine.step()
            if step is None:
                time.sleep(0.001)  # an adapter is being loaded
                continue
            for output in step.outputs:
                _add(got[int(output.sequence_id)], output)
        engine.assert_consistent()
        slots = {name: ((engine.adapters.slot(name), 1.0),) for name in folders} | {"base": ()}
    for request, answer in zip(requests, got, strict=True):
        answer.first_logits = runner.logits[slots[request.adapter], tuple(request.prompt)]
    assert runner.most_rows > 1, "nothing was batched"
    return got


def _virtual(loaded: Loaded, folders: dict[str, Path]) -> dict[str, int]:
    """How many virtual positions each adapter puts before a prompt, as the front learns at the upload."""
    return {name: compile_patch(read_folder(path), loaded.spec).num_virtual for name, path in folders.items()}


def _submit(index: int, request: Request, virtual: dict[str, int]) -> Submit:
    return Submit(
        sequence_id=str(index),
        namespace="golden",
        prompt=request.prompt,
        sampling=Sampling(max_tokens=request.num_tokens, ignore_eos=True),
        deadline=time.monotonic() + 3600,
        arrived=time.monotonic(),
        adapters=()
        if request.adapter == "base"
        else (AdapterRef(request.adapter, num_virtual=virtual[request.adapter]),),
    )


def _add(got: Got, output: Output) -> None:
    got.tokens += output.token_ids
    got.failure = output.failure.message if output.failure else got.failure
