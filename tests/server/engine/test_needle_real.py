"""The needle with the real runner: each request among others gets what it gets alone."""

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from adapters_store.artifact import read_folder
from adapters_store.methods import compile_patch
from server.engine.engine import Engine
from server.engine.messages import EngineConfig, Hat, Submit
from server.model.batch import Sampling
from server.model.packed import Packed
from server.model.runner import Loaded, RunnerConfig, load
from tests.kit.adapters import make_lora

NUM_ADAPTERS = 8
NUM_REQUESTS = 13  # a world; 16 worlds are 208 needles


@pytest.fixture(scope="module")
def folders(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of different ranks by their digests, which are their numbers here."""
    parent = tmp_path_factory.mktemp("adapters")
    return {str(at): make_lora(parent / str(at), tiny_base, seed=at, r=2**at // 2 + 1) for at in range(NUM_ADAPTERS)}


def load_base(tiny_base: Path, num_blocks: int, block_size: int) -> Loaded:
    block_bytes = 2 * 2 * 2 * 16 * 4 * block_size  # layers, k and v, heads, size of a head, fp32
    kv_cache_bytes = num_blocks * block_bytes
    return load(
        RunnerConfig(
            folder=str(tiny_base),
            name="tiny",
            precision="fp32",
            num_threads=1,
            kv_cache_bytes=kv_cache_bytes,
            block_size=block_size,
        )
    )


def engine_of(loaded: Loaded, folders: dict[str, Path], executor: ThreadPoolExecutor, **limits: Any) -> Engine[Packed]:
    def load_adapter(digest: str) -> Packed:
        return loaded.bank.pack(compile_patch(read_folder(folders[digest]), loaded.spec))

    config = EngineConfig(folder="", name="tiny", blobs="", **{"max_sequence_tokens": 700} | limits)
    return Engine(
        loaded.runner, loaded.bank, load_adapter, config, eos_token_ids=[257], executor=executor, clock=time.monotonic
    )


def random_request(draw: random.Random, name: str, earlier: list[Submit]) -> Submit:
    """Lengths 1-600; some begin as an earlier one does, for the prefix cache."""
    prompt = [draw.randrange(256) for _ in range(draw.choice([draw.randrange(1, 30), draw.randrange(1, 601)]))]
    hats = draw.choice([(), (Hat(str(draw.randrange(NUM_ADAPTERS))),), (Hat("1", 0.5), Hat("2", 0.5))])
    if earlier and draw.random() < 0.3:
        like = draw.choice(earlier)
        prompt = (like.prompt[: draw.randrange(1, len(like.prompt) + 1)] + prompt)[:600]
        hats = draw.choice([like.hats, hats])  # the same beginning under other hats must not be shared
    sampling = Sampling(
        max_tokens=draw.randrange(1, 24),
        temperature=draw.choice([0.0, 0.8]),
        top_p=draw.choice([1.0, 0.9]),
        seed=draw.randrange(1000),
        repetition_penalty=draw.choice([1.0, 1.2]),
    )
    return Submit(name, "t", prompt, sampling, 1e18, 0.0, hats)


def answers(engine: Engine[Packed], requests: list[Submit], draw: random.Random | None) -> dict[str, list[int]]:
    """Each request's tokens; with `draw` they arrive at random while others run, else one runs after another."""
    tokens: dict[str, list[int]] = {request.sequence_id: [] for request in requests}
    for request in requests:
        engine.submit(request)
        for _ in range(1_000_000 if draw is None else draw.choice([0, 0, 1, 4])):
            if not engine.has_work:
                break
            take(engine, tokens)
    while engine.has_work:
        take(engine, tokens)
    return tokens


def take(engine: Engine[Packed], tokens: dict[str, list[int]]) -> None:
    done = engine.step()
    if done is None:
        time.sleep(0.001)  # an adapter loads
    for output in done.outputs if done else ():
        assert output.failure is None, output.failure
        tokens[output.sequence_id] += output.token_ids


@pytest.mark.parametrize("seed", range(16))
def test_needle_with_the_real_runner(seed: int, tiny_base: Path, folders: dict[str, Path]) -> None:
    """Under chunks, preemption, few slots, and the prefix cache on or off: greedy or seeded, 0 mismatches."""
    draw = random.Random(seed)
    requests: list[Submit] = []
    for at in range(NUM_REQUESTS):
        requests.append(random_request(draw, f"r{at}", requests))
    small = load_base(tiny_base, num_blocks=draw.choice([48, 60, 200]), block_size=16)
    large = load_base(tiny_base, num_blocks=200, block_size=32)
    one = max(small.bank.pack(compile_patch(read_folder(path), small.spec)).num_bytes for path in folders.values())
    max_batch_tokens = draw.choice([16, 64, 512])
    with ThreadPoolExecutor(2) as executor:
        crowded = engine_of(
            small,
            folders,
            executor,
            max_batch_tokens=max_batch_tokens,
            max_running=draw.randrange(2, 17),
            slot_bytes=2 * one,
            host_bytes=3 * one,
            is_prefix_cached=seed % 2 == 0,
        )
        solo = engine_of(large, folders, executor, is_prefix_cached=False)
        together = answers(crowded, requests, draw)
        alone = answers(solo, requests, None)
        wrong = [name for name in together if together[name] != alone[name]]
        assert not wrong, [(name, together[name], alone[name]) for name in wrong]
        crowded.assert_consistent()
        assert crowded.stats().num_blocks_used == crowded.stats().num_pins == 0


def test_preempted_and_evicted_answers_are_right(tiny_base: Path, folders: dict[str, Path]) -> None:
    """Where blocks and slots are so few that sequences are preempted and adapters evicted, nothing is mixed up."""
    draw = random.Random(0)
    sampling = Sampling(max_tokens=60, ignore_eos=True)
    prompts = [[draw.randrange(256) for _ in range(60)] for _ in range(3)]
    requests = [
        Submit(f"r{at}", "t", draw.choice(prompts), sampling, 1e18, 0.0, (Hat(str(at % NUM_ADAPTERS)),))
        for at in range(12)
    ]
    small = load_base(tiny_base, num_blocks=45, block_size=16)
    large = load_base(tiny_base, num_blocks=200, block_size=32)
    with ThreadPoolExecutor(2) as executor:
        crowded = engine_of(small, folders, executor, slot_bytes=2**19, max_running=8)
        together = answers(crowded, requests, draw)
        assert together == answers(engine_of(large, folders, executor, is_prefix_cached=False), requests, None)
        assert crowded.stats().preemptions_total > 0
        assert crowded.stats().evictions_total > 0
