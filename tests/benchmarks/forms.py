"""How fast answers in forms come beside free ones, and texts are scored: `python -m tests.benchmarks.forms --help`.

16 clients ask the real base over eight LoRA adapters. Rounds of free answers and of answers in a schema take turns; the
figure is the ratio of their tokens a second. `few` is a schema most of whose tokens have no choice.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
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


SCHEMAS = {
    "free": None,
    "schema": _object(
        {
            "name": _text(40),
            "notes": {"type": "array", "items": _text(30), "minItems": 3, "maxItems": 6},
            "city": _text(40),
            "reason": _text(120),
        }
    ),
    "few": _object(
        {
            name: {"enum": ["yes", "no"]}
            for name in ("the_customer_is_satisfied", "the_parcel_has_arrived", "a_refund_was_requested", "is_polite")
        }
    ),
}


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


async def tokens_per_second(http: httpx2.AsyncClient, kind: str, num: int) -> float:
    """Measure answers of a kind, free or in a schema."""
    schema = SCHEMAS[kind]
    form = {"ignore_eos": True} if schema is None else {"response_format": {"type": "json_schema", "schema": schema}}
    times = list[float]()

    async def ask(number: int) -> int:
        sampling = {"max_tokens": MAX_TOKENS, "seed": number, "temperature": 0.8}
        body = {"prompt": PROMPT.format(number=number), **sampling, **form}
        answer = (await http.post(f"/generate?task=t{number % NUM_ADAPTERS}", json=body)).raise_for_status().json()
        times.append(answer["timing"]["ttft_ms"])
        return int(answer["usage"]["completion_tokens"])

    num_tokens, seconds = await timed(num, ask)
    late = statistics.quantiles(times, n=20)[-1]
    print(f"{kind}: {num_tokens / seconds:.1f} tokens/s, first token {late:.0f} ms (p95)", flush=True)
    return num_tokens / seconds


async def scores_per_minute(http: httpx2.AsyncClient, num: int) -> float:
    """Measure short continuations of prompts, eight of each."""

    async def ask(number: int) -> int:
        body = {"prompt": PROMPT.format(number=number), "continuations": [f" {label}" for label in LABELS]}
        (await http.post(f"/score?task=t{number % NUM_ADAPTERS}", json=body)).raise_for_status()
        return len(LABELS)

    num_scores, seconds = await timed(num, ask)
    return 60 * num_scores / seconds


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
                for kind in SCHEMAS:
                    await tokens_per_second(http, kind, NUM_CLIENTS)  # warm
                ratios: dict[str, list[float]] = {kind: [] for kind in SCHEMAS}
                for _ in range(given.rounds):
                    speeds = {kind: await tokens_per_second(http, kind, given.requests) for kind in SCHEMAS}
                    for kind, speed in speeds.items():
                        ratios[kind].append(speed / speeds["free"])
                scored = await scores_per_minute(http, given.requests)
    for kind, found in ratios.items():
        print(f"{kind}: {statistics.median(found):.2f} times the speed of free answers")
    print(f"scores: {scored:.0f} continuations a minute")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
