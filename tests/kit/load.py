"""Load that checks what it gets: every answer must be exactly one of those that a solo request got before."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import httpx2


@dataclass(frozen=True)
class Asked:
    """A task and the body of a request, greedy or seeded, so that it has one answer a version."""

    task: str
    body: Mapping[str, Any]


@dataclass
class Report:
    """What came: statuses, mismatches (what was asked and got), and times in seconds."""

    statuses: Counter[int] = field(default_factory=Counter)
    mismatches: list[tuple[Asked, list[int]]] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # until the first token
    gaps: list[float] = field(default_factory=list)  # between two events of a stream

    @property
    def num_right(self) -> int:
        """Answers that were as they must be."""
        return self.statuses[httpx2.codes.OK] - len(self.mismatches)

    def percentile(self, times: Sequence[float], share: float) -> float:
        """The time that this share of them does not exceed."""
        return sorted(times)[min(len(times) - 1, int(share * len(times)))]


async def ask(http: httpx2.AsyncClient, asked: Asked, report: Report | None = None) -> tuple[int, list[int]]:
    """Status and tokens of a stream."""
    report, began, tokens = report or Report(), time.monotonic(), list[int]()
    body = {**asked.body, "stream": True}
    async with http.stream("POST", f"/generate?task={asked.task}", json=body) as answer:
        if answer.status_code != httpx2.codes.OK:
            await answer.aread()
            return answer.status_code, []
        last = began
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                return int(httpx2.codes.INTERNAL_SERVER_ERROR), tokens
            now = time.monotonic()
            (report.gaps if tokens else report.first).append(now - last)
            tokens += event.get("token_ids", [])
            last = now
        return answer.status_code, tokens


async def solo(http: httpx2.AsyncClient, asked: Sequence[Asked]) -> dict[int, list[list[int]]]:
    """The answer of each, alone, by its place: what load is then checked against. Add those of other versions to it."""
    return {place: [(await ask(http, one))[1]] for place, one in enumerate(asked)}


async def load(
    http: httpx2.AsyncClient,
    asked: Sequence[Asked],
    right: Mapping[int, Sequence[list[int]]],
    *,
    num_clients: int,
    seconds: float,
    most: int | None = None,
) -> Report:
    """So many clients ask in turn, each the next, for so long (or `most` requests); every answer is checked."""
    report, until = Report(), time.monotonic() + seconds
    numbers = count() if most is None else iter(range(most))

    async def client() -> None:
        while time.monotonic() < until and (number := next(numbers, None)) is not None:
            place = number % len(asked)
            status, tokens = await ask(http, asked[place], report)
            report.statuses[status] += 1
            if status == httpx2.codes.OK and tokens not in right[place]:
                report.mismatches.append((asked[place], tokens))

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return report
