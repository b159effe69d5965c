"""Run one forward pass a step: rows of many sequences, tasks and lengths in, one token a row out, and scores."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import torch
from llguidance import LLTokenizer
from torch import Tensor

from adapters_store.base.spec import BaseSpec
from adapters_store.primitives import PrefixKV
from server.core import ForwardReport, Row, RunnerConfig, Sampled, Sampling
from server.model.attention.kv_cache import KVCache
from server.model.attention.paged_batch import page
from server.model.backends.base import Backend
from server.model.backends.choose import choose_backend
from server.model.cuda_graphs import DecodeGraphs
from server.model.errors import UnsupportedBaseError
from server.model.form_tokenizer import load_form_tokenizer
from server.model.load import InstrumentedBase, load_base
from server.model.sampler import sample
from server.model.slots.slots import AdapterSlots

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A base that is ready to run; `forward` says how it is computed."""

    runner: PagedRunner
    adapter_slots: AdapterSlots
    spec: BaseSpec
    eos_token_ids: list[int]
    max_sequence_tokens: int
    precision: str
    load_seconds: float
    forward: ForwardReport
    form_tokenizer: LLTokenizer | None  # None: its answers cannot be held to a form


def load(config: RunnerConfig, backend: Backend | None = None) -> Loaded:
    """Load, instrument and check a base, for a given backend or the one that the config's precision and device choose.

    Raises `UnsupportedBaseError` with a sentence for the operator.
    """
    began = time.monotonic()
    backend = choose_backend(config.precision, config.device) if backend is None else backend
    backend.set_num_threads(config.num_threads)
    if config.cuda_graphs and torch.device(config.device).type != "cuda":
        raise UnsupportedBaseError(f"there are no CUDA graphs on {config.device}: leave --cuda-graphs out")
    if torch.device(config.device).type == "cuda":
        log.warning("the GPU path was not run on a GPU yet: compare its answers with a CPU's before you rely on them")
    folder, max_tokens_of = Path(config.folder), partial(_max_tokens, config, backend)
    base = load_base(folder, config.name, backend.precision, backend.device, backend, max_tokens_of)
    if not base.report.is_fastest:
        log.warning("the base is served slower than it could be: %s", base.report.describe())
    base.adapter_slots.warm_up()
    runner = PagedRunner(base, config)
    max_tokens = min(base.max_tokens, _max_tokens(config, backend, base.spec))
    form_tokenizer = load_form_tokenizer(folder, base.spec.vocab_size, base.eos_token_ids)
    return Loaded(
        runner,
        base.adapter_slots,
        base.spec,
        base.eos_token_ids,
        max_tokens,
        backend.precision,
        time.monotonic() - began,
        base.report,
        form_tokenizer,
    )


def _num_blocks(config: RunnerConfig, backend: Backend, spec: BaseSpec) -> int:
    """Count the whole blocks that the KV cache has room for."""
    return config.kv_cache_bytes // KVCache.block_bytes(spec.kv, config.block_size, backend)


def _max_tokens(config: RunnerConfig, backend: Backend, spec: BaseSpec) -> int:
    """Return the tokens of the longest sequence that the KV cache and the config allow."""
    room = _num_blocks(config, backend, spec) * config.block_size
    return room if config.max_sequence_tokens is None else min(room, config.max_sequence_tokens)


class PagedRunner:
    """Runs steps over a paged KV cache. `last_logits` [R, vocabulary] are all that the last step's rows wanted."""

    def __init__(self, base: InstrumentedBase, config: RunnerConfig) -> None:
        self.base, self.block_size, self.num_threads = base, config.block_size, config.num_threads
        self._best_tokens = base.backend.best_tokens
        self.num_blocks = _num_blocks(config, base.backend, base.spec)
        if self.num_blocks < 2:
            per_block = KVCache.block_bytes(base.spec.kv, config.block_size, base.backend)
            raise UnsupportedBaseError(f"a KV cache of {config.kv_cache_bytes} bytes holds no 2 blocks of {per_block}")
        self.cache = KVCache(base.spec.kv, self.num_blocks, config.block_size, base.backend)
        self.graphs = DecodeGraphs(base.forward, self.cache) if config.cuda_graphs else None
        self.last_logits = torch.empty(0, base.spec.vocab_size)
        self._probe_logits = self._probe()

    def enter_process(self) -> None:
        """Begin to compute in the calling thread, also in a process that was forked from the one that loaded the base.

        Raises `RuntimeError` if a token's logits are not the bits that they were there.
        """
        self.base.backend.set_num_threads(self.num_threads)
        if not torch.equal(self._probe(), self._probe_logits):
            raise RuntimeError("the engine computes otherwise than the process that loaded its base")

    def _probe(self) -> Tensor:
        """Compute the logits [1, vocabulary] of one token alone."""
        self.run([Row([0], 0, [0], sampling=Sampling(max_tokens=1), history=[0])])
        return self.last_logits.clone()

    @torch.inference_mode()
    def copy(self, source: int, target: int) -> None:
        """Copy the whole content of a block to another one."""
        self.cache.copy(source, target)

    @torch.inference_mode()
    def run(self, rows: list[Row]) -> list[Sampled | None]:
        """Compute every row's tokens, write their KV, and sample and score as rows ask for it (else None), in order."""
        for row in rows:
            self._check_prefix(row)
        computed = [row for row in map(self._fill, rows) if row.tokens]
        self.last_logits = self._forward(computed) if computed else self.last_logits[:0]
        sampled = iter(sample(self.last_logits, [row for row in rows if row.num_logits], self._best_tokens))
        return [next(sampled) if row.num_logits else None for row in rows]

    def _check_prefix(self, row: Row) -> None:
        num_virtual = sum(self.base.adapter_slots.slots[slot].num_virtual for slot, _ in row.adapters)
        if num_virtual != row.num_virtual:
            raise ValueError(f"a row counts {row.num_virtual} virtual positions, its adapters have {num_virtual}")

    def _fill(self, row: Row) -> Row:
        """Write the KV that prefixes give as it is, and leave the rest of a row's tokens to be computed."""
        before = 0
        for slot, _ in row.adapters if row.start < row.num_virtual else ():
            prefix = self.base.adapter_slots.prefix(slot)
            if isinstance(prefix, PrefixKV):
                first, last = max(row.start, before), min(row.start + len(row.tokens), before + prefix.num_tokens)
                if first < last:
                    self.cache.write(row.blocks, first, prefix, slice(first - before, last - before))
                    row = msgspec.structs.replace(row, start=last, tokens=row.tokens[last - row.start :])
            before += 0 if prefix is None else prefix.num_tokens
        return row

    def _forward(self, rows: list[Row]) -> Tensor:
        if self.graphs is not None and self.graphs.can_run(rows) and not self.base.adapter_slots.acts_in(rows):
            return self.graphs.run(rows)
        tokens = [max(token, 0) for row in rows for token in row.tokens]
        positions = [row.start + i for row in rows for i in range(len(row.tokens))]
        wanted, end = list[int](), 0
        for row in rows:
            if row.targets is not None:
                first = end + row.targets.start - row.start
                wanted += range(first, first + len(row.targets.tokens))
            end += len(row.tokens)
            if row.sampling:
                wanted.append(end - 1)
        numbers = (np.array(each, np.int64) for each in (tokens, positions, wanted))
        token_ids, position_ids, indices = self.base.adapter_slots.copies.send(*numbers)
        paged = page(rows, self.cache, self.num_threads)
        self.base.adapter_slots.begin_step(rows, paged)
        try:
            return self.base.forward(token_ids, position_ids, indices, paged)
        finally:
            self.base.adapter_slots.end_step()
