"""Sequences of many kinds through a real engine in this process, together or alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapters_store.artifact import read_folder
from adapters_store.methods import compile_patch
from server.engine.engine import Engine
from server.engine.messages import EngineConfig, Hat, Submit
from server.model.batch import Sampling
from server.model.packed import Packed
from server.model.runner import Loaded


@dataclass(frozen=True)
class Asked:
    """A request: its hats as (adapter's name, weight), prompt, sampling, and the step at which it comes."""

    hats: tuple[tuple[str, float], ...]
    prompt: tuple[int, ...]
    sampling: Sampling
    arrives: int = 0


@dataclass
class World:
    """A loaded base and its adapters; solo answers are kept, for they are asked for often."""

    loaded: Loaded
    folders: dict[str, Path]
    solos: dict[str, list[int]] = field(default_factory=dict)

    @contextmanager
    def engine(self, **limits: Any) -> Iterator[Engine[Any]]:
        """A fresh engine over the runner. Only one at a time: they share its blocks."""
        config = EngineConfig(
            folder="", name="law", blobs="", **{"max_sequence_tokens": self.loaded.max_sequence_tokens, **limits}
        )
        assert not self.loaded.bank.buffers, "another engine is there"
        with ThreadPoolExecutor(2) as executor:
            engine: Engine[Any] = Engine(
                self.loaded.runner,
                self.loaded.bank,
                self.pack,
                config,
                eos_token_ids=self.loaded.eos_token_ids,
                executor=executor,
                clock=time.monotonic,
            )
            yield engine
            for name in self.folders:
                engine.forget(name)
            engine.step()
        assert not self.loaded.bank.buffers, "a slot was left behind"

    def pack(self, name: str) -> Packed:
        """An adapter as it would lie in a slot."""
        return self.loaded.bank.pack(compile_patch(read_folder(self.folders[name]), self.loaded.spec))

    def answer(self, engine: Engine[Any], asked: list[Asked]) -> list[list[int]]:
        """The tokens of all requests, each submitted at its step. Fails where one fails, or never ends."""
        tokens: dict[str, list[int]] = {str(index): [] for index in range(len(asked))}
        coming = sorted(range(len(asked)), key=lambda index: asked[index].arrives)
        step, patience = 0, time.monotonic() + 120
        while coming or engine.has_work:
            while coming and asked[coming[0]].arrives <= step:
                index = coming.pop(0)
                engine.submit(_submit(str(index), asked[index]))
            done = engine.step()
            step += 1
            assert time.monotonic() < patience, "somebody starves"
            if done is None:
                time.sleep(0.0005)  # an adapter is being loaded, or nobody is there yet
                continue
            for output in done.outputs:
                assert output.failure is None, output.failure
                tokens[output.sequence_id] += output.token_ids
        engine.assert_consistent()
        return list(tokens.values())

    def solo(self, asked: Asked) -> list[int]:
        """What a request is answered alone, in a fresh engine without a prefix cache and in one piece."""
        key = repr((asked.hats, asked.prompt, asked.sampling))
        if key not in self.solos:
            with self.engine(is_prefix_cached=False, max_batch_tokens=1024) as engine:
                (self.solos[key],) = self.answer(engine, [replace(asked, arrives=0)])
        return self.solos[key]


def _submit(sequence_id: str, asked: Asked) -> Submit:
    return Submit(
        sequence_id=sequence_id,
        namespace="law",
        prompt=list(asked.prompt),
        sampling=asked.sampling,
        deadline=time.monotonic() + 600,
        arrived=time.monotonic(),
        hats=tuple(Hat(name, weight) for name, weight in asked.hats),
    )
