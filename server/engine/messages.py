"""The frames between the front and the engine: msgpack over a unix socket, never pickle.

A frame is a 4-byte big-endian length and one msgpack message, tagged by its class name. Times are seconds of
CLOCK_MONOTONIC, which both processes share.
"""

from __future__ import annotations

import msgspec

from adapters_store.base.spec import BaseSpec, ItemBytes
from server.core import AdapterRef, EngineFailure, Logprobs, Sampling, Timing

FP32_MAX = 3.4028234663852886e38


class EngineConfig(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The first frame that the engine reads: what to load (as `server.model.runner.RunnerConfig`) and its limits.

    `store` is where the artifacts are, a folder or URL; None: the folder `blobs`, where uploads are staged in any case.
    `slot_bytes` and `host_bytes` bound the packed adapters at each level; `copy_bytes_per_step` bounds what is copied
    into slots between two steps (one copy always goes).
    """

    folder: str
    name: str
    blobs: str
    store: str | None = None
    precision: str = "auto"
    device: str = "cpu"
    num_threads: int = 2
    kv_cache_bytes: int = 768 * 2**20
    block_size: int = 32
    max_sequence_tokens: int | None = None
    max_batch_tokens: int = 512
    max_running: int = 32
    max_waiting: int = 1024
    slot_bytes: int = 512 * 2**20
    host_bytes: int = 2 * 2**30
    copy_bytes_per_step: int = 64 * 2**20
    num_loaders: int = 4
    is_prefix_cached: bool = True
    cuda_graphs: bool = False


class Submit(msgspec.Struct, tag=True):
    """A new sequence. `namespace` keeps KV apart (the tenant); `deadline` is monotonic seconds.

    `share` weighs the namespace against others; at most `max_running` of its sequences run at once.
    A probe of an upload takes but a few tokens of a step that others are in.
    """

    sequence_id: str
    namespace: str
    prompt: list[int]
    sampling: Sampling
    deadline: float
    arrived: float
    adapters: tuple[AdapterRef, ...] = ()
    share: float = 1.0
    max_running: int | None = None
    is_probe: bool = False


class Abort(msgspec.Struct, tag=True):
    """The front has no more use for the sequence: free it, answer nothing."""

    sequence_id: str


class Discard(msgspec.Struct, tag=True):
    """The artifact was deleted: drop its host copy and slot as soon as nothing uses them."""

    digest: str


class Stage(msgspec.Struct, tag=True):
    """Until it is said again with None, the artifact is read from a folder of the staging area, not from the store."""

    digest: str
    folder: str | None


class KeepResident(msgspec.Struct, tag=True):
    """From now on these stay in slots while nobody asks for them, too, the first before the others; no others do."""

    digests: list[str]


class Renew(msgspec.Struct, tag=True):
    """The artifact was uploaded again: what failed before may be tried again at once."""

    digest: str


class AskResidency(msgspec.Struct, tag=True):
    """Answered by `Residency` with the same `query_id`."""

    query_id: int


class Output(msgspec.Struct):
    """New tokens of one sequence. With `finish_reason` or `failure` it is the sequence's last output."""

    sequence_id: str
    token_ids: list[int] = []
    logprobs: list[Logprobs] = []
    finish_reason: str | None = None
    failure: EngineFailure | None = None
    cached_tokens: int = 0
    virtual_tokens: int = 0
    timing: Timing | None = None


class Stats(msgspec.Struct):
    """Gauges as they are now; counters since the engine started. Every counter's name ends in `_total`."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_blocks_used: int = 0
    num_blocks_cached: int = 0
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
    adapter_seconds_total: float = 0.0
    stall_seconds_total: float = 0.0
    loads_total: int = 0
    load_seconds_total: float = 0.0
    load_failures_total: int = 0
    evictions_total: int = 0
    preemptions_total: int = 0
    cache_hit_tokens_total: int = 0
    cache_query_tokens_total: int = 0


class StepDone(msgspec.Struct, tag=True):
    """The outputs of one step, and the engine's state after it. Sent with no outputs about once a second when idle."""

    outputs: list[Output]
    stats: Stats


class Residency(msgspec.Struct, tag=True):
    """Where each known digest is: `loading`, `host`, `slot`, `failed`, `quarantined`; absent ones are not listed."""

    query_id: int
    states: dict[str, str]


class Ready(msgspec.Struct, tag=True):
    """The engine has its base: what the front must know of it to refuse at the door."""

    spec: BaseSpec
    eos_token_ids: list[int]
    max_sequence_tokens: int
    max_adapter_bytes: int  # on the device and in host memory
    item_bytes: ItemBytes
    precision: str
    load_seconds: float
    largest_value: float = FP32_MAX  # of a matrix, as slots keep it


class StartFailed(msgspec.Struct, tag=True):
    """The engine cannot serve this base (one sentence for the operator); it exits after sending it."""

    message: str


ToEngine = Submit | Abort | Discard | Stage | KeepResident | Renew | AskResidency
FromEngine = StepDone | Residency | Ready | StartFailed
