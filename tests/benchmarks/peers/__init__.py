"""The servers that are asked the same. A peer is a file here and a line in `PEERS`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.benchmarks.results import Run
from tests.benchmarks.workload import Prompted, Workload

ME, UNCACHED = "manyhats", "manyhats-uncached"
ENVIRONMENTS = Path("build/peers")  # where `make peer-NAME` puts a peer, below the repository


@dataclass(frozen=True)
class Setup:
    """What every peer is given: the base's folder, the adapters' PEFT folders by number, a scratch folder, threads."""

    base: Path
    adapters: list[Path]
    scratch: Path
    num_threads: int
    precision: str  # of our own server; a peer says its own in its title
    shared: Path  # a folder for what a peer makes once for all its rounds


class Session(Protocol):
    """A peer that is up. `facts` are figures of it as a whole (start-up, memory), by name with the unit."""

    facts: dict[str, float]

    def run(self, workload: Workload, requests: list[Prompted], on_done: Callable[[], None]) -> Run:
        """Answer all requests in full, `workload.concurrency` at once; `on_done` is called for each."""
        ...


class Peer(Protocol):
    """A way to serve the workloads."""

    @property
    def title(self) -> str:
        """How tables and plots call it."""
        ...

    @property
    def workloads(self) -> tuple[str, ...]:
        """Of every round."""
        ...

    @property
    def once(self) -> tuple[str, ...]:
        """Of the first round alone: no figure to reach is made of them."""
        ...

    def missing(self) -> str | None:
        """Why it cannot run here, in a word, or None."""
        ...

    def start(self, setup: Setup) -> AbstractContextManager[Session]:
        """Start it, with all adapters at hand; end it on the way out."""
        ...


def all_peers() -> dict[str, Peer]:
    """Every peer by name, our own server first."""
    from tests.benchmarks.peers.llama import Llama
    from tests.benchmarks.peers.manyhats import Manyhats, Uncached
    from tests.benchmarks.peers.openvino import OpenVino
    from tests.benchmarks.peers.peft import Peft
    from tests.benchmarks.peers.vllm import Vllm

    return {
        ME: Manyhats(),
        UNCACHED: Uncached(),
        "peft": Peft(),
        "openvino": OpenVino(),
        "llama": Llama(),
        "vllm": Vllm(),
    }
