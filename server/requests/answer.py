"""Types of one generation: the job, a chunk of text, the progress of all answers, and the answers themselves."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec

from adapters_store.registry.tenants import TenantLimits
from adapters_store.tools.parser import AnswerFormat, Part
from server.core import AdapterRef, Logprobs, Sampling, Timing
from server.engine.messages import Output, Submit
from server.requests.resolve import ResolvedAdapters

SEED_STEP = 0x9E3779B97F4A7C15  # between the seeds of a request's choices


@dataclass(frozen=True)
class GenerationJob:
    """A prepared request: all that its answers depend on. `prompts` are token ids; times are monotonic seconds.

    With `tells_prompts` the first chunk of a choice has its prompt. `scored_from` has the first token that is scored
    of prompts that begin alike: the first of these is computed before the others, which find its beginning computed.
    `labels` are texts whose probabilities behind each prompt are told, with their tokens.
    """

    resolved: ResolvedAdapters
    prompts: list[list[int]]
    sampling: Sampling
    n: int = 1
    stop: list[str] = field(default_factory=list)
    timeout_s: float = 120.0
    arrived: float = field(default_factory=time.monotonic)
    limits: TenantLimits = field(default_factory=TenantLimits)
    lead: str = ""  # taken off the beginning of each answer
    tells_prompts: bool = False
    scored_from: list[int] | None = None
    form: str | None = None  # the grammar that each answer must fit
    answer_format: AnswerFormat | None = None  # the parts to cut answers into
    labels: dict[str, list[int]] = field(default_factory=dict)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompts, and of the labels behind each."""
        return sum(map(len, self.prompts)) + len(self.prompts) * sum(map(len, self.labels.values()))

    @property
    def max_total_tokens(self) -> int:
        """Tokens of the prompts, and the most that the answers can have."""
        return self.num_prompt_tokens + self.num_choices * self.sampling.max_tokens

    @property
    def num_sequences(self) -> int:
        """Sequences of the engine: one a choice, and one a prompt and label."""
        return self.num_choices + len(self.prompts) * len(self.labels)

    @property
    def num_choices(self) -> int:
        """Choices of all prompts; the choice `number` of prompt `prompt` has the index `prompt * n + number`."""
        return len(self.prompts) * self.n

    def submit(self, index: int) -> Submit:
        """The sequence of the choice `index`. Choices of a prompt differ in their seed alone."""
        seed, prompt = (self.sampling.seed + SEED_STEP * index) % 2**63, index // self.n
        scored_from = 1 if self.scored_from is None else self.scored_from[prompt]
        sampling = msgspec.structs.replace(self.sampling, seed=seed, scored_from=scored_from)
        return self._submit(self.prompts[prompt], sampling, self.form)

    def submit_label(self, prompt: list[int], label: str) -> Submit:
        """The sequence that scores a label behind a prompt."""
        sampling = Sampling(max_tokens=0, prompt_logprobs=0, scored_from=len(prompt))
        return self._submit([*prompt, *self.labels[label]], sampling, None)

    def _submit(self, prompt: list[int], sampling: Sampling, form: str | None) -> Submit:
        return Submit(
            sequence_id=uuid.uuid4().hex,
            namespace=self.resolved.tenant,
            prompt=prompt,
            sampling=sampling,
            deadline=self.arrived + self.timeout_s,
            arrived=self.arrived,
            adapters=tuple(AdapterRef(one.digest, weight, one.num_virtual) for one, weight in self.resolved.adapters),
            share=self.limits.share,
            max_running=self.limits.max_running,
            form=form,
        )


@dataclass
class ReadPrompt:
    """A prompt that the engine has read: its tokens, and the scores of the last of them that were asked for."""

    token_ids: list[int]
    scores: list[Logprobs] = field(default_factory=list)


@dataclass
class Chunk:
    """New tokens and text of one choice; `finish_reason` marks its last chunk, and the first may tell the prompt.

    The last has the probability of each label, if they were asked for, and `is_stopped` says of it that a stop text
    ended the choice, and no token.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[Logprobs]
    finish_reason: str | None = None
    prompt: ReadPrompt | None = None
    is_stopped: bool = False
    parts: list[Part] | None = None  # content, reasoning and calls of an answer that is cut into them
    label_probs: dict[str, float] | None = None

    @classmethod
    def empty(cls, index: int) -> Chunk:
        """A chunk without tokens."""
        return cls(index, "", [], [])

    def extend(self, chunk: Chunk) -> None:
        """Append the next chunk of the same choice."""
        self.text += chunk.text
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs
        self.finish_reason, self.is_stopped = chunk.finish_reason, chunk.is_stopped
        self.prompt, self.label_probs = self.prompt or chunk.prompt, chunk.label_probs
        if chunk.parts is not None:
            self.parts = [*(self.parts or []), *chunk.parts]


@dataclass
class GenerationState:
    """Progress of a request's answers: token counts, times in milliseconds, and how many choices began or ended."""

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

    def count(self, prompt: int, output: Output, chunk: Chunk) -> None:
        """Count one output of a choice of `prompt`, and the chunk that was made of it."""
        self.num_begun += output.timing is not None  # the engine's first output has it
        self.num_completion += len(chunk.token_ids)
        self.cached[prompt] = min(self.cached.get(prompt, output.cached_tokens), output.cached_tokens)
        self.virtual[prompt] = output.virtual_tokens
        if output.timing is not None and self.timing.ttft_ms < output.timing.ttft_ms:
            self.timing = output.timing

    def used(self) -> tuple[int, int, int]:
        """Usage to be paid so far: requests, prompt tokens, completion tokens."""
        if self.is_free or not (self.is_over or self.num_completion):
            return 0, 0, 0
        return int(self.is_over), self.num_prompt, self.num_completion

    def usage(self) -> dict[str, int]:
        """The HTTP contract's `usage` object."""
        return {
            "prompt_tokens": self.num_prompt,
            "cached_tokens": sum(self.cached.values()),
            "virtual_tokens": sum(self.virtual.values()),
            "completion_tokens": self.num_completion,
        }

    def times(self) -> dict[str, float]:
        """The HTTP contract's `timing` object, in milliseconds."""
        marks = {"queued_ms": self.timing.queued_ms, "load_ms": self.timing.load_ms, "ttft_ms": self.timing.ttft_ms}
        return {name: round(value, 3) for name, value in {**marks, "total_ms": self.total_ms}.items()}


@dataclass
class Generation:
    """The answers to one spec. `job` and `progress` are those of the answers once their first chunk is there."""

    chunks: AsyncGenerator[Chunk] = field(init=False)  # of all choices, as they come
    job: GenerationJob = field(init=False)
    progress: GenerationState = field(default_factory=lambda: GenerationState(0))
    resolved: ResolvedAdapters | None = None

    async def collect(self) -> list[Chunk]:
        """Read all choices, each whole, in order. Raises `ServerError`; cancelled, it ends the answers."""
        choices: dict[int, Chunk] = {}
        async with aclosing(self.chunks) as chunks:
            async for chunk in chunks:
                choices.setdefault(chunk.index, Chunk.empty(chunk.index)).extend(chunk)
        return [choices[index] for index in sorted(choices)]

    def log_facts(self) -> dict[str, Any]:
        """The facts for the request's log line: its task once resolved, its usage once it was submitted."""
        task = {} if self.resolved is None else {"task": self.resolved.task}
        return {**task, **(self.progress.usage() if self.progress.num_prompt else {})}
