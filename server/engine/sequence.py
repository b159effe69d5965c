"""A generation in flight: its tokens, its KV blocks and its place in the schedule."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from server.core import AdapterRef, Sampling, ScoredTokens
from server.engine.blocks import BlockTable, namespace_salt, root_key
from server.engine.forms import FormMatcher
from server.engine.messages import Submit


class State(Enum):
    """The state of a sequence; FINISHED is final."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """A prompt and the tokens generated so far.

    Prefill and decode are one thing: the tokens without KV are the remainder, and the next token is sampled in the step
    that leaves none. The remainder of a preempted sequence is all of its tokens again, but for those that were scored.
    Times are monotonic seconds.
    """

    id: str
    namespace: str
    adapters: tuple[AdapterRef, ...]
    tokens: list[int]  # virtual positions of prefixes (-1, -2, …), the prompt, then the output
    num_prompt: int  # virtual positions included
    sampling: Sampling
    deadline: float
    arrived: float
    table: BlockTable
    digests: tuple[str, ...]
    share: float = 1.0  # weight of its namespace against others
    max_running: int | None = None  # sequences of its namespace that run at once
    is_probe: bool = False
    grammar: str | None = None  # of the form that its answer must fit, if there is to be one
    form: FormMatcher | None = None  # once it is compiled
    state: State = State.WAITING
    is_preempted: bool = False
    num_computed: int = 0
    num_cached: int = 0  # of `num_prompt`, found in the prefix cache when it was first admitted
    num_charged: int = 0  # tokens that its namespace was charged for
    num_scored: int = 0  # of the prompt's tokens
    num_spared: int = 0  # the last token of a text that is only scored: nothing is predicted by it
    num_fast_forward: int = 0  # of the last tokens: its form allowed no others, so no step sampled them
    first_admitted: float | None = None
    skipped_since: float | None = None  # since then it waits for an adapter
    skipped_at: int | None = None  # how many sequences with adapters had been admitted when it first lacked only slots
    load_seconds: float = 0.0  # waited for adapters

    @classmethod
    def of(cls, submit: Submit) -> Sequence:
        """Make the waiting sequence that a request asks for, or one that goes on with an answer."""
        num_virtual = sum(adapter.num_virtual for adapter in submit.adapters)
        root = root_key((adapter.digest, adapter.weight) for adapter in submit.adapters)
        sequence = cls(
            id=submit.sequence_id,
            namespace=submit.namespace,
            adapters=submit.adapters,
            tokens=[*range(-1, -1 - num_virtual, -1), *submit.prompt, *submit.answered],
            num_prompt=num_virtual + len(submit.prompt),
            sampling=submit.sampling,
            deadline=submit.deadline,
            arrived=submit.arrived,
            table=BlockTable(root, namespace_salt(submit.namespace), num_virtual),
            digests=tuple(dict.fromkeys(adapter.digest for adapter in submit.adapters)),
            share=submit.share,
            max_running=submit.max_running,
            is_probe=submit.is_probe,
            grammar=submit.form if submit.sampling.max_tokens else None,
        )
        sequence.note_scored(0)
        sequence.num_spared = int(not submit.sampling.max_tokens and sequence.scoring_at < sequence.scoring_end)
        return sequence

    def note_scored(self, num_tokens: int) -> None:
        """Count tokens of the prompt that were scored; those that are left must be computed, cached or not."""
        self.num_scored += num_tokens
        self.table.max_cached = self.scoring_at if self.scoring_at < self.scoring_end else None

    @property
    def scoring_at(self) -> int:
        """The position whose logits score the next token of the prompt; `scoring_end` or more if none is left."""
        if self.sampling.prompt_logprobs is None:
            return self.scoring_end
        return self.num_virtual + self.sampling.scored_from - 1 + self.num_scored

    @property
    def scoring_end(self) -> int:
        """The position after the last whose logits score a token of the prompt."""
        return self.num_prompt - 1

    def targets(self, num_tokens: int) -> ScoredTokens | None:
        """The tokens of the prompt that a step over the next `num_tokens` scores."""
        first, last = self.scoring_at, min(self.num_computed + num_tokens, self.scoring_end)
        if first >= last:
            return None
        return ScoredTokens(first, self.tokens[first + 1 : last + 1], self.sampling.prompt_logprobs or 0)

    def num_targets(self, num_tokens: int) -> int:
        """The number of tokens of the prompt that a step over the next `num_tokens` scores."""
        return max(0, min(self.num_computed + num_tokens, self.scoring_end) - self.scoring_at)

    @property
    def remainder(self) -> int:
        """The number of tokens that need KV and have none; at least 1 until the sequence is finished."""
        return len(self.tokens) - self.num_spared - self.num_computed

    @property
    def is_decode(self) -> bool:
        """Whether nothing is left to compute but the token that was sampled last, and those that had to follow it."""
        return self.remainder <= 1 + self.num_fast_forward

    @property
    def is_form_due(self) -> bool:
        """Whether it has a form that is not compiled yet."""
        return self.grammar is not None and self.form is None

    @property
    def num_virtual(self) -> int:
        """The number of virtual positions that it begins with."""
        return self.table.num_virtual

    @property
    def num_cached_prompt(self) -> int:
        """The number of real tokens of the prompt that were found in the prefix cache."""
        return max(0, min(self.num_cached, self.num_prompt) - self.num_virtual)

    @property
    def num_output(self) -> int:
        """The number of tokens generated so far."""
        return len(self.tokens) - self.num_prompt
