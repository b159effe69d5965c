"""A model without torch that notices every wrong context.

The fake KV of a position is a hash over the adapters and all tokens up to it, as the true one is. Before a step
computes anything it recomputes that chain and compares it with what lies in the row's blocks: stale, crossed or missing
KV raises. The next token is a hash of the whole context too, so that a wrong answer cannot look right.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from server.core import Logprobs, Row, Sampled, Sampling


class FakeKVError(AssertionError):
    """A row read or wrote KV that is not its own."""


@dataclass(frozen=True)
class FakePacked:
    """A patch without tensors."""

    digest: str
    num_bytes: int


class FakeSlots:
    """Slots that remember whose they are; used ones are given out again first, so that staleness shows."""

    def __init__(self, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self.slots: dict[int, FakePacked] = {}

    def insert(self, packed: FakePacked) -> int:
        """The lowest free slot. Raises `MemoryError` beyond `slot_bytes`."""
        if sum(held.num_bytes for held in self.slots.values()) + packed.num_bytes > self.slot_bytes:
            raise MemoryError(f"{packed.num_bytes} bytes do not fit")
        slot = next(number for number in range(len(self.slots) + 1) if number not in self.slots)
        self.slots[slot] = packed
        return slot

    def drop(self, slot: int) -> None:
        """Free a slot for another."""
        del self.slots[slot]


def chain_start(adapters: Iterable[tuple[str, float]]) -> int:
    """The hash before the first position: it depends on (digest, weight) of each adapter, in order."""
    return int.from_bytes(hashlib.sha256(repr(list(adapters)).encode()).digest()[:7], "big")


def chain(start: int, tokens: Iterable[int]) -> list[int]:
    """The fake KV of `tokens` that follow a position whose fake KV is `start`."""
    cells = []
    for token in tokens:
        start = hash((start, token))  # of whole numbers: the same in every process
        cells.append(start)
    return cells


def score(cell: int, token: int, num_top: int) -> Logprobs:
    """Return the score of a token after a position with this KV."""
    chosen = -float(hash((cell, token)) % 1000) / 8
    return Logprobs(chosen, [(token, chosen)] * num_top, is_greedy=chosen > -60)


def choose(cell: int, sampling: Sampling, vocab_size: int, mask: bytes | None = None) -> int:
    """Return the token after a position with this KV, of those that a mask allows.

    The seed counts if the temperature is above 0.
    """
    seed = sampling.seed if sampling.temperature > 0 else -1
    number = int.from_bytes(hashlib.sha256(f"{cell},{seed}".encode()).digest()[:7], "big")
    if mask is None:
        return number % vocab_size
    allowed = [token for token in range(vocab_size) if mask[token // 8] >> token % 8 & 1]
    return allowed[number % len(allowed)]


class FakeRunner:
    """A `Runner` over a fake KV cache.

    A batch that holds a token of `raises_on` raises; a row that uses a digest of `nonfinite_on` has an error.
    `step_seconds` is how long each step takes.
    """

    def __init__(
        self,
        adapter_slots: FakeSlots,
        num_blocks: int = 64,
        block_size: int = 4,
        vocab_size: int = 512,
        step_seconds: float = 0.0,
    ) -> None:
        self.adapter_slots, self.num_blocks, self.block_size, self.vocab_size = (
            adapter_slots,
            num_blocks,
            block_size,
            vocab_size,
        )
        self.step_seconds = step_seconds
        self.raises_on: set[int] = set()
        self.nonfinite_on: set[str] = set()
        self.batches: list[int] = []  # the number of rows of each step
        self._cells: list[int | None] = [None] * (num_blocks * block_size)

    def copy(self, source: int, target: int) -> None:
        """Copy a block, see `Runner.copy`."""
        source, target = source * self.block_size, target * self.block_size
        self._cells[target : target + self.block_size] = self._cells[source : source + self.block_size]

    def run(self, rows: list[Row]) -> list[Sampled | None]:
        """Run a step, see `Runner.run`. Raises `FakeKVError` if a row's KV is not of its own tokens and adapters."""
        time.sleep(self.step_seconds)
        self.batches.append(len(rows))
        if any(token in self.raises_on for row in rows for token in row.tokens):
            raise RuntimeError("a token that raises")
        written: set[int] = set()
        contexts = [self._write(row, written) for row in rows]
        return [self._sample(row, cells) for row, cells in zip(rows, contexts, strict=True)]

    def _write(self, row: Row, written: set[int]) -> list[int]:
        """Check a row's past, write its tokens' KV, and return that of all its positions."""
        end = row.start + len(row.tokens)
        context = [*range(-1, -1 - row.num_virtual, -1)][:end] + row.history
        if context[row.start :] != row.tokens:
            raise FakeKVError("the history does not end with the row's tokens")
        adapters = [(self.adapter_slots.slots[slot].digest, weight) for slot, weight in row.adapters]
        cells = chain(chain_start(adapters), context)
        places = [
            row.blocks[at // self.block_size] * self.block_size + at % self.block_size for at in range(len(cells))
        ]
        if [self._cells[place] for place in places[: row.start]] != cells[: row.start]:
            raise FakeKVError(f"positions before {row.start} hold the KV of other tokens or adapters")
        if not written.isdisjoint(places):
            raise FakeKVError("two rows of a step share a block that one of them writes")
        written.update(places[row.start :])
        for place, cell in zip(places[row.start :], cells[row.start :], strict=True):
            self._cells[place] = cell
        return cells

    def _sample(self, row: Row, cells: list[int]) -> Sampled | None:
        if not row.num_logits:
            return None
        digests = {self.adapter_slots.slots[slot].digest for slot, _ in row.adapters}
        if digests & self.nonfinite_on:
            return Sampled(error="the logits are not finite")
        scores = []
        if row.targets is not None:
            pairs = zip(cells[row.targets.start :], row.targets.tokens, strict=False)
            scores = [score(cell, token, row.targets.num_top) for cell, token in pairs]
        if row.sampling is None:
            return Sampled(scores=scores)
        num_top, place = row.sampling.logprobs, len(row.history) - row.num_prompt
        given = row.sampling.forced[place : place + 1]
        token = given[0] if given else choose(cells[-1], row.sampling, self.vocab_size, row.mask)
        return Sampled(token, None if num_top is None else Logprobs(-0.25, [(token, -0.25)] * num_top), scores)


def scores_alone(
    prompt: Sequence[int], adapters: Iterable[tuple[str, float]], sampling: Sampling, num_virtual: int = 0
) -> list[Logprobs]:
    """The scores of a prompt that a request must get, whatever else runs."""
    if sampling.prompt_logprobs is None:
        return []
    cells = chain(chain_start(adapters), [*range(-1, -1 - num_virtual, -1), *prompt])[num_virtual:]
    return [
        score(cells[at - 1], prompt[at], sampling.prompt_logprobs) for at in range(sampling.scored_from, len(prompt))
    ]


def answer_alone(
    prompt: Sequence[int],
    adapters: Iterable[tuple[str, float]],
    sampling: Sampling,
    num_virtual: int = 0,
    *,
    vocab_size: int,
    eos_token_ids: Iterable[int],
    max_sequence_tokens: int,
) -> tuple[list[int], str]:
    """The tokens and the finish reason that a request must get, whatever else runs."""
    context = [*range(-1, -1 - num_virtual, -1), *prompt]
    cell, output, eos = chain(chain_start(adapters), context)[-1], [], set(eos_token_ids)
    if not sampling.max_tokens:
        return [], "length"
    while True:
        token = choose(cell, sampling, vocab_size)
        output.append(token)
        cell = chain(cell, [token])[-1]
        if sampling.is_end(token, eos):
            return output, "stop"
        if len(output) >= sampling.max_tokens or len(context) + len(output) >= max_sequence_tokens:
            return output, "length"
