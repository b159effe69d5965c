"""Every primitive in the runner's mixed batches, against plain torch on the stock model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters_store.base.spec import BaseSpec
from adapters_store.format.folder import read_folder
from adapters_store.methods.compile import compile_patch
from adapters_store.primitives import Patch
from server.core import Row, RunnerConfig, Sampling
from server.model.backends.cpu.threads import set_num_threads
from server.model.backends.cpu.weights import PACKERS
from server.model.runner import Loaded, load
from tests.kit import reference
from tests.kit.families import FAMILIES, FAMILIES_OF_BIASED
from tests.kit.patches import KINDS, random_patch
from tests.kit.tiny import CONFIGS, make_tiny_base

BLOCK = 16
RowAdapters = Sequence[tuple[Patch, float]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Per type of model: the loaded runner, and the stock model."""
    made: dict[str, tuple[Loaded, Any]] = {}

    def get(model_type: str) -> tuple[Loaded, Any]:
        if model_type not in made:
            folder = tmp_path_factory.mktemp("bases") / model_type
            make_tiny_base(folder, model_type)
            made[model_type] = load_one(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return made[model_type]

    return get


def load_one(folder: Path, precision: str = "fp32", num_threads: int = 1, kv_cache_bytes: int = 2**24) -> Loaded:
    config = RunnerConfig(
        folder=str(folder),
        name="tiny",
        precision=precision,
        num_threads=num_threads,
        kv_cache_bytes=kv_cache_bytes,
        block_size=BLOCK,
    )
    return load(config)


def run_all(loaded: Loaded, wearers: list[RowAdapters], prompts: list[list[int]], chunk: int) -> list[torch.Tensor]:
    """The last logits of each prompt in one mixed batch, its virtual and real tokens in chunks of `chunk`."""
    adapter_slots, slots = loaded.adapter_slots, {}
    for worn in wearers:
        for patch, _ in worn:
            if patch.digest not in slots:
                slots[patch.digest] = adapter_slots.insert(adapter_slots.pack(patch))
    contexts, next_block = [], 0
    for worn, prompt in zip(wearers, prompts, strict=True):
        num_virtual = sum(patch.num_virtual for patch, _ in worn)
        tokens = [-1 - at for at in range(num_virtual)] + prompt
        blocks = list(range(next_block, next_block + len(tokens) // BLOCK + 1))
        next_block += len(blocks)
        adapters = tuple((slots[patch.digest], weight) for patch, weight in worn)
        contexts.append((tokens, num_virtual, blocks, adapters))
    logits: list[torch.Tensor] = [torch.empty(0)] * len(wearers)
    for start in range(0, max(len(tokens) for tokens, *_ in contexts), chunk):
        rows, whose = [], []
        for index, (tokens, num_virtual, blocks, adapters) in enumerate(contexts):
            if start < len(tokens):
                is_last = start + chunk >= len(tokens)
                sampling = Sampling() if is_last else None
                rows.append(
                    Row(tokens[start : start + chunk], start, blocks, adapters, sampling, num_virtual=num_virtual)
                )
                whose += [index] if is_last else []
        loaded.runner.run(rows)
        for index, row in zip(whose, loaded.runner.last_logits, strict=True) if whose else ():
            logits[index] = row.to("cpu", copy=True)
    for slot in slots.values():
        adapter_slots.drop(slot)
    return logits


def compare(base: tuple[Loaded, Any], wearers: list[RowAdapters], seed: int, chunk: int = 1000) -> list[float]:
    """Largest gaps between the batch's logits and the reference's, alone."""
    loaded, stock = base
    draw = random.Random(seed)
    prompts = [[draw.randrange(200) for _ in range(draw.randrange(2, 30))] for _ in wearers]
    got = run_all(loaded, wearers, prompts, chunk)
    with torch.inference_mode():
        wanted = [reference.logits(stock, worn, prompt)[-1] for worn, prompt in zip(wearers, prompts, strict=True)]
        bare = [reference.logits(stock, [], prompt)[-1] for prompt in prompts]
    for worn, want, base_logits in zip(wearers, wanted, bare, strict=True):
        if any(weight for _, weight in worn):
            assert (want - base_logits).abs().max() > 0.005, "the patch does nothing: the comparison says nothing"
    return [(g - w).abs().max().item() / max(1.0, w.abs().max().item()) for g, w in zip(got, wanted, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", CONFIGS)
def test_each_primitive_on_each_type(model_type: str, kind: str, bases: Any) -> None:
    """Two patches of a kind and the base in one batch give the logits of the stock model with the same formulas."""
    base = bases(model_type)
    patches = [random_patch(base[0].spec, kind, seed) for seed in range(2)]
    gaps = compare(base, [[(patches[0], 1.0)], [], [(patches[1], 1.0)], [(patches[0], 1.0)]], seed=1)
    assert max(gaps) < 1e-3, gaps


def mixed(spec: BaseSpec, seed: int, draw: random.Random) -> list[RowAdapters]:
    """The base, each kind alone, several with weights, and prefixes behind one another, in any order."""
    one_each: list[RowAdapters] = [[(random_patch(spec, kind, seed), 1.0)] for kind in KINDS]
    weighted = ["low_rank", "scale", "bias", "norm", "delta", "rows", "bottleneck"]
    several: list[RowAdapters] = [
        [(random_patch(spec, kind, at), draw.choice([1.0, 0.5, -0.3, 0.0])) for kind in draw.sample(weighted, 3)]
        for at in range(3)
    ]
    prefixed: list[RowAdapters] = [
        [(random_patch(spec, name, 7), 1.0) for name in names]
        for names in (["prefix_kv", "prefix_embeds"], ["prefix_embeds", "low_rank"], ["bottleneck", "prefix_kv"])
    ]
    wearers: list[RowAdapters] = [[], *one_each, *several, *prefixed, []]
    draw.shuffle(wearers)
    return wearers


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "qwen3"])
def test_all_primitives_mixed_and_composed(model_type: str, seed: int, bases: Any) -> None:
    """Rows of every kind, several hats a row with weights, prefixes after one another, in chunks: each its own."""
    base, draw = bases(model_type), random.Random(seed)
    gaps = compare(base, mixed(base[0].spec, seed, draw), seed, chunk=draw.choice([7, 16, 1000]))
    assert max(gaps) < 1e-3, gaps


def test_a_step_that_only_writes_a_prefix(bases: Any) -> None:
    """A chunk of keys and values that are given, after a step that sampled, computes and samples nothing."""
    loaded, _stock = bases("llama")
    patch = random_patch(loaded.spec, "prefix_kv", seed=0)
    slot = loaded.adapter_slots.insert(loaded.adapter_slots.pack(patch))
    tokens = [*range(-1, -1 - patch.num_virtual, -1), 65]
    assert loaded.runner.run([Row([65], 0, [4], sampling=Sampling())])[0] is not None
    row = Row(tokens[:-1], 0, [0, 1, 2, 3], ((slot, 1.0),), num_virtual=patch.num_virtual)
    assert loaded.runner.run([row]) == [None]
    loaded.adapter_slots.drop(slot)


@pytest.fixture(scope="module", params=PACKERS)
def dressed(
    request: pytest.FixtureRequest, biased_base: Path, artifact: Callable[[str, int], Path]
) -> tuple[Loaded, dict[str, RowAdapters]]:
    """The biased base in each precision, and the base alone, each family, and hats of several families with weights,
    by name."""
    loaded = load_one(biased_base, request.param, num_threads=2)
    patches = {
        family: compile_patch(read_folder(artifact(family, 0)), loaded.spec)
        for family in [*FAMILIES, *FAMILIES_OF_BIASED]
    }
    draw, worn = random.Random(3), {name: [(patch, 1.0)] for name, patch in patches.items()}
    weighed = [patch for patch in patches.values() if not patch.num_virtual]
    for at in range(4):
        adapters = [(patch, draw.choice([0.5, -0.2])) for patch in draw.sample(weighed, 3)]
        worn[f"several {at}"] = [(patches["cartridge"], 1.0), (patches["cpt"], 1.0)][:at] + adapters
    return loaded, {"base": [], **worn}


@pytest.fixture(scope="module")
def prompts(dressed: tuple[Loaded, dict[str, RowAdapters]]) -> list[list[int]]:
    """One for each that is dressed, of 1 to 70 tokens."""
    draw = random.Random(4)
    return [[draw.randrange(200) for _ in range(draw.randrange(1, 71))] for _ in dressed[1]]


@pytest.fixture(scope="module")
def alone(dressed: tuple[Loaded, dict[str, RowAdapters]], prompts: list[list[int]]) -> list[torch.Tensor]:
    """The last logits of each, in a batch of its own and in one piece."""
    loaded, wearers = dressed
    return [run_all(loaded, [worn], [prompt], 1000)[0] for worn, prompt in zip(wearers.values(), prompts, strict=True)]


@pytest.mark.parametrize(("chunk", "num_threads"), [(1, 1), (7, 2), (16, 2), (50, 1), (1000, 2)])
def test_a_row_does_not_depend_on_the_batch(
    chunk: int,
    num_threads: int,
    dressed: tuple[Loaded, dict[str, RowAdapters]],
    prompts: list[list[int]],
    alone: list[torch.Tensor],
) -> None:
    """In every precision logits of every family, and of several at once, are equal bit for bit alone and in a batch of
    all, in chunks, by one thread or two."""
    loaded, wearers = dressed
    set_num_threads(num_threads)
    order = random.Random(chunk).sample(range(len(alone)), len(alone))
    names = [list(wearers)[at] for at in order]
    together = run_all(loaded, [wearers[name] for name in names], [prompts[at] for at in order], chunk)
    wrong = [name for name, at, got in zip(names, order, together, strict=True) if not torch.equal(got, alone[at])]
    assert not wrong


@pytest.mark.real_base
@pytest.mark.parametrize("precision", PACKERS)
def test_a_row_of_the_real_base_does_not_either(precision: str, real_base: Path) -> None:
    """At SmolLM2's sizes, too, in every precision: each kind of primitive and none, alone by one thread and in one
    batch by two, gives the same bits."""
    loaded = load_one(real_base, precision, num_threads=2, kv_cache_bytes=2**27)
    kinds: list[RowAdapters] = [
        [(random_patch(loaded.spec, kind, 1), 1.0)] for kind in ("low_rank", "scale", "bottleneck")
    ]
    wearers, draw = [[], *kinds, [*kinds[0], (kinds[2][0][0], 0.5)], []], random.Random(0)
    prompts = [[draw.randrange(40_000) for _ in range(draw.choice([1, 5, 40]))] for _ in wearers]
    set_num_threads(1)
    alone = [run_all(loaded, [worn], [prompt], 1000)[0] for worn, prompt in zip(wearers, prompts, strict=True)]
    set_num_threads(2)
    for chunk in (16, 1000):
        together = run_all(loaded, wearers, prompts, chunk)
        assert [at for at, got in enumerate(together) if not torch.equal(got, alone[at])] == []
