"""The real process: a tiny random base, artifacts of the store, and the answers of PEFT alone."""

import asyncio
import os
import signal
import time
import warnings
from pathlib import Path

import psutil
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adapters_store.storage.directory import Blobs
from server.core import AdapterRef, RunnerConfig, Sampling
from server.engine.client import EngineStartError
from server.engine.messages import EngineConfig, Submit
from server.engine.process_client import ProcessEngineClient
from tests.kit.adapters import make_lora
from tests.kit.stored import store

PROMPT = [72, 101, 108, 108, 111]
NUM_TOKENS = 12


def ask(name: str, *digests: str) -> Submit:
    now, sampling = time.monotonic(), Sampling(max_tokens=NUM_TOKENS, ignore_eos=True)
    return Submit(name, "t", PROMPT, sampling, now + 60, now, tuple(AdapterRef(digest) for digest in digests))


def reference(base: Path, adapter: Path | None) -> list[int]:
    """Answer greedily by transformers, with PEFT if there is an adapter."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = PeftModel.from_pretrained(model, adapter)
    tokens = torch.tensor([PROMPT])
    with torch.inference_mode():
        for _ in range(NUM_TOKENS):
            best = model(input_ids=tokens).logits[0, -1].argmax()
            tokens = torch.cat([tokens, best.view(1, 1)], 1)
    return [int(token) for token in tokens[0, len(PROMPT) :]]


def test_real_process_serves_the_base_and_stored_adapters(tiny_base: Path, tmp_path: Path) -> None:
    """Base and LoRA rows of one process answer as transformers and PEFT do; an absent artifact fails alone."""
    folders = [make_lora(tmp_path / f"lora{seed}", tiny_base, seed=seed, r=4 * (seed + 1)) for seed in range(2)]
    blobs = Blobs(tmp_path / "blobs")
    digests = [store(blobs, folder) for folder in folders]
    base = RunnerConfig(folder=str(tiny_base), name="tiny", precision="fp32", num_threads=1, kv_cache_bytes=2**22)
    config = EngineConfig(runner=base, blobs=str(blobs.root))

    async def main() -> list[list[int]]:
        client = ProcessEngineClient(config)
        await client.start()
        try:
            assert client.ready is not None and client.ready.spec.name == "tiny"
            assert client.ready.spec.linears

            async def answer(submit: Submit) -> list[int]:
                outputs = [output async for output in client.generate(submit)]
                failure = outputs[-1].failure
                assert (failure.code if failure else None) == ("adapter_failed" if submit.sequence_id == "r3" else None)
                return [token for output in outputs for token in output.token_ids]

            adapters = [(), (digests[0],), (digests[1],), ("f" * 64,)]
            answers = await asyncio.gather(*(answer(ask(f"r{at}", *used)) for at, used in enumerate(adapters)))
            assert await client.residency() == {digests[0]: "slot", digests[1]: "slot", "f" * 64: "failed"}
            return answers
        finally:
            await client.close()

    answers = asyncio.run(asyncio.wait_for(main(), 120))
    assert answers[:3] == [reference(tiny_base, folder) for folder in (None, *folders)]
    assert answers[3] == []


def test_base_that_cannot_be_served_is_told(tmp_path: Path) -> None:
    """The engine's reason reaches the caller that starts it."""
    config = EngineConfig(runner=RunnerConfig(folder=str(tmp_path / "nothing"), name="nothing"), blobs=str(tmp_path))

    async def main() -> str:
        client = ProcessEngineClient(config)
        with pytest.raises(EngineStartError) as raised:
            await client.start()
        return str(raised.value)

    assert "nothing" in asyncio.run(asyncio.wait_for(main(), 120))


def test_loader_processes_end_with_the_engine(tiny_base: Path, tmp_path: Path) -> None:
    """The engine has as many loader processes as may load at once; they are gone when it is killed."""
    base = RunnerConfig(folder=str(tiny_base), name="tiny", kv_cache_bytes=2**22)
    config = EngineConfig(runner=base, blobs=str(tmp_path), num_loaders=3)

    async def main() -> list[psutil.Process]:
        client = ProcessEngineClient(config)
        await client.start()
        try:
            assert client.pid is not None
            loader_pool = psutil.Process(client.pid).children(recursive=True)  # and the process that forks them
            os.kill(client.pid, signal.SIGKILL)
            return await asyncio.to_thread(lambda: psutil.wait_procs(loader_pool, 30)[0])
        finally:
            await client.close()

    assert len(asyncio.run(asyncio.wait_for(main(), 120))) == 3 + 1
