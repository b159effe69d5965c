"""Every backend holds the contract, and so does a new one that nothing outside the tests knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from server.core import Row, RunnerConfig, Sampling
from server.model.backends.attention_params import AttentionParams, KVLayer, split
from server.model.backends.base import Linear, Spans
from server.model.backends.codes import RELU_GATE, SILU_GATE
from server.model.backends.cpu.backend import CpuBackend
from server.model.backends.torch_ops.backend import TorchOpsBackend
from server.model.runner import load
from tests.server.model.backends.contract import BackendContract, Case


class NumpyBackend(TorchOpsBackend):
    """A toy: products, norms and gates in plain numpy, attention one query after another; the rest as torch has it."""

    name = "numpy"

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

    def lay_out(self, spans: Spans, _block_size: int, _num_kv_heads: int, _num_threads: int) -> Any:
        return spans

    def attend(
        self, layout: Any, layer: KVLayer, qkv: Tensor, cos: Tensor, sin: Tensor, params: AttentionParams
    ) -> Tensor:
        query, key, value = split(qkv, layer.shape, cos, sin)
        blocks, offsets = torch.from_numpy(layout.token_blocks), torch.from_numpy(layout.token_offsets)
        self.store_kv(layer, blocks, offsets, key, value)
        out, group = np.empty((*query.shape[:2], value.shape[2]), np.float32), query.shape[1] // key.shape[1]
        for sequence, (first, count, start) in enumerate(layout.spans):
            for position in range(start, start + count):
                seen = np.arange(max(0, position - params.window + 1) if params.window else 0, position + 1)
                at, offset = layout.block_table[sequence][seen // layer.block_size], seen % layer.block_size
                for head in range(query.shape[1]):
                    k = layer.keys.numpy()[at, head // group, :, offset]
                    scores = k @ query[first + position - start, head].numpy() * params.scaling
                    scores = params.cap * np.tanh(scores / params.cap) if params.cap else scores
                    weights = np.exp(scores - scores.max())
                    v = layer.values.numpy()[at, head // group, offset]
                    out[first + position - start, head] = weights @ v / weights.sum()
        return torch.from_numpy(out)


CASES = [
    Case("cpu fp32", lambda: CpuBackend("fp32"), 1e-5, is_stable=True),
    Case("cpu fp16", lambda: CpuBackend("fp16"), 2e-3, is_stable=True),
    Case("cpu int8", lambda: CpuBackend("int8"), 2e-3, is_stable=True),
    Case("torch", lambda: TorchOpsBackend("fp32", "cpu"), 1e-5),
    Case("numpy", lambda: NumpyBackend("fp32", "cpu"), 1e-5),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param  # type: ignore[no-any-return]


class TestContract(BackendContract):
    """The suite, run by every backend."""


def test_a_toy_backend_serves_a_base(tiny_base: Path) -> None:
    """A backend that only the tests know loads a base, is compared with the stock model, and answers as the CPU's."""
    config = RunnerConfig(folder=str(tiny_base), name="t", precision="fp32", num_threads=1, kv_cache_bytes=2**22)
    toy = load(config, NumpyBackend("fp32", "cpu"))
    row = Row([5, 6, 7], 0, [0], sampling=Sampling(), history=[5, 6, 7], num_prompt=3)
    toy.runner.run([row])
    ours = load(config)
    ours.runner.run([row])
    torch.testing.assert_close(toy.runner.last_logits, ours.runner.last_logits, atol=1e-4, rtol=1e-4)
    assert toy.forward.backend == "numpy" and toy.forward.attentions.fused == 2 and not toy.forward.is_whole_decoder
