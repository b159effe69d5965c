"""Everything that one run of the bench measured."""

from __future__ import annotations

import msgspec

from tests.benchmarks.churn import Churn
from tests.benchmarks.machine import Machine
from tests.benchmarks.results import Figures, Run, figures
from tests.benchmarks.shares import Families


class Bench(msgspec.Struct):
    """One run of the bench. `machine` is as it was at the start.

    `facts[peer]` has one entry a repeat; `skipped` peers have their reason.
    """

    machine: Machine
    base: str
    precision: str
    titles: dict[str, str]  # of the workloads
    peers: dict[str, str]  # their titles
    runs: list[Run] = []
    facts: dict[str, list[dict[str, float]]] = {}
    skipped: dict[str, str] = {}
    failed: dict[str, str] = {}  # peers, and parts of our own, that broke: how
    families: Families = msgspec.field(default_factory=Families)
    churn: Churn = msgspec.field(default_factory=Churn)

    def figures(self) -> dict[tuple[str, str], Figures]:
        """Medians by (peer, workload)."""
        keys = dict.fromkeys((run.peer, run.workload) for run in self.runs)
        return {key: figures([run for run in self.runs if (run.peer, run.workload) == key]) for key in keys}
