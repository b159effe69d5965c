"""Every backend holds the contract, and so does a new one that nothing outside the tests knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adapters_store.base.spec import KVShape
from adapters_store.primitives import Rows
from server.core import Row, RunnerConfig, Sampling
from server.model.backends.attention_params import AttentionParams, KVLayer, split
from server.model.backends.base import Linear, Spans
from server.model.backends.codes import RELU_GATE, ROWS, SCALE_IN, SILU_GATE
from server.model.backends.cpu.backend import CpuBackend
from server.model.backends.reference import (
    Find,
    apply_reference,
    best_reference,
    embed_rows_reference,
    scale_reference,
    store_reference,
)  # fmt: skip
from server.model.backends.torch_ops.backend import TorchOpsBackend
from server.model.backends.torch_ops.copies import DeviceCopies
from server.model.precision import StorageDtypes
from server.model.row_adapters import Acts, RowAdapters, SiteGroup
from server.model.runner import load
from tests.server.model.backends.contract import BackendContract, Case


class NumpyBackend:
    """A toy: products, norms and gates in plain numpy, attention one query after another, adapters by the formulas."""

    name, device, precision, dtypes = "numpy", "cpu", "fp32", StorageDtypes(torch.float32, torch.float32)

    def __init__(self) -> None:
        self.copies = DeviceCopies("cpu")
        self.store_kv, self.best_tokens = store_reference, best_reference

    def set_num_threads(self, num_threads: int) -> None: ...

    def wake(self) -> None: ...

    def rounded(self, weight: Tensor) -> Tensor:
        return weight

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        w, b = weight.numpy(), 0.0 if bias is None else bias.numpy()
        return lambda x: torch.from_numpy(x.numpy() @ w.T + b).float()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.numpy()
        return torch.from_numpy(weight.numpy() * rows / np.sqrt((rows**2).mean(-1, keepdims=True) + np.float32(eps)))

    def gate(self, gate_up: Tensor, gate: int) -> Tensor:
        g, u = np.split(gate_up.numpy(), 2, -1)
        gelu = 0.5 * g * (1 + np.tanh((2 / np.pi) ** 0.5 * (g + 0.044715 * g**3)))
        act = {RELU_GATE: np.maximum(g, 0), SILU_GATE: g / (1 + np.exp(-g))}.get(gate, gelu)
        return torch.from_numpy((act * u).astype(np.float32))

    def block_shapes(self, shape: KVShape, block_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        heads = shape.num_kv_heads
        return (heads, shape.key_dim, block_size), (heads, block_size, shape.value_dim)

    def lay_out(self, spans: Spans, _block_size: int, _num_kv_heads: int, _num_threads: int) -> Spans:
        return spans

    def attend(
        self, step: Spans, layer: KVLayer, qkv: Tensor, cos: Tensor, sin: Tensor, params: AttentionParams
    ) -> Tensor:
        query, key, value = split(qkv, layer.shape, cos, sin)
        store_reference(layer, torch.from_numpy(step.token_blocks), torch.from_numpy(step.token_offsets), key, value)
        out, group = np.empty((*query.shape[:2], value.shape[2]), np.float32), query.shape[1] // key.shape[1]
        for sequence, (first, count, start) in enumerate(step.spans):
            for position in range(start, start + count):
                low = max(0, position - params.window + 1) if params.window else 0
                seen = np.arange(low, position + 1)
                blocks, offsets = step.block_table[sequence][seen // layer.block_size], seen % layer.block_size
                for head in range(query.shape[1]):
                    k = layer.keys.numpy()[blocks, head // group, :, offsets]
                    scores = k @ query[first + position - start, head].numpy() * params.scaling
                    scores = params.cap * np.tanh(scores / params.cap) if params.cap else scores
                    weights = np.exp(scores - scores.max())
                    v = layer.values.numpy()[blocks, head // group, offsets]
                    out[first + position - start, head] = weights @ v / weights.sum()
        return torch.from_numpy(out)

    def adapters(self, find: Find) -> NumpyAdapterOps:
        return NumpyAdapterOps(find)

    def whole_decoder(self, _layers: Any) -> None:
        return None


class NumpyAdapterOps:
    """The primitives' own formulas."""

    def __init__(self, find: Find) -> None:
        self.find = find

    def insert(self, slot: int, buffer: Tensor, row_ids: dict[int, Tensor]) -> None: ...

    def drop(self, slot: int) -> None: ...

    def prepare(self, tokens: RowAdapters, sampled: RowAdapters, _acts: Acts, _table: Any) -> tuple[Any, Any]:
        return tokens, sampled

    def scale_input(self, site: int, x: Tensor, rows: RowAdapters) -> None:
        scale_reference(self.find, SCALE_IN, site, x, rows)

    def apply(self, group: SiteGroup, x: Tensor, stream: Tensor, y: Tensor, rows: RowAdapters) -> None:
        rows = rows if len(y) == rows.num_rows else rows.repeated(len(y) // rows.num_rows)
        apply_reference(self.find, group, x, stream, y, rows)

    def embed_rows(self, site: int, token_ids: Tensor, y: Tensor, rows: RowAdapters) -> None:
        for span, slot_weights in rows.segments():
            for slot, weight in slot_weights:
                if isinstance(changed := self.find(ROWS, site, slot), Rows):
                    embed_rows_reference(changed, token_ids[span], y[span], weight)


CASES = [
    Case("cpu fp32", lambda: CpuBackend("fp32"), 1e-5, is_stable=True),
    Case("cpu fp16", lambda: CpuBackend("fp16"), 2e-3, is_stable=True),
    Case("cpu int8", lambda: CpuBackend("int8"), 2e-3, is_stable=True),
    Case("torch", lambda: TorchOpsBackend("fp32", "cpu"), 1e-5),
    Case("numpy", NumpyBackend, 1e-5),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param  # type: ignore[no-any-return]


class TestContract(BackendContract):
    """The suite, run by every backend."""


def test_a_toy_backend_serves_a_base(tiny_base: Path) -> None:
    """A backend that only the tests know loads a base, is compared with the stock model, and answers as the CPU's."""
    config = RunnerConfig(folder=str(tiny_base), name="t", precision="fp32", num_threads=1, kv_cache_bytes=2**22)
    toy = load(config, NumpyBackend())
    row = Row([5, 6, 7], 0, [0], sampling=Sampling(), history=[5, 6, 7], num_prompt=3)
    toy.runner.run([row])
    ours = load(config)
    ours.runner.run([row])
    torch.testing.assert_close(toy.runner.last_logits, ours.runner.last_logits, atol=1e-4, rtol=1e-4)
    assert toy.forward.backend == "numpy" and toy.forward.attentions.fused == 2 and not toy.forward.is_whole_decoder
