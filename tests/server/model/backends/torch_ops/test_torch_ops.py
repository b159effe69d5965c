"""The branch for devices without kernels of ours, which CUDA takes: torch ops alone.

No GPU is needed: its numbers are computed on CPU tensors, and what a GPU would wait for raises on fake tensors.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from adapters_store.primitives import LowRank
from server.core import Row, RunnerConfig, Sampling
from server.model import load as load_module
from server.model import runner, verify
from server.model.attention.attend import attend
from server.model.attention.kv_cache import KVCache
from server.model.attention.paged_batch import page
from server.model.attention.reference import attend_reference
from server.model.backends.attention_params import AttentionParams
from server.model.backends.torch_ops.adapters import StackedAdapterOps
from server.model.backends.torch_ops.backend import TorchOpsBackend
from server.model.cuda_graphs import DecodeGraphs
from server.model.errors import UnsupportedBaseError
from server.model.instrument.fuser import LayerFuser
from server.model.precision import StorageDtypes
from server.model.runner import Loaded, load
from server.model.slots.layout import Sites, pack
from server.model.slots.slots import AdapterSlots
from tests.kit.patches import KINDS, all_of, random_patch
from tests.kit.tiny import make_tiny_base
from tests.server.model.attention import test_attend
from tests.server.model.backends.contract import SPEC, patches
from tests.server.model.backends.contract import random as random_tensor
from tests.server.model.backends.test_primitives import BLOCK, RowAdapters, compare, mixed

TYPES = ["llama", "gpt2", "gemma2", "gemma3_text", "qwen3"]


def backend_of(dtype: torch.dtype = torch.float32, device: str = "cpu") -> TorchOpsBackend:
    """The backend that a GPU gets, in this type."""
    return TorchOpsBackend("fp32" if dtype == torch.float32 else "bf16", device, StorageDtypes(dtype, dtype))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Per type of model and of number: the loaded runner, and the stock model."""

    @cache
    def get(model_type: str, dtype: torch.dtype = torch.float32) -> tuple[Loaded, Any]:
        folder = make_tiny_base(tmp_path_factory.mktemp("bases") / model_type, model_type)
        loaded = load(config_of(folder), backend_of(dtype))
        return loaded, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    return get


def config_of(folder: Path, device: str = "cpu", precision: str = "fp32") -> RunnerConfig:
    return RunnerConfig(
        folder=str(folder),
        name="tiny",
        precision=precision,
        device=device,
        num_threads=1,
        kv_cache_bytes=2**24,
        block_size=BLOCK,
    )


@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (11, 0.0), (0, 2.0), (5, 3.0), (1, 0.0)])
@pytest.mark.parametrize(("value_dim", "rotated"), [(16, 0), (24, 16)])
def test_attention_equals_its_twin(window: int, cap: float, value_dim: int, rotated: int) -> None:
    """Padded groups give what one sequence after the other gives: chunks and single tokens, windows and soft caps, in
    blocks where what is stale is not a number."""
    starts, counts = (0, 0, 0, 30, 12, 3), (1, 37, 70, 1, 1, 5)
    rows = [
        Row([0] * n, start, list(range(9 * at, 9 * at + 9)))
        for at, (start, n) in enumerate(zip(starts, counts, strict=True))
    ]
    qkv, rotary = test_attend.make_qkv(sum(counts), value_dim=value_dim), test_attend.make_turns(115, rotated)
    caches: list[KVCache] = []
    for _ in range(2):
        made = test_attend.make_cache(54, value_dim=value_dim, backend=backend_of())
        generator = torch.Generator().manual_seed(0)
        for row in rows:
            places = torch.arange(row.start)
            blocks = torch.tensor(row.blocks)[places // test_attend.BLOCK]
            past = torch.randn(row.start, 2, 16 + value_dim, generator=generator)
            made.store(0, blocks, places % test_attend.BLOCK, past[..., :16], past[..., 16:])
        caches.append(made)
    params = AttentionParams(0.3, window, cap)
    got = attend(page(rows, caches[0], 1), 0, qkv, *rotary, params)
    wanted = attend_reference(page(rows, caches[1], 1), 0, qkv, *rotary, params)
    torch.testing.assert_close(got, wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("model_type", TYPES)
def test_all_primitives_mixed_and_composed(model_type: str, seed: int, bases: Any) -> None:
    """Rows of every kind, several hats a row with weights, prefixes after one another, in chunks: each its own."""
    loaded, stock = bases(model_type)
    gaps = compare((loaded, stock), mixed(loaded.spec, seed, random.Random(seed)), seed, chunk=[7, 1000][seed])
    assert max(gaps) < 1e-3, gaps


@pytest.mark.parametrize("kind", KINDS)
def test_each_primitive_in_many_rows(kind: str, bases: Any) -> None:
    """Rows that wear one hat each, more than a tile of neighbours, are the stock model's with the same formulas."""
    base_ = bases("qwen3")
    patches = [random_patch(base_[0].spec, kind, seed) for seed in range(2)]
    wearers: list[RowAdapters] = [[(patches[0], 1.0)], [(patches[0], 1.0)], [], [(patches[1], 0.5)]]
    assert max(compare(base_, wearers, seed=5)) < 1e-3


def test_a_strangers_overflow_is_not_mine(bases: Any) -> None:
    """A hat whose values overflow makes its own row fail, and changes no other."""
    loaded, _ = bases("llama")
    adapter_slots, good, bad = loaded.adapter_slots, *(random_patch(loaded.spec, "low_rank", seed) for seed in (1, 2))
    for primitive in all_of(LowRank, bad):
        primitive.a.fill_(3e38)
    slots = [adapter_slots.insert(adapter_slots.pack(patch)) for patch in (good, bad)]
    rows = [Row([5, 6, 7], 0, [at], adapters, Sampling()) for at, adapters in enumerate([((slots[0], 1.0),), ()])]
    loaded.runner.run(rows)
    before = loaded.runner.last_logits
    mine, none, its = loaded.runner.run([*rows, Row([5, 6, 7], 0, [2], ((slots[1], 1.0),), Sampling())])
    assert mine and none and its and its.error and not mine.error and not none.error
    torch.testing.assert_close(loaded.runner.last_logits[:2], before)
    for slot in slots:
        adapter_slots.drop(slot)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3"])  # random gemmas are too steep for bf16
def test_half_precision_is_proved_and_near(model_type: str, dtype: torch.dtype, bases: Any) -> None:
    """Activations, KV and hats in 16 bits pass the proof of their type, and mixed batches are near fp32's answers."""
    loaded, stock = bases(model_type, dtype)
    assert loaded.runner.cache.keys[0].dtype == dtype
    wearers: list[RowAdapters] = [[], *([(random_patch(loaded.spec, kind, 1), 1.0)] for kind in KINDS)]
    gaps = compare((loaded, stock), wearers, 3)
    assert max(gaps) < 3 * verify.REFERENCE_TOLERANCE[StorageDtypes(dtype, dtype)], gaps


@pytest.mark.parametrize("model_type", TYPES)
def test_nothing_waits_for_the_device(
    model_type: str, bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading and steps of a device without kernels, from prompts to decoding, with all primitives, and the decode
    steps that CUDA graphs record: on fake tensors every shape and type fits, everything is on the device, and nothing
    reads it but the sampling."""
    spec = bases(model_type)[0].spec
    monkeypatch.setattr(load_module, "describe", lambda *_: spec)
    monkeypatch.setattr(runner, "sample", lambda logits, rows, _best: [torch.empty(logits.shape)] * len(rows))
    monkeypatch.setattr(verify.ReferenceCheck, "compare", lambda _self, logits, *_: logits)
    monkeypatch.setattr(
        verify.ReferenceCheck, "check_apart", lambda self, compute, paged, *_: self.run(compute, paged, 3)
    )
    reference = [Row([5] * verify.REFERENCE_TOKENS, 0, [at]) for at in range(2)]
    monkeypatch.setattr(verify.ReferenceCheck, "paged", lambda _self, cache: page(reference, cache, 1))
    monkeypatch.setattr(
        LayerFuser, "_gives", lambda _self, _name, compute, wanted: _tensor(compute()).shape == wanted.shape
    )
    monkeypatch.setattr(load_module, "_load_model", fake_model)
    monkeypatch.setattr(AdapterSlots, "warm_up", lambda _self: None)  # it packs, which is the host's
    wearers = mixed(spec, 0, random.Random(0))
    patches = {patch.digest: patch for worn in wearers for patch, _ in worn}
    packed = [pack(patch, Sites(spec), StorageDtypes(torch.bfloat16, torch.bfloat16)) for patch in patches.values()]
    with FakeTensorMode(allow_non_fake_inputs=True):
        loaded = load(config_of(Path(spec.folder), "meta", "bf16"), backend_of(torch.bfloat16, "meta"))
        slots = {one.digest: loaded.adapter_slots.insert(one) for one in packed}
        rows = []
        for at, worn in enumerate(wearers):
            num_virtual = sum(patch.num_virtual for patch, _ in worn)
            tokens = [*range(-1, -1 - num_virtual, -1), *range(5, 12 + at)]
            adapters = tuple((slots[patch.digest], weight) for patch, weight in worn)
            blocks = list(range(12 * at, 12 * at + 12))
            rows.append(Row(tokens, 0, blocks, adapters, Sampling(), num_virtual=num_virtual))
        loaded.runner.run(rows)
        check_logits(loaded, len(rows))
        for at, row in enumerate(rows[3:], 3):
            rows[at] = Row([7], len(row.tokens), row.blocks, row.adapters, Sampling(), num_virtual=row.num_virtual)
        loaded.runner.run(rows)
        check_logits(loaded, len(rows))
        captures = list[torch.Tensor]()
        loaded.runner.graphs = DecodeGraphs(loaded.runner.base.forward, loaded.runner.cache, recorded_in(captures))
        for num_rows in (3, 4):
            loaded.runner.run([Row([7], 9 + at, [at, 20 + at], sampling=Sampling()) for at in range(num_rows)])
            check_logits(loaded, num_rows)
        assert len(captures) == 1, "what a graph records needs the device's answer"


def recorded_in(captures: list[torch.Tensor]) -> Any:
    """In place of CUDA's capture: each replay computes anew into the place of the first result."""

    def capture(compute: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        out = compute().clone()
        captures.append(out)
        return lambda: out.copy_(compute()), out

    return capture


def _tensor(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def fake_model(folder: Path, dtype: torch.dtype, device: str) -> Any:
    with torch.device(device):
        config = AutoConfig.from_pretrained(folder)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_device_that_is_not_here_is_refused(tmp_path: Path) -> None:
    """Without a GPU `--device cuda` is refused with that reason, before anything is loaded."""
    with pytest.raises(UnsupportedBaseError, match=r"cuda is not here.*no GPU"):
        load(config_of(tmp_path, "cuda", "auto"))


def test_a_gpu_is_said_to_be_untried(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever starts on a GPU reads in the log, before anything is loaded, that nobody has run it there yet."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UnsupportedBaseError, match="cannot be loaded"):
        load(config_of(Path("/nowhere"), "cuda", "auto"))
    assert "the GPU path was not run on a GPU yet" in caplog.text


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here, or a torch without CUDA")
@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-3), ("bf16", 0.3)])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3"])
def test_on_a_gpu(model_type: str, precision: str, most: float, tmp_path: Path) -> None:
    """On a GPU mixed batches of all primitives, in chunks, are near the stock model's fp32 logits on a CPU."""
    folder = make_tiny_base(tmp_path / "base", model_type)
    loaded = load(config_of(folder, "cuda", precision))
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wearers: list[RowAdapters] = [[], *([(random_patch(loaded.spec, kind, 1), 1.0)] for kind in KINDS)]
    gaps = compare((loaded, stock), wearers, 3, chunk=16)
    assert max(gaps) < most, gaps


def check_logits(loaded: Loaded, num_rows: int) -> None:
    logits = loaded.runner.last_logits
    assert isinstance(logits, FakeTensor) and logits.device.type == "meta"
    assert (tuple(logits.shape), logits.dtype) == ((num_rows, loaded.spec.vocab_size), torch.float32)
    assert loaded.runner.cache.keys[0].dtype == torch.bfloat16


# CUDA graphs


def test_decode_steps_are_replayed(bases: Any) -> None:
    """Steps of one token a row give the eager forward's logits, from one capture for like numbers of rows and blocks;
    a row whose hat acts, or a prompt, is computed as ever."""
    loaded, _stock = bases("llama")
    runner, captures = loaded.runner, list[torch.Tensor]()
    draw = random.Random(0)
    prompts = [[draw.randrange(200) for _ in range(length)] for length in (5, BLOCK, 3 * BLOCK + 1, 20)]
    blocks = [[8 * at + number for number in range(6)] for at in range(len(prompts))]
    rows = [Row(prompt, 0, mine, sampling=Sampling()) for prompt, mine in zip(prompts, blocks, strict=True)]
    runner.run(rows)
    steps = [
        Row([7 + at], len(prompt), mine, sampling=Sampling())
        for at, (prompt, mine) in enumerate(zip(prompts, blocks, strict=True))
    ]
    slot = loaded.adapter_slots.insert(loaded.adapter_slots.pack(random_patch(loaded.spec, "low_rank", 3)))
    batches = [
        steps,
        steps[::-1],
        steps[1:],
        steps[:1],
        [Row([9], 5, blocks[0], ((slot, 1.0),), Sampling()), steps[1]],
        rows[:2],
    ]
    eager = []
    for batch in batches:
        runner.run(batch)
        eager.append(runner.last_logits.clone())
    runner.graphs = DecodeGraphs(runner.base.forward, runner.cache, recorded_in(captures))
    for batch, wanted in zip(batches, eager, strict=True):
        runner.run(batch)
        torch.testing.assert_close(runner.last_logits, wanted)
    runner.graphs = None
    loaded.adapter_slots.drop(slot)
    assert [len(out) for out in captures] == [4, 1]


def test_stacks_are_kept_while_the_same_slots_are_used() -> None:
    """Steps one after another that use the same slots stack their matrices once, whatever is between them."""
    slots = AdapterSlots(SPEC, backend_of())
    number, group = slots.insert(slots.pack(patches()[0])), slots.group("square")
    stacks, ops = [], slots._ops
    assert isinstance(ops, StackedAdapterOps)
    for _ in range(2):
        slots.begin_step([Row([3], 0, [0], adapters=((number, 1.0),))])
        slots.apply(group, random_tensor(1, 40), random_tensor(1, 40))
        slots.end_step()
        stacks.append(ops._stacks[group.number])
    assert stacks[0] is stacks[1]
