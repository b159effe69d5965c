"""An engine over fakes whose clock, loads and randomness belong to the test."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from server.core import AdapterRef, EngineFailure, Logprobs, RunnerConfig, Sampling
from server.engine.engine import Engine
from server.engine.forms import FormCompiler
from server.engine.messages import EngineConfig, Output, StepDone, Submit
from server.engine.sequence import Sequence
from server.model.fake import FakePacked, FakeRunner, FakeSlots, answer_alone, scores_alone
from tests.server.engine.spawners import LateSpawner

EOS = [7]
DIGEST_BYTES = 10


def virtual_of(number: int) -> int:
    """Return the virtual positions of adapter `number` in a world with prefixes: every third one has some."""
    return 1 + number * 5 % 13 if number % 3 == 2 else 0


def digest_of(number: int) -> str:
    """A digest for a number; adapters 0, 1, 2 … differ from their first letter on."""
    return f"{number:08d}" * 8


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeLoader:
    """Makes fake patches; a digest in `errors` raises, one in `sizes` is not of `DIGEST_BYTES`."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.errors: dict[str, Exception] = {}
        self.loaded: list[str] = []

    def __call__(self, digest: str) -> FakePacked:
        self.loaded.append(digest)
        if digest in self.errors:
            raise self.errors[digest]
        return FakePacked(digest, self.sizes.get(digest, DIGEST_BYTES))


def config(name: str = "fake", *, max_sequence_tokens: int | None = None, **fields: Any) -> EngineConfig:
    """Small limits, so that everything runs out."""
    runner = RunnerConfig(folder="-", name=name, max_sequence_tokens=max_sequence_tokens)
    small: dict[str, Any] = {
        "runner": runner,
        "blobs": "-",
        "max_batch_tokens": 16,
        "max_running": 8,
        "max_waiting": 1000,
        "slot_bytes": 4 * DIGEST_BYTES,
        "host_bytes": 8 * DIGEST_BYTES,
        "copy_bytes_per_step": 2 * DIGEST_BYTES,
    }
    return EngineConfig(**small | fields)


@dataclass
class RequestAnswer:
    """The tokens, outputs and end of one request so far."""

    tokens: list[int] = field(default_factory=list)
    scores: list[Logprobs] = field(default_factory=list)
    finish_reason: str | None = None
    failure: EngineFailure | None = None
    outputs: list[Output] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return self.finish_reason is not None or self.failure is not None

    def add(self, output: Output) -> None:
        """Take the next output; nothing may follow the last."""
        assert not self.is_over, "an output after the last one"
        self.tokens += output.token_ids
        self.scores += output.scores
        self.finish_reason, self.failure = output.finish_reason, output.failure
        self.outputs.append(output)


class World:
    """An engine, its fakes, and the answers so far."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        vocab_size: int = 512,
        has_prefixes: bool = False,
        forms: FormCompiler[Sequence] | None = None,
        **fields: Any,
    ) -> None:
        self.config, self.has_prefixes = config(**fields), has_prefixes
        self.clock, self.spawner, self.loader = Clock(), LateSpawner(), FakeLoader()
        self.adapter_slots = FakeSlots(self.config.slot_bytes)
        self.runner = FakeRunner(self.adapter_slots, num_blocks, block_size, vocab_size)
        self.engine: Engine[FakePacked] = Engine(
            self.runner,
            self.adapter_slots,
            self.loader,
            self.config,
            eos_token_ids=EOS,
            spawner=self.spawner,
            clock=self.clock,
            forms=forms,
        )
        self.requests: dict[str, Submit] = {}
        self.answers: dict[str, RequestAnswer] = {}

    def submit(
        self,
        prompt: list[int],
        *numbers: int | tuple[int, float],
        namespace: str = "t",
        timeout: float = 1e9,
        form: str | None = None,
        answered: list[int] | None = None,
        **sampling: Any,
    ) -> str:
        """Submit a request; the adapters are numbers, with or without a weight."""
        weighted = [(number, 1.0) if isinstance(number, int) else number for number in numbers]
        adapters = tuple(
            AdapterRef(digest_of(number), weight, virtual_of(number) if self.has_prefixes else 0)
            for number, weight in weighted
        )
        name = f"r{len(self.requests)}"
        deadline = self.clock.now + timeout
        request = Submit(name, namespace, prompt, Sampling(**sampling), deadline, self.clock.now, adapters)
        request.form, request.answered = form, answered or []
        self.requests[name], self.answers[name] = request, RequestAnswer()
        self.engine.submit(request)
        return name

    def step(self, seconds: float = 0.01) -> StepDone | None:
        """Make one step; the engine's bookkeeping is checked after each."""
        self.clock.now += seconds
        done = self.engine.step()
        for output in done.outputs if done else ():
            self.answers[output.sequence_id].add(output)
        self.engine.assert_consistent()
        return done

    def run(self, max_steps: int = 100_000, is_loading: bool = True) -> None:
        """Step until nothing is left."""
        for _ in range(max_steps):
            if not self.engine.has_work:
                return
            if is_loading:
                self.spawner.run_all()
            self.step()
        raise AssertionError(f"{len(self.engine.sequences)} sequences are left after {max_steps} steps")

    def alone(self, name: str) -> tuple[list[int], str]:
        """Return the answer that the request must get."""
        request = self.requests[name]
        return answer_alone(
            request.prompt,
            [(adapter.digest, adapter.weight) for adapter in request.adapters],
            request.sampling,
            sum(adapter.num_virtual for adapter in request.adapters),
            vocab_size=self.runner.vocab_size,
            eos_token_ids=EOS,
            max_sequence_tokens=self.engine.max_sequence_tokens,
        )

    def scores_alone(self, name: str) -> list[Logprobs]:
        """Return the scores of its prompt that the request must get."""
        request = self.requests[name]
        adapters = [(adapter.digest, adapter.weight) for adapter in request.adapters]
        num_virtual = sum(adapter.num_virtual for adapter in request.adapters)
        return scores_alone(request.prompt, adapters, request.sampling, num_virtual)

    def is_right(self, name: str) -> bool:
        """Whether the request got what it gets alone."""
        answer = self.answers[name]
        is_answered = answer.failure is None and (answer.tokens, answer.finish_reason) == self.alone(name)
        return is_answered and answer.scores == self.scores_alone(name)

    def assert_at_rest(self) -> None:
        """Assert that no block, pin or user is held, and that the slots hold what the bookkeeping says."""
        stats = self.engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_blocks_used, stats.num_pins) == (0, 0, 0, 0)
        assert not self.engine.sequences
        assert sorted(packed.digest for packed in self.adapter_slots.slots.values()) == sorted(
            self.engine.adapters.slots.sizes
        )
        self.engine.assert_consistent()


def prompt_of(random_: random.Random, num_tokens: int, vocab_size: int = 512) -> list[int]:
    """Random tokens without the end-of-sequence token."""
    return [random_.randrange(8, vocab_size) for _ in range(num_tokens)]
