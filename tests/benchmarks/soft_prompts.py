"""What a soft prompt costs the first token after its first use: one request at a time, with and without it by turns."""

from __future__ import annotations

from collections.abc import Iterator

from peft import PeftConfig, PrefixTuningConfig, PromptTuningConfig

from tests.benchmarks.families import Adapter, upload
from tests.benchmarks.load import ask_all
from tests.benchmarks.peers import Setup
from tests.benchmarks.shares import BASE, Wait
from tests.benchmarks.workload import Prompted
from tests.kit.adapters import Fill, make_peft, shake
from tests.kit.families.prompts import TASK_TYPE, cached
from tests.kit.server import Server

NUM_VIRTUAL = 100
NUM_PROMPTS = (32, 128)  # tokens: of the batches, and the mean of the workloads
NUM_WARM_UP = 3
NUM_WAITS = 2 * len(NUM_PROMPTS)  # how many are measured


def run(server: Server, setup: Setup, corpus: list[int], num_repeats: int) -> Iterator[Wait]:
    """Each length of prompts with each adapter. No prompt comes twice, but once with and once without."""
    tokens, adapters = iter(corpus), _upload(server, setup)
    for num_prompt in NUM_PROMPTS:
        for adapter in adapters:
            wait = Wait(adapter.task, adapter.num_virtual, num_prompt)
            for repeat in range(-NUM_WARM_UP, num_repeats):
                prompt = [next(tokens) for _ in range(num_prompt)]
                pair = [(Adapter(BASE), wait.without_ms), (adapter, wait.with_ms)]
                for worn, times in pair if repeat % 2 else reversed(pair):
                    time = first_token_ms(server, Prompted(0, prompt, 1, worn.num_virtual), worn.task)
                    times += [time] if repeat >= 0 else []
            yield wait


def _upload(server: Server, setup: Setup) -> list[Adapter]:
    """A soft prompt and a prefix, both of `NUM_VIRTUAL` tokens."""
    configs: dict[str, tuple[PeftConfig, Fill]] = {
        "prompt-tuning": (PromptTuningConfig(task_type=TASK_TYPE, num_virtual_tokens=NUM_VIRTUAL), shake(3.0)),
        "prefix-tuning": (PrefixTuningConfig(task_type=TASK_TYPE, num_virtual_tokens=NUM_VIRTUAL), cached),
    }
    for method, (config, fill) in configs.items():
        upload(server, method, make_peft(setup.scratch / f"soft-{method}", setup.base, config, fill=fill))
    return [Adapter(method, NUM_VIRTUAL) for method in configs]


def first_token_ms(server: Server, request: Prompted, task: str) -> float:
    """Milliseconds from the request to its first token, nothing else running."""
    _, (timing,) = ask_all(server.url, [request], 1, lambda _: task, lambda: None)
    assert timing.first is not None
    return 1e3 * (timing.first - timing.started)
