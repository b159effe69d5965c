"""A generation in flight: its tokens, its KV blocks and its place in the schedule."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from server.core import AdapterRef, Sampling
from server.engine.blocks import BlockTable, namespace_salt, root_key
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
    that leaves none. The remainder of a preempted sequence is all of its tokens again. Times are monotonic seconds.
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
    state: State = State.WAITING
    is_preempted: bool = False
    num_computed: int = 0
    num_cached: int = 0  # of `num_prompt`, found in the prefix cache when it was first admitted
    num_charged: int = 0  # tokens that its namespace was charged for
    first_admitted: float | None = None
    skipped_since: float | None = None  # since then it waits for an adapter
    skipped_at: int | None = None  # how many sequences with adapters had been admitted when it first lacked only slots
    load_seconds: float = 0.0  # waited for adapters

    @classmethod
    def of(cls, submit: Submit) -> Sequence:
        """Make the waiting sequence that a request asks for, or one that goes on with an answer."""
        num_virtual = sum(adapter.num_virtual for adapter in submit.adapters)
        root = root_key((adapter.digest, adapter.weight) for adapter in submit.adapters)
        return cls(
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
        )

    @property
    def remainder(self) -> int:
        """The number of tokens without KV; at least 1 until the sequence is finished."""
        return len(self.tokens) - self.num_computed

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
