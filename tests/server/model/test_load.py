"""Loading a base: instrumented, proved, or refused with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.stablelm import StableLmConfig

from server.core import Row, RunnerConfig, Sampling
from server.model import verify
from server.model.backends.cpu import adapters
from server.model.backends.cpu.weights import PACKERS
from server.model.errors import UnsupportedBaseError
from server.model.load import load_base
from server.model.precision import choose_storage_dtypes
from server.model.runner import load
from tests.kit.tiny import EOS


def test_a_base_describes_itself(tiny_base: Path) -> None:
    """The spec has every linear layer with its shape, the positions, the vocabulary and the identity."""
    spec = load_base(tiny_base, "tiny", "fp32", "cpu").spec
    config = json.loads((tiny_base / "config.json").read_text())
    assert spec.vocab_size == config["vocab_size"]
    assert spec.max_positions == config["max_position_embeddings"]
    assert spec.linears["model.layers.0.mlp.down_proj"].in_features == config["intermediate_size"]
    assert "lm_head" in spec.linears and len(spec.identity) == 64


def test_a_base_that_drops_the_keyword_is_refused(tmp_path: Path) -> None:
    """An architecture that does not pass our argument to its attention is refused with that reason."""
    config = StableLmConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedBaseError, match=r"StableLm.*paged"):
        load_base(tmp_path, "stable", "fp32", "cpu")


def test_a_base_that_computes_something_else_is_refused(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the instrumented logits differ from the stock model's, the base is refused with the gap."""
    stock = modeling_llama.LlamaAttention.forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        out, weights = stock(self, *args, **kwargs)
        return out * (1.5 if "paged" in kwargs else 1.0), weights

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", scaled)
    with pytest.raises(UnsupportedBaseError, match="other logits"):
        load_base(tiny_base, "tiny", "fp32", "cpu")


def test_a_folder_that_is_no_causal_model_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    """A folder whose architecture transformers does not know, or without weights, is refused with the reason."""
    shutil.copy(tiny_base / "config.json", tmp_path)
    with pytest.raises(UnsupportedBaseError, match="cannot be loaded"):
        load_base(tmp_path, "x", "fp32", "cpu")
    (tmp_path / "config.json").write_text('{"model_type": "no-such-thing"}')
    with pytest.raises(UnsupportedBaseError, match="cannot be loaded"):
        load_base(tmp_path, "x", "fp32", "cpu")


def test_the_end_tokens_are_those_of_generate(tmp_path: Path, tiny_base: Path) -> None:
    """The generation config's end tokens and the config's all end an answer, each once."""
    shutil.copytree(tiny_base, tmp_path / "base")
    file = tmp_path / "base" / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [5, EOS, 9]}))
    assert load_base(tmp_path / "base", "tiny", "fp32", "cpu").eos_token_ids == [5, EOS, 9]


def test_a_cache_that_cannot_be_is_refused(tiny_base: Path) -> None:
    """A KV cache of less than two blocks is refused at start."""
    with pytest.raises(UnsupportedBaseError, match="KV cache"):
        load(RunnerConfig(folder=str(tiny_base), name="t", precision="fp32", num_threads=1, kv_cache_bytes=10))


@pytest.mark.parametrize("precision", PACKERS)
def test_logits_alone_in_chunks_and_in_a_batch(tiny_base: Path, precision: str) -> None:
    """Logits are bit-equal alone, in chunks and in any batch, whether weights have 32, 16 or 8 bits."""
    runner = load(
        RunnerConfig(folder=str(tiny_base), name="t", precision=precision, num_threads=1, kv_cache_bytes=2**22)
    ).runner
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 250, (n,), generator=generator).tolist() for n in (1, 40, 7, 90)]
    rows = [Row(p, 0, [4 * i, 4 * i + 1, 4 * i + 2], sampling=Sampling(), history=p) for i, p in enumerate(prompts)]
    runner.run(rows)
    together = runner.last_logits
    for index, prompt in enumerate(prompts):
        for size in (1, 17, 100):
            for start in range(0, len(prompt), size):
                part = prompt[start : start + size]
                runner.run([Row(part, start, rows[index].blocks, sampling=Sampling(), history=prompt)])
            assert torch.equal(runner.last_logits[0], together[index])


def test_the_proof_reads_what_it_says() -> None:
    """Every precision that is served has its tolerance."""
    served = {"cpu": ("fp32", "fp16", "int8"), "cuda": ("fp32", "fp16", "bf16")}
    dtypes = {choose_storage_dtypes(precision, device) for device, names in served.items() for precision in names}
    assert set(verify.REFERENCE_TOLERANCE) == dtypes


def test_kernels_are_compiled_before_anyone_waits(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading runs each kernel of the primitives once, and leaves no slot and no adapters behind."""
    calls = set[str]()

    def counted(name: str, real: Callable[..., object]) -> Callable[..., None]:
        def call(*args: object) -> None:
            calls.add(name)
            real(*args)

        return call

    for name in ("enter", "apply"):
        monkeypatch.setattr(adapters, name, counted(name, getattr(adapters, name)))
    adapter_slots = load(
        RunnerConfig(folder=str(tiny_base), name="t", precision="fp32", num_threads=1, kv_cache_bytes=2**22)
    ).adapter_slots
    assert calls == {"enter", "apply"} and not adapter_slots.slots and not adapter_slots.step.tokens.slots.size


def test_cuda_graphs_are_refused_on_a_cpu(tiny_base: Path) -> None:
    """A setting that would do nothing is a sentence, not silence."""
    with pytest.raises(UnsupportedBaseError, match="no CUDA graphs on cpu: leave --cuda-graphs out"):
        load(RunnerConfig(folder=str(tiny_base), name="t", cuda_graphs=True))
