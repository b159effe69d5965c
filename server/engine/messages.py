"""Messages between the API process and the engine process: msgpack frames over a unix socket, never pickle.

Each message is tagged with its class name; `server.engine.frames` says how a frame is laid out. Times are seconds of
CLOCK_MONOTONIC, which both processes share, unless a field's name ends in `_ms` or `_seconds`.
"""

from __future__ import annotations

import msgspec

from adapters_store.base.spec import BaseSpec, ItemBytes
from server.core import AdapterRef, EngineFailure, ForwardReport, Logprobs, RunnerConfig, Sampling, Timing

FP32_MAX = 3.4028234663852886e38


class EngineConfig(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The first message that an engine process reads: the base to run, where adapters are stored, and limits."""

    runner: RunnerConfig
    blobs: str  # folder of artifacts; uploads are staged in it even if `store` is set
    store: str | None = None  # folder or fsspec URL of artifacts; None is `blobs`
    max_batch_tokens: int = 512  # tokens a step, over all rows
    max_running: int = 32  # sequences a step
    max_waiting: int = 1024  # sequences in the queue
    slot_bytes: int = 512 * 2**20  # packed adapters in slots on the device
    host_bytes: int = 2 * 2**30  # packed adapters in host memory
    copy_bytes_per_step: int = 64 * 2**20  # copied into slots between two steps; one copy goes whatever its size
    num_loaders: int = 4  # adapters that load at once
    is_prefix_cached: bool = True  # share the KV blocks of equal beginnings
    log_level: str = "info"
    log_format: str = "auto"  # pretty at a terminal, JSON elsewhere; or `json`, or `pretty`


class Submit(msgspec.Struct, tag=True):
    """A new sequence to generate; the engine answers with `Output`s of the same `sequence_id`."""

    sequence_id: str
    namespace: str  # the tenant: KV blocks are never shared across namespaces, steps are shared fairly
    prompt: list[int]  # token ids
    sampling: Sampling
    deadline: float  # monotonic seconds; the sequence fails with `deadline_exceeded` after it
    arrived: float  # monotonic seconds
    adapters: tuple[AdapterRef, ...] = ()  # empty is the base alone
    share: float = 1.0  # weight of the namespace against others
    max_running: int | None = None  # sequences of the namespace that run at once
    is_probe: bool = False  # validates an upload: it gets only a few tokens of a step that computes others
    form: str | None = None  # the grammar that the answer must fit, as llguidance writes it
    answered: list[int] = []  # the answer so far, from an engine that died; what follows is the same as there


class Abort(msgspec.Struct, tag=True):
    """Free a sequence and send nothing more for it: its client has gone."""

    sequence_id: str


class Discard(msgspec.Struct, tag=True):
    """Drop a deleted artifact's host copy and slot as soon as no sequence uses them."""

    digest: str


class Stage(msgspec.Struct, tag=True):
    """Load an artifact from a folder of the staging area instead of the store, until `folder` None is sent."""

    digest: str
    folder: str | None


class KeepResident(msgspec.Struct, tag=True):
    """Keep these adapters in slots even if no sequence asks for them, in order of priority.

    Replaces the list that was sent before.
    """

    digests: list[str]


class Renew(msgspec.Struct, tag=True):
    """Forget an artifact's load failures, because it was uploaded again: its next load may start at once."""

    digest: str


class AskResidency(msgspec.Struct, tag=True):
    """Ask where adapters are; answered by `Residency` with the same `query_id`."""

    query_id: int


class Output(msgspec.Struct):
    """New tokens of one sequence. With `finish_reason` or `failure` it is the sequence's last output."""

    sequence_id: str
    token_ids: list[int] = []
    logprobs: list[Logprobs] = []  # one a token, if they were asked for
    scores: list[Logprobs] = []  # of the prompt's next tokens, if they were asked for
    finish_reason: str | None = None  # "stop" or "length"
    failure: EngineFailure | None = None
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    virtual_tokens: int = 0  # positions of the adapters' prefixes
    timing: Timing | None = None  # with the first token, or the end of a prompt that is only scored


class Stats(msgspec.Struct):
    """Current gauges, and counters since the engine started. Every counter's name ends in `_total`."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0  # KV blocks
    num_blocks_used: int = 0
    num_blocks_cached: int = 0  # whose contents can be reused
    slot_bytes_used: int = 0
    host_bytes_used: int = 0
    num_slots: int = 0
    num_host: int = 0
    num_pins: int = 0
    num_quarantined: int = 0
    steps_total: int = 0
    step_seconds_total: float = 0.0
    rows_total: int = 0
    tokens_total: int = 0
    adapter_seconds_total: float = 0.0  # spent on adapters between steps, while sequences ran
    stall_seconds_total: float = 0.0  # those of them that held up a step noticeably
    loads_total: int = 0
    load_seconds_total: float = 0.0
    load_failures_total: int = 0
    evictions_total: int = 0
    preemptions_total: int = 0
    fast_forward_tokens_total: int = 0  # of answers whose forms allowed no others: taken without a step each
    cache_hit_tokens_total: int = 0
    cache_query_tokens_total: int = 0
    deaths_total: int = 0  # engines that died or were ended since the API process started; counted by it, as the next
    resumed_requests_total: int = 0  # by the engines that came after those


class StepDone(msgspec.Struct, tag=True):
    """The outputs of one step and the engine's state after it; an idle engine sends one without outputs each second."""

    outputs: list[Output]
    stats: Stats


class Residency(msgspec.Struct, tag=True):
    """The state of each digest: `loading`, `host`, `slot`, `failed` or `quarantined`; absent ones are not listed."""

    query_id: int
    states: dict[str, str]


class Ready(msgspec.Struct, tag=True):
    """The engine serves: the base's description and limits, by which requests and uploads are checked."""

    spec: BaseSpec
    eos_token_ids: list[int]
    max_sequence_tokens: int  # prompt and answer
    max_adapter_bytes: int  # of a packed adapter, in a slot as in host memory
    item_bytes: ItemBytes  # bytes a number of a packed adapter
    precision: str  # of the base's weights: fp32, bf16, fp16 or int8
    load_seconds: float
    has_forms: bool = True  # answers can be held to a form
    largest_value: float = FP32_MAX  # that a slot's matrices can hold
    forward: ForwardReport | None = None  # how the base is computed; None: an engine without a model


class Beat(msgspec.Struct, tag=True):
    """The engine process runs; sent each second by a thread of its own, if no kernel holds the GIL meanwhile."""


class StartFailed(msgspec.Struct, tag=True):
    """The engine cannot serve this base, in one sentence for the operator; the process exits after sending it."""

    message: str


ToEngine = Submit | Abort | Discard | Stage | KeepResident | Renew | AskResidency
FromEngine = StepDone | Residency | Ready | Beat | StartFailed
