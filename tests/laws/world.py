"""Sequences of many kinds through a real engine in this process, together or alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapters_store.format.folder import read_folder
from adapters_store.methods.compile import compile_patch
from adapters_store.primitives import Patch
from server.core import AdapterRef, RunnerConfig, Sampling
from server.engine.engine import Engine
from server.engine.forms import FormCompiler
from server.engine.messages import EngineConfig, Submit
from server.model.precision import choose_storage_dtypes
from server.model.runner import Loaded, load
from server.model.slots.layout import PackedPatch
from tests.server.engine.spawners import ThreadSpawner

NUMBERS_A_POSITION = 2 * 2 * 2 * 16  # layers, keys and values, kv heads, width of a head


def load_tiny(base: Path, num_blocks: int, block_size: int, precision: str = "fp32") -> Loaded:
    """A tiny llama or qwen2 with so many blocks of KV cache."""
    kv_cache_bytes = (
        num_blocks * block_size * NUMBERS_A_POSITION * choose_storage_dtypes(precision, "cpu").matrices.itemsize
    )
    config = RunnerConfig(
        folder=str(base),
        name="tiny",
        precision=precision,
        num_threads=1,
        kv_cache_bytes=kv_cache_bytes,
        block_size=block_size,
    )
    loaded = load(config)
    assert loaded.runner.num_blocks == num_blocks
    return loaded


@dataclass(frozen=True)
class Asked:
    """A request: its hats as (adapter's name, weight), prompt, sampling, the step at which it comes, and its tenant."""

    adapters: tuple[tuple[str, float], ...]
    prompt: tuple[int, ...]
    sampling: Sampling
    arrives: int = 0
    tenant: str = "law"
    form: str | None = None


@dataclass
class World:
    """A loaded base and the folders of its adapters by name: a name is resolved to a digest when it is asked for.

    Solo answers are kept, for they are asked for often.
    """

    loaded: Loaded
    folders: dict[str, Path]
    patches: dict[Path, Patch] = field(default_factory=dict)
    solos: dict[str, list[int]] = field(default_factory=dict)

    def on(self, loaded: Loaded) -> World:
        """The same adapters over another cache of the same base."""
        return replace(self, loaded=loaded, solos={})

    @contextmanager
    def engine(self, **limits: Any) -> Iterator[Engine[Any]]:
        """A fresh engine over the runner. Only one at a time: they share its blocks. Nothing is left behind."""
        base = RunnerConfig(folder="", name="law", max_sequence_tokens=self.loaded.max_sequence_tokens)
        config = EngineConfig(runner=base, blobs="", **limits)
        assert not self.loaded.adapter_slots.slots, "another engine is there"
        try:
            with ThreadSpawner(2) as spawner, ThreadSpawner(1) as compiler:
                engine = self._engine(config, spawner, compiler)
                yield engine
                for digest in {patch.digest for patch in self.patches.values()}:
                    engine.discard(digest)
                engine.step()
            assert not self.loaded.adapter_slots.slots, "a slot was left behind"
        finally:  # of a test that failed: the next one is not to fail for it
            for slot in tuple(self.loaded.adapter_slots.slots):
                self.loaded.adapter_slots.drop(slot)

    def _engine(self, config: EngineConfig, spawner: ThreadSpawner, compiler: ThreadSpawner) -> Engine[Any]:
        tokenizer = self.loaded.form_tokenizer
        assert tokenizer is not None
        return Engine(
            self.loaded.runner,
            self.loaded.adapter_slots,
            self._load,
            config,
            eos_token_ids=self.loaded.eos_token_ids,
            spawner=spawner,
            clock=time.monotonic,
            forms=FormCompiler(tokenizer, compiler, lambda: None),
        )

    def patch(self, name: str) -> Patch:
        """An adapter compiled for the base."""
        folder = self.folders[name]
        if folder not in self.patches:
            self.patches[folder] = compile_patch(read_folder(folder), self.loaded.spec)
        return self.patches[folder]

    def num_bytes(self, *names: str) -> int:
        """What the adapters take in slots together."""
        return sum(self.loaded.adapter_slots.pack(self.patch(name)).num_bytes for name in names)

    def _load(self, digest: str) -> PackedPatch:
        patch = next(patch for patch in tuple(self.patches.values()) if patch.digest == digest)
        return self.loaded.adapter_slots.pack(patch)

    def answer(self, engine: Engine[Any], asked: list[Asked]) -> list[list[int]]:
        """The tokens of all requests, each submitted at its step. Fails where one fails, never ends, or keeps what it
        held.
        """
        tokens: dict[str, list[int]] = {str(index): [] for index in range(len(asked))}
        coming = sorted(range(len(asked)), key=lambda index: asked[index].arrives)
        step, patience = 0, time.monotonic() + 120
        while coming or engine.has_work:
            while coming and asked[coming[0]].arrives <= step:
                index = coming.pop(0)
                engine.submit(self._submit(str(index), asked[index]))
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
        assert engine.stats().num_blocks_used == engine.stats().num_pins == 0
        return list(tokens.values())

    def solo(self, asked: Asked) -> list[int]:
        """What a request is answered alone, in a fresh engine without a prefix cache and in one piece."""
        key = self.key(asked)
        if key not in self.solos:
            with self.engine(is_prefix_cached=False, max_batch_tokens=1024) as engine:
                (self.solos[key],) = self.answer(engine, [replace(asked, arrives=0)])
        return self.solos[key]

    def key(self, asked: Asked) -> str:
        """What a solo answer depends on, and is kept by."""
        return repr(
            (
                [(self.patch(name).digest, weight) for name, weight in asked.adapters],
                asked.prompt,
                asked.sampling,
                asked.form,
            )
        )

    def _submit(self, sequence_id: str, asked: Asked) -> Submit:
        worn = [(self.patch(name), weight) for name, weight in asked.adapters]
        return Submit(
            sequence_id=sequence_id,
            namespace=asked.tenant,
            prompt=list(asked.prompt),
            sampling=asked.sampling,
            deadline=time.monotonic() + 600,
            arrived=time.monotonic(),
            adapters=tuple(AdapterRef(patch.digest, weight, patch.num_virtual) for patch, weight in worn),
            form=asked.form,
        )
