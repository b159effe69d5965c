"""A server's metrics as numbers: what a load or a crash changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import httpx2
from prometheus_client.parser import text_string_to_metric_families

Key = tuple[str, frozenset[tuple[str, str]]]


@dataclass(frozen=True)
class Reading:
    """All samples of one moment."""

    samples: Mapping[Key, float]

    @classmethod
    def of(cls, text: str) -> Reading:
        """Read Prometheus's text format."""
        families = text_string_to_metric_families(text)
        return cls({(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples})

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples of a name that have these labels; 0 where there is none."""
        wanted = frozenset(labels.items())
        return sum(value for (other, has), value in self.samples.items() if other == name and wanted <= has)

    def since(self, before: Reading) -> Reading:
        """What changed."""
        return Reading({key: value - before.samples.get(key, 0.0) for key, value in self.samples.items()})


def read(url: str, key: str | None = None) -> Reading:
    """The metrics of the server at a URL."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return Reading.of(httpx2.get(f"{url}/metrics", headers=headers, timeout=30).raise_for_status().text)
