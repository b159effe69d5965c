"""Make the committed workloads from the trace's request lengths: `python -m tests.benchmarks.make_workloads`.

The lengths are those of the trace, scaled down to a mean prompt of 128 and a mean answer of 64 tokens (this is for a
small model on a CPU), their spread kept. W2, W3, W4 and W6 ask the same lengths in the same order, so that ratios
compare equal work; their texts differ, so that no prefix of one is found cached by another. W7 keeps the order and the
arrival times of neighbouring requests of the trace, so its bursts too; only the pace is set.
"""

from __future__ import annotations

import csv
import random
from datetime import datetime
from typing import NamedTuple

from tests.benchmarks.workload import HERE, Request, Workload, write

SEED = 2
NUM_REQUESTS, NUM_ALONE = 64, 12
MEAN_PROMPT, MEAN_ANSWER = 128, 64
PROMPT_LIMITS, ANSWER_LIMITS = (8, 512), (16, 128)
CORPUS_TOKENS = 40_000  # fewer than the corpus has in any usual tokenizer
NUM_LANES = 8  # workloads whose offsets are of different remainders never share one
NUM_ADAPTERS, ZIPF = 32, 1.0
NUM_PREFIX, NUM_PREFIXED, NUM_OWN = 512, 8, 32  # W5: tokens of a prefix, adapters that have one, tokens after it
MEAN_SHORT, SHORT_LIMITS = 16, (4, 64)  # W5's answers
NUM_MANY = 200  # W6: of rank 8 on all linear layers they take twice the slots that the server has by default
NUM_ARRIVALS, LOADS = 48, (0.5, 0.8, 1.2)  # W7
LORA = {
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


class Row(NamedTuple):
    """One request of the trace: when it came, its tokens."""

    at: datetime
    num_prompt: int
    num_answer: int


def trace() -> list[Row]:
    """The committed excerpt."""
    with (HERE / "data" / "azure_conv.csv").open(newline="") as file:
        return [
            Row(datetime.fromisoformat(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
            for row in csv.DictReader(file)
        ]


def lengths(rows: list[Row]) -> list[tuple[int, int]]:
    """(prompt, answer) tokens of the rows, scaled."""
    prompts = scaled([row.num_prompt for row in rows], MEAN_PROMPT, *PROMPT_LIMITS)
    answers = scaled([row.num_answer for row in rows], MEAN_ANSWER, *ANSWER_LIMITS)
    return list(zip(prompts, answers, strict=True))


def drawn() -> list[Row]:
    """`NUM_REQUESTS` rows of the trace, the same for every closed loop."""
    return random.Random(SEED).sample(trace(), NUM_REQUESTS)


def scaled(values: list[int], mean: int, least: int, most: int) -> list[int]:
    """The values times one factor, clipped, so that their mean is `mean` (found by bisection)."""
    low, high = 0.0, float(most)
    for _ in range(60):
        factor = (low + high) / 2
        clipped = [min(max(round(value * factor), least), most) for value in values]
        low, high = (factor, high) if sum(clipped) < mean * len(values) else (low, factor)
    return clipped


def zipf(draw: random.Random, num: int) -> list[int]:
    """`num` adapters drawn with probability proportional to 1 / rank^ZIPF."""
    weights = [1 / (rank + 1) ** ZIPF for rank in range(NUM_ADAPTERS)]
    return draw.choices(range(NUM_ADAPTERS), weights, k=num)


def offsets(name: str, lane: int, num: int) -> list[int]:
    """`num` places in the corpus that no other lane has."""
    return random.Random(f"{SEED} {name}").sample(range(lane, CORPUS_TOKENS - PROMPT_LIMITS[1], NUM_LANES), num)


def closed(name: str, title: str, concurrency: int, adapters: list[int | None], lane: int | None = None) -> Workload:
    """A closed loop over the drawn lengths, its prompts at offsets of its own."""
    places = offsets(name, int(name.removeprefix("W")) if lane is None else lane, len(adapters))
    sizes = lengths(drawn())[: len(adapters)]
    requests = [Request(adapter, place, *size) for adapter, place, size in zip(adapters, places, sizes, strict=True)]
    return Workload(name, title, concurrency, NUM_ADAPTERS, LORA, requests)


def prefixed() -> Workload:
    """W5: each of a few adapters has a long prefix, as a system prompt is; what users ask and get is short."""
    places = offsets("W5", 5, NUM_PREFIXED + NUM_REQUESTS)
    answers = scaled([row.num_answer for row in drawn()], MEAN_SHORT, *SHORT_LIMITS)
    adapters = [*range(NUM_PREFIXED)] * (NUM_REQUESTS // NUM_PREFIXED)
    random.Random(SEED).shuffle(adapters)
    requests = [
        Request(adapter, place, NUM_OWN, answer)
        for adapter, place, answer in zip(adapters, places[NUM_PREFIXED:], answers, strict=True)
    ]
    title = f"{NUM_PREFIX}-token prefix of each of {NUM_PREFIXED} adapters, {NUM_OWN} own tokens, 16 at once"
    prefixes = places[:NUM_PREFIXED]
    return Workload("W5", title, 16, NUM_ADAPTERS, LORA, requests, num_prefix=NUM_PREFIX, prefixes=prefixes)


def more_than_fit() -> Workload:
    """W6: W3 with many more adapters, each as likely as the other."""
    adapters = random.Random(SEED).choices(range(NUM_MANY), k=NUM_REQUESTS)
    workload = closed("W6", f"{NUM_MANY} adapters (uniform), more than fit in slots, 16 at once", 16, [*adapters])
    workload.num_adapters = NUM_MANY
    return workload


def arriving() -> list[Workload]:
    """W7: neighbours in the trace, in its order and at its times, at so much of the capacity."""
    draw, rows = random.Random(f"{SEED} W7"), trace()
    first = draw.randrange(len(rows) - NUM_ARRIVALS)
    rows = rows[first : first + NUM_ARRIVALS]
    pace = (NUM_ARRIVALS - 1) / (rows[-1].at - rows[0].at).total_seconds()
    arrivals = [round(pace * (row.at - rows[0].at).total_seconds(), 4) for row in rows]
    adapters, sizes = zipf(draw, NUM_ARRIVALS), lengths(rows)
    places = iter(offsets("W7", 7, NUM_ARRIVALS * len(LOADS)))
    return [
        Workload(
            f"W7-{load}",
            f"open loop, the trace's arrivals at {load} of W3's speed",
            16,
            NUM_ADAPTERS,
            LORA,
            [Request(adapter, next(places), *size) for adapter, size in zip(adapters, sizes, strict=True)],
            load=load,
            arrivals=arrivals,
        )
        for load in LOADS
    ]


def main() -> None:
    """Write all workloads."""
    mixed = zipf(random.Random(SEED), NUM_REQUESTS)
    uniform = random.Random(f"{SEED} uniform").choices(range(NUM_ADAPTERS), k=NUM_REQUESTS)
    write(closed("W1", "one stream, one adapter", 1, [0] * NUM_ALONE))
    write(closed("W2", "one adapter, 16 at once", 16, [0] * NUM_REQUESTS))
    write(closed("W3", "32 adapters (Zipf 1.0), 16 at once", 16, [*mixed]))
    write(closed("W3-uniform", "32 adapters (uniform), 16 at once", 16, [*uniform], lane=0))
    write(closed("W4", "the base alone, 16 at once", 16, [None] * NUM_REQUESTS))
    write(prefixed())
    write(more_than_fit())
    for workload in arriving():
        write(workload)


if __name__ == "__main__":
    main()
