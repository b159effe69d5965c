"""PEFT's own way to mix adapters: `generate(adapter_names=[...])`, in process, fp32, in batches of `concurrency`.

It gets its best case: all requests at once, batches of answers of like length (a batch lasts as long as its longest),
and no adapter names where a batch wears one adapter or none. Only the tokens that were asked for count.
"""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from tests.benchmarks.peers import Setup
from tests.benchmarks.peers.worker import Worker, jobs, say, worker
from tests.benchmarks.results import Run, Timing
from tests.benchmarks.workload import Prompted, Workload


class Peft:
    """Hugging Face PEFT."""

    title = "PEFT generate, batch of 16, fp32"
    workloads, once = ("W3",), ("W1", "W2", "W4")

    def missing(self) -> str | None:
        """It is a dependency of ours."""
        return None

    @contextmanager
    def start(self, setup: Setup) -> Iterator[PeftSession]:
        """Load the base and every adapter in a process of its own."""
        command = [sys.executable, "-m", "tests.benchmarks.peers.peft"]
        with worker(command, setup.scratch / "peft.log", setup.num_threads) as process:
            folders = [str(folder) for folder in setup.adapters]
            yield PeftSession(process, process.ask({"base": str(setup.base), "adapters": folders}))


class PeftSession:
    """A model with all adapters loaded."""

    def __init__(self, process: Worker, facts: dict[str, float]) -> None:
        self._process, self.facts = process, facts

    def run(self, workload: Workload, requests: list[Prompted], on_done: Callable[[], None]) -> Run:
        """See `Session.run`."""
        job = {"concurrency": workload.concurrency, "requests": msgspec.to_builtins(requests)}
        result = self._process.ask(job, on_done)
        self.facts["pss_mib"] = result["pss_mib"]
        timings = msgspec.convert(result["timings"], list[Timing])
        return Run("peft", workload.name, result["seconds"], timings, result["pss_mib"])


def main() -> None:
    """The worker: the first job loads, every other is a workload."""
    warnings.simplefilter("ignore", FutureWarning)
    todo = jobs()
    model, facts = load(next(todo))
    say(facts)
    for job in todo:
        say(run(model, job))


def load(job: dict[str, Any]) -> tuple[Any, dict[str, float]]:
    """The base in fp32 with every adapter under its number."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    began = time.perf_counter()
    base = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32)
    base.generation_config.eos_token_id = None
    base.generation_config.pad_token_id = 0
    loaded = time.perf_counter()
    model = PeftModel.from_pretrained(base, job["adapters"][0], adapter_name="0")
    for number, folder in enumerate(job["adapters"][1:], 1):
        model.load_adapter(folder, adapter_name=str(number))
    per_adapter = 1e3 * (time.perf_counter() - loaded) / len(job["adapters"])
    return model.eval(), {"load_base_s": loaded - began, "load_adapter_ms": per_adapter}


def run(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    """All requests in batches of like answer lengths."""
    import psutil

    requests = sorted(msgspec.convert(job["requests"], list[Prompted]), key=lambda request: request.max_tokens)
    timings, began = [], time.perf_counter()
    for first in range(0, len(requests), job["concurrency"]):
        batch = requests[first : first + job["concurrency"]]
        started = time.perf_counter() - began
        generate(model, batch)
        ended = time.perf_counter() - began
        timings += [Timing(len(request.prompt), request.max_tokens, started, ended) for request in batch]
        say({"done": len(batch)})
    seconds, pss = time.perf_counter() - began, psutil.Process().memory_full_info().pss
    return {"seconds": seconds, "timings": msgspec.to_builtins(timings), "pss_mib": pss / 2**20}


def generate(model: Any, batch: list[Prompted]) -> None:
    """One left-padded batch, as long as its longest answer."""
    import torch

    longest = max(len(request.prompt) for request in batch)
    ids = torch.tensor([[0] * (longest - len(request.prompt)) + request.prompt for request in batch])
    mask = torch.tensor([[0] * (longest - len(request.prompt)) + [1] * len(request.prompt) for request in batch])
    worn = {request.adapter for request in batch}
    options: dict[str, Any] = {}
    if len(worn) > 1:
        names = ["__base__" if request.adapter is None else str(request.adapter) for request in batch]
        options["adapter_names"] = names
    elif worn != {None}:
        model.set_adapter(str(batch[0].adapter))
    most = max(request.max_tokens for request in batch)
    with torch.inference_mode(), model.disable_adapter() if worn == {None} else contextlib.nullcontext():
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=most, do_sample=False, **options)
    assert out.shape[1] == longest + most, "PEFT stopped early"


if __name__ == "__main__":
    main()
