"""One generation in flight."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from server.core import AdapterRef, Sampling
from server.engine.blocks import BlockTable, namespace_salt, root_key
from server.engine.messages import Submit


class State(Enum):
    """Where a sequence is; it never leaves FINISHED."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """A prompt and what was made of it so far.

    Prefill and decode are one thing: whatever of `tokens` has no KV yet is the remainder, and the next token is
    sampled in the step that leaves none. A preempted sequence is one whose remainder is everything again.
    """

    id: str
    namespace: str
    adapters: tuple[AdapterRef, ...]
    tokens: list[int]  # virtual ones (-1, -2, …), the prompt, then the output
    num_prompt: int  # virtual ones included
    sampling: Sampling
    deadline: float
    arrived: float
    table: BlockTable
    digests: tuple[str, ...]
    share: float = 1.0  # of its namespace, against others
    max_running: int | None = None  # sequences of its namespace at once
    is_probe: bool = False
    state: State = State.WAITING
    is_preempted: bool = False
    num_computed: int = 0
    num_cached: int = 0  # of the prompt, found computed when it was first admitted, virtual ones included
    num_charged: int = 0  # tokens that its namespace was charged for
    first_admitted: float | None = None
    skipped_since: float | None = None  # waiting for an adapter since then
    skipped_at: int | None = None  # how many others with hats had been admitted when it first lacked only a slot
    load_seconds: float = field(default=0.0)

    @classmethod
    def of(cls, submit: Submit) -> Sequence:
        """The sequence that a request asks for."""
        num_virtual = sum(adapter.num_virtual for adapter in submit.adapters)
        root = root_key((adapter.digest, adapter.weight) for adapter in submit.adapters)
        return cls(
            id=submit.sequence_id,
            namespace=submit.namespace,
            adapters=submit.adapters,
            tokens=[*range(-1, -1 - num_virtual, -1), *submit.prompt],
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
        """How many of its tokens have no KV yet; at least 1 until it is finished."""
        return len(self.tokens) - self.num_computed

    @property
    def num_virtual(self) -> int:
        """How many of its first tokens are virtual."""
        return self.table.num_virtual

    @property
    def num_cached_prompt(self) -> int:
        """How many real tokens of the prompt were found computed."""
        return max(0, self.num_cached - self.num_virtual)

    @property
    def num_output(self) -> int:
        """How many tokens were generated."""
        return len(self.tokens) - self.num_prompt
