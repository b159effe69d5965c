"""How fast answers in forms come beside free ones, and texts are scored: `python -m tests.benchmarks.forms --help`.

16 clients ask the real base over eight LoRA adapters. Rounds of answers in a schema and of free answers of the same
lengths take turns; the figure is the ratio of their tokens a second. `half` is a form every second token of which has
no choice. No prompt is asked twice, so that none is found in the prefix cache.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx2

from adapters_store.base.resolve import SMOLLM2, resolve_base
from tests.kit.adapters import make_lora, zip_folder
from tests.kit.server import serve

NUM_CLIENTS, NUM_ADAPTERS, MAX_TOKENS = 16, 8, 64
PROMPT = "Customer {number}: my card has not arrived, and I ordered it two weeks ago in Oslo. Answer in JSON: "
LABELS = ("yes", "no", "maybe", "card arrival", "lost card", "refund", "exchange rate", "pin blocked")


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def _text(length: int) -> dict[str, Any]:
    return {"type": "string", "maxLength": length}


FORMS: dict[str, dict[str, Any]] = {
    "schema": {
        "type": "json_schema",
        "schema": _object(
            {
                "name": _text(40),
                "notes": {"type": "array", "items": _text(30), "minItems": 3, "maxItems": 6},
                "city": _text(40),
                "reason": _text(120),
            }
        ),
    },
    "half": {"type": "regex", "regex": "([0-9]7){32}"},  # a digit is a token
}


customers = itertools.count()  # each asks once


async def timed(num: int, ask: Callable[[int], Awaitable[int]]) -> tuple[int, float]:
    """Ask for the requests 0 ..; return what their answers counted, and the seconds."""
    numbers, total, began = iter(range(num)), 0, time.monotonic()

    async def client() -> None:
        nonlocal total
        for number in numbers:
            count = await ask(number)  # others count meanwhile
            total += count

    await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))
    return total, time.monotonic() - began


async def generate(http: httpx2.AsyncClient, number: int, fields: dict[str, Any]) -> Any:
    """Ask one of the adapters for an answer to a prompt of its own."""
    body = {"prompt": PROMPT.format(number=next(customers)), **fields}
    return (await http.post(f"/generate?task=t{number % NUM_ADAPTERS}", json=body)).raise_for_status().json()


class Round:
    """Requests that clients ask for: in a schema, or free and as long as other answers were."""

    def __init__(self, kind: str, num: int, lengths: dict[int, int] | None = None) -> None:
        self.kind, self.num, self.asked_lengths = kind, num, lengths
        self.lengths: dict[int, int] = {}
        self.times: list[float] = []

    async def tokens_per_second(self, http: httpx2.AsyncClient) -> float:
        """Measure it."""
        num_tokens, seconds = await timed(self.num, partial(self._ask, http))
        late = statistics.quantiles(self.times, n=20)[-1]
        print(f"{self.kind}: {num_tokens / seconds:.1f} tokens/s, first token {late:.0f} ms (p95)", flush=True)
        return num_tokens / seconds

    async def _ask(self, http: httpx2.AsyncClient, number: int) -> int:
        if self.asked_lengths is None:
            own = {"response_format": FORMS[self.kind], "max_tokens": MAX_TOKENS}
        else:
            own = {"ignore_eos": True, "max_tokens": self.asked_lengths[number]}
        answer = await generate(http, number, {"seed": number, "temperature": 0.8, **own})
        self.times.append(answer["timing"]["ttft_ms"])
        self.lengths[number] = int(answer["usage"]["completion_tokens"])
        return self.lengths[number]


async def ratio(http: httpx2.AsyncClient, kind: str, num: int) -> float:
    """Measure the speed of answers in a schema over that of free ones."""
    formed = Round(kind, num)
    speed = await formed.tokens_per_second(http)
    return speed / await Round("free", num, formed.lengths).tokens_per_second(http)


async def first_token_ms(http: httpx2.AsyncClient, num: int) -> dict[str, float]:
    """Measure the wait for the first token (p95) of one client alone, by turns in a schema of its own and free."""
    times: dict[str, list[float]] = {"own schema": [], "free": []}
    for number in range(num):
        schema = _object({f"field_{number}": _text(40), "reason": _text(120)})
        forms: tuple[dict[str, Any], ...] = ({"response_format": {"type": "json_schema", "schema": schema}}, {})
        for found, form in zip(times.values(), forms, strict=True):
            answer = await generate(http, number, {"max_tokens": 2, **form})
            found.append(answer["timing"]["ttft_ms"])
    return {kind: statistics.quantiles(found, n=20)[-1] for kind, found in times.items()}


async def scores_per_minute(http: httpx2.AsyncClient, num: int) -> float:
    """Measure short continuations of prompts, eight of each."""

    async def ask(number: int) -> int:
        body = {"prompt": PROMPT.format(number=next(customers)), "continuations": [f" {label}" for label in LABELS]}
        (await http.post(f"/score?task=t{number % NUM_ADAPTERS}", json=body)).raise_for_status()
        return len(LABELS)

    num_scores, seconds = await timed(num, ask)
    return 60 * num_scores / seconds


def shown(figures: list[float]) -> str:
    """All rounds in a line."""
    return ", ".join(f"{figure:.3g}" for figure in figures)


async def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default=SMOLLM2, help="what `manyhats serve --base` takes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=96, help="of a round")
    given = parser.parse_args()
    base = resolve_base(given.base)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        with serve(base, scratch / "data", log_level="error") as server:
            for seed in range(NUM_ADAPTERS):
                server.upload(f"t{seed}", zip_folder(make_lora(scratch / str(seed), base, seed, r=8)))
            async with httpx2.AsyncClient(base_url=server.url, timeout=600) as http:
                for kind in FORMS:
                    await ratio(http, kind, NUM_CLIENTS)  # warm
                ratios: dict[str, list[float]] = {kind: [] for kind in FORMS}
                scored = []
                for _ in range(given.rounds):
                    for kind, found in ratios.items():
                        found.append(await ratio(http, kind, given.requests))
                    scored.append(await scores_per_minute(http, given.requests))
                waits = await first_token_ms(http, given.requests)
    print("first token (p95) of one client:", ", ".join(f"{kind} {wait:.1f} ms" for kind, wait in waits.items()))
    for kind, found in ratios.items():
        print(f"{kind}: {statistics.median(found):.2f} times the speed of free answers ({shown(found)})")
    print(f"scores: {statistics.median(scored):.0f} continuations a minute ({shown(scored)})")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
