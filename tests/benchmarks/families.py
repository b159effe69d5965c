"""Every family in one batch: 16 requests, each with an adapter of its own, of one method, of mixed methods, of none.

The base is asked again before every few methods, and each method is held against the base around it, so that slow drift
of the machine falls on both.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from tests.benchmarks.artifacts import artifacts
from tests.benchmarks.load import ask_all
from tests.benchmarks.peers import Setup
from tests.benchmarks.results import Timing
from tests.benchmarks.shares import BASE, MIXED, Decode, Families, Worn, decode_rate, spread
from tests.benchmarks.workload import Prompted
from tests.kit.adapters import zip_folder
from tests.kit.server import Server, serve

NUM_REQUESTS, NUM_PROMPT, NUM_TOKENS = 16, 32, 128
NUM_WARM_UP = 4  # tokens of each request, before what counts
SLOT_BYTES = 2**30  # of the server: what the adapters of one method take at most
GROUP = 3  # methods between two batches of the base


@dataclass(frozen=True)
class Adapter:
    """One that the server has: the task that it is worn by, its virtual tokens, its bytes on the device."""

    task: str
    num_virtual: int = 0
    slot_bytes: int = 0


def start(setup: Setup) -> AbstractContextManager[Server]:
    """Our own server, with slots for all adapters of a batch."""
    return serve(
        setup.base,
        setup.scratch / "families-data",
        precision=setup.precision,
        num_threads=setup.num_threads,
        slot_bytes=SLOT_BYTES,
    )


def upload(server: Server, task: str, folder: Path) -> Adapter:
    """Give the server a PEFT folder as `task`."""
    said = server.upload(task, zip_folder(folder))
    return Adapter(task, said["virtual_tokens"], said["slot_bytes"])


def cut_prompts(corpus: list[int], num: int) -> list[list[int]]:
    """`num` different prompts, from the corpus' end: those of `soft_prompts` are from its beginning."""
    first = len(corpus) - num * NUM_PROMPT
    return [corpus[offset : offset + NUM_PROMPT] for offset in range(first, len(corpus), NUM_PROMPT)]


@dataclass
class Batches:
    """A server, and what it is asked: a batch is all `prompts` at once, the same for every method."""

    server: Server
    setup: Setup
    prompts: list[list[int]]
    into: Families
    adapters: dict[str, list[Adapter]] = field(default_factory=lambda: {BASE: [Adapter(BASE)]})

    def run(self, methods: list[str], num_rounds: int) -> Iterator[str]:
        """Measure every method and a mixed batch; the name of each batch when it was measured."""
        self.ask(BASE, self.into.num_tokens)  # to warm up
        todo = [*methods, MIXED]
        for first in range(0, len(todo), GROUP):
            group = todo[first : first + GROUP]
            for method in group:
                self.dress(method)
            for method in [BASE, *group] * num_rounds:
                yield self._measure(method)
        yield self._measure(BASE)

    def _measure(self, method: str) -> str:
        self.into.decodes.append(Decode(method, decode_rate(self.ask(method, self.into.num_tokens))))
        return method

    def dress(self, method: str) -> None:
        """Upload the method's adapters, and ask each for a few tokens, which brings it into its slot."""
        worn = self._mixed() if method == MIXED else list(self._upload(method))
        self.adapters[method] = worn
        self.into.worn[method] = Worn(len({*worn}), statistics.mean(adapter.slot_bytes for adapter in worn))
        self.ask(method, NUM_WARM_UP)

    def _upload(self, method: str) -> Iterator[Adapter]:
        """As many as there are requests, or as many of them as the slots hold together."""
        folder, num_bytes = self.setup.scratch / method, 0
        for number, path in enumerate(artifacts(method, self.setup.base, folder, len(self.prompts))):
            adapter = upload(self.server, f"{method}-{number}", path)
            num_bytes += adapter.slot_bytes
            if num_bytes > SLOT_BYTES:
                break
            yield adapter
        shutil.rmtree(folder)

    def _mixed(self) -> list[Adapter]:
        """One of each of as many methods as there are requests."""
        methods = spread([method for method in self.adapters if method != BASE], len(self.prompts))
        return [self.adapters[method][place % len(self.adapters[method])] for place, method in enumerate(methods)]

    def ask(self, method: str, num_tokens: int) -> list[Timing]:
        """One batch, so many tokens of each request."""
        worn = [self.adapters[method][place % len(self.adapters[method])] for place in range(len(self.prompts))]
        requests = [
            Prompted(place, prompt, num_tokens, worn[place].num_virtual) for place, prompt in enumerate(self.prompts)
        ]
        _, timings = ask_all(self.server.url, requests, len(requests), lambda place: worn[place].task, lambda: None)
        return timings


def num_batches(num_methods: int, num_rounds: int) -> int:
    """How many batches `Batches.run` measures."""
    num_groups = -(-(num_methods + 1) // GROUP)
    return num_rounds * (num_methods + 1 + num_groups) + 1
