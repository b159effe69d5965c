"""Make the committed workloads from the trace's request lengths: `python -m tests.benchmarks.make_workloads`.

The lengths are those of the trace, scaled down to a mean prompt of 128 and a mean answer of 64 tokens (this is for a
small model on a CPU), their spread kept. W2, W3 and W4 ask the same lengths in the same order, so that ratios compare
equal work; their texts differ, so that no prefix of one is found cached by another.
"""

from __future__ import annotations

import csv
import random

from tests.benchmarks.workload import HERE, Request, Workload, write

SEED = 2
NUM_REQUESTS, NUM_ALONE = 64, 12
MEAN_PROMPT, MEAN_ANSWER = 128, 64
PROMPT_LIMITS, ANSWER_LIMITS = (8, 512), (16, 128)
CORPUS_TOKENS = 40_000  # fewer than the corpus has in any usual tokenizer
NUM_LANES = 8  # workloads whose offsets are of different remainders never share one
NUM_ADAPTERS, ZIPF = 32, 1.0
LORA = {
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def lengths() -> list[tuple[int, int]]:
    """(prompt, answer) tokens of `NUM_REQUESTS` requests drawn from the trace, scaled."""
    with (HERE / "data" / "azure_conv.csv").open(newline="") as file:
        rows = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
    drawn = random.Random(SEED).sample(rows, NUM_REQUESTS)
    prompts = scaled([prompt for prompt, _ in drawn], MEAN_PROMPT, *PROMPT_LIMITS)
    answers = scaled([answer for _, answer in drawn], MEAN_ANSWER, *ANSWER_LIMITS)
    return list(zip(prompts, answers, strict=True))


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


def workload(name: str, title: str, concurrency: int, adapters: list[int | None]) -> Workload:
    """One workload over the trace's lengths, its prompts at offsets of its own."""
    draw = random.Random(f"{SEED} {name}")
    sizes = lengths()[: len(adapters)]
    lane = int(name.removeprefix("W"))
    offsets = draw.sample(range(lane, CORPUS_TOKENS - PROMPT_LIMITS[1], NUM_LANES), len(adapters))
    requests = [
        Request(adapter, offset, prompt, answer)
        for adapter, offset, (prompt, answer) in zip(adapters, offsets, sizes, strict=True)
    ]
    return Workload(name, title, concurrency, NUM_ADAPTERS, LORA, requests)


def main() -> None:
    """Write all workloads."""
    mixed = zipf(random.Random(SEED), NUM_REQUESTS)
    write(workload("W1", "one stream, one adapter", 1, [0] * NUM_ALONE))
    write(workload("W2", "one adapter, 16 at once", 16, [0] * NUM_REQUESTS))
    write(workload("W3", "32 adapters (Zipf 1.0), 16 at once", 16, [*mixed]))
    write(workload("W4", "the base alone, 16 at once", 16, [None] * NUM_REQUESTS))


if __name__ == "__main__":
    main()
