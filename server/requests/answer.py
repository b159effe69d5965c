"""Types of one generation: what is asked, a piece of text, the whole answer."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from adapters_store.registry.tenants import TenantLimits
from server.core import Logprobs, Sampling, Timing
from server.requests.resolve import ResolvedAdapters


@dataclass(frozen=True)
class GenerationJob:
    """Everything that the answers of one request depend on."""

    resolved: ResolvedAdapters
    prompts: list[list[int]]
    sampling: Sampling
    n: int = 1
    stop: list[str] = field(default_factory=list)
    timeout_s: float = 120.0
    arrived: float = field(default_factory=time.monotonic)
    limits: TenantLimits = field(default_factory=TenantLimits)

    @property
    def max_total_tokens(self) -> int:
        """Tokens of the prompts, and the most that the answers can have."""
        return sum(map(len, self.prompts)) + self.num_choices * self.sampling.max_tokens

    @property
    def num_choices(self) -> int:
        """Choices of all prompts; the choice `number` of prompt `prompt` has the index `prompt * n + number`."""
        return len(self.prompts) * self.n


@dataclass
class Chunk:
    """What came for one choice: `finish_reason` marks its last piece."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[Logprobs]
    finish_reason: str | None = None

    @classmethod
    def empty(cls, index: int) -> Chunk:
        """Nothing yet."""
        return cls(index, "", [], [])

    def extend(self, chunk: Chunk) -> None:
        """Take in the next piece of the same choice."""
        self.text += chunk.text
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs
        self.finish_reason = chunk.finish_reason


@dataclass
class GenerationState:
    """What is known of a request's answers so far."""

    num_prompt: int
    num_completion: int = 0
    cached: dict[int, int] = field(default_factory=dict)  # prompt -> its tokens that no choice had to compute
    virtual: dict[int, int] = field(default_factory=dict)  # prompt -> virtual tokens before it
    timing: Timing = field(default_factory=Timing)
    total_ms: float = 0.0
    num_begun: int = 0  # choices that have a token
    ended: int = 0
    is_free: bool = False  # refused before any work: nobody pays
    is_over: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompts and of the answers."""
        return self.num_prompt + self.num_completion

    def used(self) -> tuple[int, int, int]:
        """What is to be paid so far: requests, prompt tokens, completion tokens."""
        if self.is_free or not (self.is_over or self.num_completion):
            return 0, 0, 0
        return int(self.is_over), self.num_prompt, self.num_completion

    def usage(self) -> dict[str, int]:
        """The contract's `usage`."""
        return {
            "prompt_tokens": self.num_prompt,
            "cached_tokens": sum(self.cached.values()),
            "virtual_tokens": sum(self.virtual.values()),
            "completion_tokens": self.num_completion,
        }

    def times(self) -> dict[str, float]:
        """The contract's `timing`."""
        marks = {"queued_ms": self.timing.queued_ms, "load_ms": self.timing.load_ms, "ttft_ms": self.timing.ttft_ms}
        return {name: round(value, 3) for name, value in {**marks, "total_ms": self.total_ms}.items()}
