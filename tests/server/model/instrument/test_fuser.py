"""Parts of layers that are computed as one: which architectures have them, and that they compute the same."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama

from adapters_store.base.spec import BaseSpec
from adapters_store.primitives import Patch, Scale
from server.core import Row, RunnerConfig, Sampling
from server.model.backends.codes import GATE_CODES
from server.model.backends.cpu import layers
from server.model.instrument import whole_decoder
from server.model.instrument.layers import Attention, GatedMLP, RMSNorm
from server.model.instrument.whole_decoder import DirectForward, FusedDecoder, RotaryTable
from server.model.load import forward, load_base
from server.model.runner import Loaded, load
from tests.kit.patches import random_patch
from tests.kit.tiny import CONFIGS, make_tiny_base

WHOLE = {"llama", "mistral", "qwen2"}  # a layer is one call
ALIKE = {*WHOLE, "gemma2", "granite"}  # all parts of a layer are fused
PARTS = {
    "qwen3": {GatedMLP, RMSNorm},  # norms of queries and keys lie between
    "gemma3_text": {GatedMLP, RMSNorm},
    "olmo2": {GatedMLP, RMSNorm},
    "phi3": {RMSNorm},  # its projections are one already
    "mixtral": {Attention, RMSNorm},
    "gpt2": set(),
    "gpt_neox": set(),
    "opt": set(),
    "phi": set(),
    "starcoder2": {Attention},
}


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_parts_are_replaced_where_they_are_known(model_type: str, tmp_path: Path) -> None:
    """Llama-like layers are fused whole, others as far as they are alike; the loaded base is proved either way."""
    base = load_base(make_tiny_base(tmp_path / "base", model_type), model_type, "fp32", "cpu")
    found = {type(module) for module in base.model.modules()} & {Attention, GatedMLP, RMSNorm}
    assert found == ({Attention, GatedMLP, RMSNorm} if model_type in ALIKE else PARTS[model_type])
    first = base.model.get_submodule(base.spec.layers[0].layer)
    assert isinstance(first.forward, FusedDecoder) == isinstance(base.forward, DirectForward) == (model_type in WHOLE)


def test_what_only_looks_alike_is_left_alone(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A feed-forward block that has the names of a gated one, and computes another thing, stays as it is."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out * 1.001

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    found = {type(module) for module in load_base(tiny_base, "tiny", "fp32", "cpu").model.modules()}
    assert GatedMLP not in found and Attention in found


@pytest.mark.parametrize("name", GATE_CODES)
def test_gates_equal_torchs(name: str) -> None:
    """act(g) u is that of transformers' activation, from very small to very large g."""
    gate = torch.cat([torch.linspace(-90, 90, 501), torch.tensor([0.0, -0.0, 1e-30, -1e4, 1e4])])
    up = torch.randn(len(gate), generator=torch.Generator().manual_seed(0))
    out = torch.empty(2, len(gate))
    layers.gate(torch.cat([gate, up]).repeat(2, 1).numpy(), GATE_CODES[name], out.numpy())
    torch.testing.assert_close(out, (ACT2FN[name](gate) * up).repeat(2, 1), atol=1e-6, rtol=2e-6)


def test_a_norms_rows_are_their_own() -> None:
    """RMS norm equals torch's, and a row of NaN touches no other."""
    x, weight = torch.randn(5, 33, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 2, 33)
    x[3] = torch.nan
    out = torch.empty_like(x)
    layers.rms_norm(x.numpy(), weight.numpy(), 1e-6, out.numpy())
    wanted = torch.nn.functional.rms_norm(x, (33,), weight, 1e-6)
    torch.testing.assert_close(out, wanted, atol=1e-6, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("size", [33, 576])
def test_one_row_alone_gives_the_bits_it_gives_beside_others(size: int) -> None:
    """One row is computed without calling other threads: norm, gate and sum are the same bits as in a batch."""
    generator = torch.Generator().manual_seed(size)
    x, weight = torch.randn(5, 2 * size, generator=generator), torch.randn(2 * size, generator=generator)

    def computed(rows: torch.Tensor) -> list[torch.Tensor]:
        normed, added, *gated = (torch.empty(len(rows), n) for n in (2 * size, 2 * size, size, size, size))
        layers.rms_norm(rows.numpy(), weight.numpy(), np.float32(1e-5), normed.numpy())
        layers.add(rows.numpy(), normed.numpy(), added.numpy())
        for activation, out in enumerate(gated):
            layers.gate(rows.numpy(), activation, out.numpy())
        return [normed, added, *gated]

    together, alone = computed(x), [computed(x[row : row + 1]) for row in range(5)]
    assert all(torch.equal(torch.cat(each), whole) for *each, whole in zip(*alone, together, strict=True))


@pytest.mark.parametrize(("rope_type", "is_kept"), [("default", True), ("llama3", True), ("dynamic", False)])
def test_turns_are_those_of_the_stock_module(rope_type: str, is_kept: bool) -> None:
    """Cosines and sines are the stock module's bits, also beyond those that are kept; no changing ones are."""
    parameters = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0}
    if rope_type == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=2 * whole_decoder.KNOWN,
        rope_parameters=parameters,
    )
    stock, rotary = (
        modeling_llama.LlamaRotaryEmbedding(config),
        RotaryTable(modeling_llama.LlamaRotaryEmbedding(config)),
    )
    assert (rotary.table is not None) == is_kept
    for positions in ([0, 7, 5000, whole_decoder.KNOWN - 1], [3, whole_decoder.KNOWN], [whole_decoder.KNOWN + 5]):
        wanted = stock(torch.empty(0), torch.tensor([positions]))
        got = rotary(torch.tensor(positions))
        assert all(torch.equal(ours, theirs[0]) for ours, theirs in zip(got, wanted, strict=True))


def scales(spec: BaseSpec) -> Patch:
    """Scales of what all linear layers take in, each in a way of its own, and of what they give."""
    generator = torch.Generator().manual_seed(0)

    def factor(size: int) -> torch.Tensor:
        return 1 + 0.3 * torch.randn(size, generator=generator)

    made = [Scale(site, factor(linear.in_features), "input") for site, linear in spec.linears.items()]
    made += [Scale(site, factor(linear.out_features), "output") for site, linear in spec.linears.items()]
    return Patch("scales", "", tuple(made))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_whole_layers_give_the_same_bits(model_type: str, precision: str, tmp_path: Path) -> None:
    """All layers in one call and layers of parts that transformers calls give the same bits, whatever rows wear."""
    folder = make_tiny_base(tmp_path / "base", model_type)
    loaded = load(RunnerConfig(folder=str(folder), name="t", precision=precision, num_threads=1, kv_cache_bytes=2**22))
    adapter_slots, spec = loaded.adapter_slots, loaded.spec
    kinds = [random_patch(spec, kind, 1) for kind in ("low_rank", "bias", "norm", "delta", "bottleneck", "prefix_kv")]
    patches = [scales(spec), *kinds]
    slots = {patch.digest: adapter_slots.insert(adapter_slots.pack(patch)) for patch in patches}
    rows = []
    for at, worn in enumerate([[], *([patch] for patch in patches), patches[:5]]):
        num_virtual = sum(patch.num_virtual for patch in worn)
        adapters = tuple((slots[patch.digest], 1.0 if len(worn) == 1 else 0.5) for patch in worn)
        tokens = [*range(-1, -1 - num_virtual, -1), *range(5, 6 + 5 * at)]
        rows.append(Row(tokens, 0, [4 * at + n for n in range(4)], adapters, Sampling(), num_virtual=num_virtual))
    loaded.runner.run(rows)
    in_one_call = loaded.runner.last_logits
    unjoin(loaded)
    loaded.runner.run(rows)
    assert torch.equal(in_one_call, loaded.runner.last_logits)
    assert all((logits - in_one_call[0]).abs().max() > 1e-3 for logits in in_one_call[1:])


def unjoin(loaded: Loaded) -> None:
    """Let transformers' forward call each layer, and that its parts."""
    model = loaded.runner.base.model
    loaded.runner.base.forward = partial(forward, model)
    layers = [model.get_submodule(layer.layer) for layer in loaded.spec.layers]
    whole = layers[0].forward
    assert isinstance(whole, whole_decoder.FusedDecoder)
    for layer, stock in zip(layers, whole.stock, strict=True):
        layer.forward = stock
    loaded.runner.base.hooks.inside.clear()
